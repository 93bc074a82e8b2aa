"""The support matrix of the site: its cells hold, and the tests that it names exist."""

from __future__ import annotations

import re
import shlex
import warnings
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from checkpoints import write_checkpoint, write_facts
from docs_site.support import (
    DEVICES,
    EVIDENCE,
    FEATURES,
    FORMS,
    NO_EFFECT,
    REFUSED,
    TESTED,
    Feature,
    rows_of,
    state_of,
    support_tables,
    why_refused,
)
from molf.cli import main
from molf.core.options import OPTIONS
from molf.job.settings.defaults import METHODS
from molf.job.settings.resolved import resolve
from molf.job.settings.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = """\
default: frozen
full: [k_proj, down_proj]
lora: [{r: 4, alpha: 8, modules: [q_proj]}]
"""


def packs(form: str) -> list[tuple[Feature, ...]]:
    """The tested rows of a column on a CPU, in as few trainings as their exclusions allow."""
    plain, *others = (
        one for one in FEATURES if state_of(form, one, "cpu") == TESTED and not one.has_own_tests
    )
    found = [[plain]]
    for feature in others:
        for pack in found[1:]:
            joined = {key: value for one in pack for key, value in one.settings.items()}
            is_new = all(joined.get(key, value) == value for key, value in feature.settings.items())
            both = Feature("", {**joined, **feature.settings})
            if is_new and why_refused(form, both, "cpu") is None:
                pack.append(feature)
                break
        else:
            found.append([feature])
    return [tuple(pack) for pack in found]


def options_of(form: str, features: tuple[Feature, ...]) -> list[str]:
    """The options of a training; those in several rows once."""
    given = {"ranks": "--ranks 4"}
    given |= {name: f"--{name} {value}" for name, value in FORMS[form].items()}
    for feature in features:
        for option in re.findall(r"--\S+(?: [^-]\S*)?", feature.text):
            given[option.split()[0].removeprefix("--").removeprefix("no-")] = option
    return shlex.split(" ".join(given.values()))


CELLS = [
    pytest.param(form, pack, id=f"{form} {number}")
    for form in FORMS
    for number, pack in enumerate(packs(form))
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose layers are wide enough for 4 bits, 8-bit moments and EVA."""
    folder = tmp_path_factory.mktemp("support")
    write_checkpoint(folder / "base", hidden_size=64, intermediate_size=128)
    write_facts(folder / "facts.jsonl")
    (folder / "assignment.yaml").write_text(PATTERNS)
    return folder


def train(base: Path, *options: str) -> int:
    return main(
        [
            *("train", "--task", "fact", "--model", str(base / "base")),
            *("--data", str(base / "facts.jsonl"), "--max_steps", "3", "--max_eval_samples", "2"),
            *("--per_device_train_batch_size", "4", "--no-report", "--no-spectra"),
            *options,
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("form", "features"), CELLS)
def test_cells_of_a_cpu(form, features, base, tmp_path, monkeypatch, capsys):
    """A training with these options is measured and saved, and has every one of them."""
    for library in ("bitsandbytes", "torchao"):
        pytest.importorskip(library)
    monkeypatch.chdir(base)
    code = train(base, *options_of(form, features), "--output_dir", str(tmp_path / "run"))
    errors = capsys.readouterr().err
    assert code == 0, errors
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    for feature in features:
        for name, value in feature.settings.items():
            expected = list(value) if isinstance(value, tuple) else value
            if name == "ranks" and len(config["ranks"]) == 1:
                expected = [sum(value)]  # one adapter has the sum
            assert config[name] == expected, name
    assert (tmp_path / "run/model/model.safetensors").is_file()
    unused = re.findall(r"Without effect with method=\S+: (.*)\.", errors)
    assert not {name for line in unused for name in line.split(", ")} & {
        name for feature in features for name in feature.settings
    }


@pytest.mark.parametrize("form", FORMS)
def test_options_without_effect_warn(form):
    for feature in FEATURES:
        if state_of(form, feature, "cuda") == NO_EFFECT:
            settings = TrainSettings(**{**FORMS[form], **feature.settings})
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                resolve(settings, datetime(2026, 1, 1))
            told = " ".join(
                str(one.message) for one in caught if "Without effect" in str(one.message)
            )
            assert any(name in told for name in feature.settings), feature.text


@pytest.mark.slow
def test_options_for_a_gpu_on_a_cpu(base, tmp_path, capsys):
    pytest.importorskip("triton")
    small = ("--ranks", "4", "--output_dir", str(tmp_path / "run"))
    refused = [
        one for one in FEATURES if one.only == "cuda" and state_of("molf", one, "cpu") == REFUSED
    ]
    assert len(refused) == 4
    for feature in refused:
        assert train(base, *shlex.split(feature.text), *small) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert any(f"{name.partition('.')[2] or name}" in error for name in named(feature)), error
    assert train(base, "--state_offload", *small) == 0
    assert "state_offload=True is without effect" in capsys.readouterr().err


def named(feature: Feature) -> list[str]:
    """The options of a row."""
    return re.findall(r"--(\S+)", feature.text)


def test_every_named_test_exists():
    for evidence in EVIDENCE:
        file, function = evidence.test.split("::")
        assert f"\ndef {function}(" in (ROOT / file).read_text(), evidence.test


def test_every_evidence_is_of_an_accepted_cell():
    rows = {feature.text: feature for feature in FEATURES}
    for evidence in EVIDENCE:
        for form in evidence.forms:
            for text in evidence.texts or ():
                assert state_of(form, rows[text], evidence.device) == TESTED, (form, text)


def test_every_option_of_the_optimizer_is_a_row():
    assert set(OPTIONS) <= {name for feature in FEATURES for name in feature.settings}
    assert {settings["method"] for settings in FORMS.values()} == set(METHODS)


def test_page():
    text = support_tables()
    for device in DEVICES:
        assert f"## {DEVICES[device].title}\n" in text
        assert len(rows_of(device)) > 10
    assert text.count(f">{REFUSED}<") > 20
