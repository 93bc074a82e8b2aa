"""The optimizer's options: one set of names and defaults, without torch."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

from molf import AdamW, MoLFAdamW
from molf.core.options import EXCLUSIONS, OPTIONS, WORDS, OptimizerOptions, OptionError
from molf.job.settings.settings import TrainSettings

DEFAULTS = {field.name: field.default for field in fields(OptimizerOptions)}


@pytest.mark.parametrize("function", [AdamW.__init__, MoLFAdamW.from_model])
def test_keywords_have_these_names_and_defaults(function):
    keywords = inspect.signature(function).parameters
    assert {name: keywords[name].default for name in OPTIONS} == DEFAULTS


def test_the_command_line_has_these_names_and_defaults():
    given = {field.name: field.default for field in fields(TrainSettings)}
    assert {name: given[name] for name in OPTIONS} == {**DEFAULTS, "kernels": "eager"}


@pytest.mark.parametrize("name", WORDS)
def test_unknown_words(name):
    with pytest.raises(OptionError, match=f"Invalid {name}='magic'. Must be ") as raised:
        OptimizerOptions(**{name: "magic"})
    assert raised.value.as_option.startswith(f"Invalid {name}='magic'. Must be one of ")


OWN = [one for one in EXCLUSIONS if {one.name, one.beside} <= set(OPTIONS)]
NOT_DEFAULT = {
    "state_dtype": "8bit",
    "grad_accumulation_dtype": "float32",
    "optimizer_in_backward": True,
    "state_offload": True,
    "kernels": "triton",
    "nonfinite": "skip",
}


@pytest.mark.parametrize("one", OWN, ids=lambda one: f"{one.name}-{one.beside}")
def test_exclusions_name_keywords_and_options(one):
    pair = {name: NOT_DEFAULT[name] for name in (one.name, one.beside)}
    with pytest.raises(OptionError) as raised:
        OptimizerOptions(**pair)
    first, second = (f"{name}={value!r}" for name, value in pair.items())
    assert str(raised.value).startswith(f"{first} is not possible with {second}: {one.reason}.")
    assert raised.value.as_option.startswith(
        f"Invalid {one.name}={pair[one.name]} with {one.beside}"
    )


def test_no_torch_is_imported():
    code = "import sys, molf.core.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
