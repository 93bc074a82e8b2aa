"""The support matrix: options by method and device.

Refusals and options without effect come from the checks of the command line. A cell is "tested"
only if `EVIDENCE` names a test of it. `tests/job/test_support.py` runs every cell of a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

from molf.core.options import MissingLibraryError, OptionError, check_exclusions
from molf.errors import InputError
from molf.job.settings.defaults import ADAPTERS
from molf.job.settings.resolved import unused_options
from molf.job.settings.settings import TrainSettings

TESTED, UNTESTED, REFUSED, NO_EFFECT = "tested", "untested", "refused", "no effect"

WITH_DROPOUT = "molf, dropout"
"""MoLF with an adapter beside the trained weights."""

FORMS: dict[str, dict[str, Any]] = {
    "fft": {"method": "fft"},
    "molf": {"method": "molf"},
    WITH_DROPOUT: {"method": "molf", "lora_dropout": 0.05},
    "molf-e": {"method": "molf-e"},
    "hybrid": {"method": "hybrid", "assignment": "assignment.yaml"},
    **{method: {"method": method} for method in ADAPTERS},
}
"""The settings of each method."""


@dataclass(frozen=True)
class Feature:
    """A row.

    Attributes:
        text: The options, as on the command line.
        settings: The same, as fields of `TrainSettings`.
        only: The device that the options need; None for any.
        is_job: Whether the options exist on the command line alone, not in a loop of the user.
        has_own_tests: Whether its cells are tested by tests of their own alone, which take long.
    """

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    only: str | None = None
    is_job: bool = False
    has_own_tests: bool = False


def _argument(name: str, value: str, **further: Any) -> Feature:
    """Return the row of an argument of the trainer."""
    settings = {"training_args": {name: value}}
    return Feature(f"--training_args.{name} {value}", settings, is_job=True, **further)


class Device(NamedTuple):
    """A table.

    Attributes:
        title: Its heading.
        text: Paragraph below the heading.
        processes: Processes of the command.
        is_sharded: Whether the parameters are cut by `fully_shard`, in a loop of the user.
        forms: The columns.
        shards: The option `fsdp` of the command.
    """

    title: str
    text: str
    processes: int = 1
    is_sharded: bool = False
    forms: tuple[str, ...] = tuple(FORMS)
    shards: str | None = None


_BF16 = {"dtype": "bfloat16"}
FEATURES = (
    Feature("no further option"),
    Feature("--ranks 2,4", {"ranks": (2, 4)}),
    Feature("--no-use_rslora", {"use_rslora": False}),
    Feature("--match parameters", {"match": "parameters"}, is_job=True),
    Feature("--use_dora", {"use_dora": True}, is_job=True),
    Feature("--score pfn", {"score": "pfn"}),
    Feature("--score random", {"score": "random"}),
    Feature("--score share:0.5:epd", {"score": "share:0.5:epd"}),
    Feature("--freeze_rest", {"freeze_rest": True}),
    Feature("--target_modules q_proj,v_proj", {"target_modules": ("q_proj", "v_proj")}),
    Feature("--dtype bfloat16", _BF16),
    Feature(
        "--dtype bfloat16 --weight_rounding stochastic", {**_BF16, "weight_rounding": "stochastic"}
    ),
    Feature(
        "--dtype bfloat16 --grad_accumulation_dtype float32",
        {**_BF16, "grad_accumulation_dtype": "float32"},
    ),
    Feature("--state_dtype 8bit", {"state_dtype": "8bit"}),
    Feature("--optimizer_in_backward", {"optimizer_in_backward": True}),
    Feature("--state_offload", {"state_offload": True}, "cuda"),
    Feature("--kernels triton", {"kernels": "triton"}, "cuda"),
    Feature("--load_in_4bit", {"load_in_4bit": True}, is_job=True),
    Feature("--load_in_8bit", {"load_in_8bit": True}, is_job=True),
    Feature("--gradient_checkpointing", {"gradient_checkpointing": True}),
    Feature("--bf16", {"bf16": True}),
    Feature("--attn_implementation eager", {"attn_implementation": "eager"}, is_job=True),
    Feature(
        "--dtype bfloat16 --attn_implementation flash_attention_2",
        {**_BF16, "attn_implementation": "flash_attention_2"},
        "cuda",
        is_job=True,
    ),
    _argument("neftune_noise_alpha", "5"),
    _argument("torch_compile", "true", has_own_tests=True),
    _argument("activation_offloading", "true", only="cuda"),
    _argument("use_liger_kernel", "true", only="cuda"),
    Feature("--gradient_accumulation_steps 2", {"gradient_accumulation_steps": 2}),
    Feature("--max_grad_norm 0.5", {"max_grad_norm": 0.5}),
    Feature("--nonfinite skip", {"nonfinite": "skip"}),
    Feature("--save_steps 1", {"save_steps": 1}, is_job=True),
    Feature("--save_dtype float32", {"save_dtype": "float32"}, is_job=True),
    Feature(
        "--save_dtype bfloat16 --keep_low_halves",
        {"save_dtype": "bfloat16", "keep_low_halves": True},
        is_job=True,
    ),
)
"""The rows. Options of data, evaluation and logging are the same with all methods."""

_OPTIMIZERS = ("fft", "molf", WITH_DROPOUT, "molf-e")
DEVICES = {
    "cpu": Device("One process on a CPU", "`molf train`."),
    "cuda": Device("One process on a CUDA GPU", "`molf train`. No cell has been run on a GPU yet."),
    "ddp": Device(
        "Several processes: DDP",
        "`molf train` under `torchrun`, or `DistributedDataParallel` in a loop of your own; gloo "
        "on CPUs.",
        processes=2,
    ),
    "shards": Device(
        "Sharded by the command: molf train --fsdp",
        "`molf train --fsdp all` under `torchrun` (FSDP2, and HSDP with fewer shards than "
        "processes); gloo on CPUs.",
        processes=2,
        shards="all",
    ),
    "fsdp": Device(
        "Sharded: FSDP2 and HSDP",
        "`fully_shard` in a loop of your own; gloo on CPUs. `fft` is `molf.AdamW`.",
        processes=1,
        is_sharded=True,
        forms=_OPTIMIZERS,
    ),
}
"""The tables."""


class Evidence(NamedTuple):
    """Cells that a test runs.

    Attributes:
        device: Key of `DEVICES`.
        forms: Columns.
        texts: Rows; None for all that are accepted and work on the device.
        test: File and function.
    """

    device: str
    forms: tuple[str, ...]
    texts: tuple[str, ...] | None
    test: str


_PLAIN = FEATURES[0].text
_STOCHASTIC = "--dtype bfloat16 --weight_rounding stochastic"
_CLIPPED = ("--max_grad_norm 0.5", "--gradient_accumulation_steps 2")
_PARITY = "tests/core/test_sharded.py::test_winners_and_weights_are_those_of_one_process"
_ALL_FORMS = "tests/core/test_sharded_more.py::test_winners_and_weights_are_those_of_one_process"
_ALIKE = "tests/core/test_data_parallel.py::test_as_one_process_with_the_joined_batch"
_SCORES = "tests/core/test_sharded_more.py::test_every_score_has_the_winners_of_one_process"
_SHARDS = "tests/job/test_fsdp_more.py::test_any_number_of_shards_trains_as_one_process"
_IN_SHARDS = "tests/job/test_fsdp_more.py::test_methods_train_as_in_one_process"
_BITS = "tests/core/test_sharded.py::test_same_gradients_give_the_same_bits"
EVIDENCE = (
    Evidence("cpu", tuple(FORMS), None, "tests/job/test_support.py::test_cells_of_a_cpu"),
    Evidence(
        "cpu",
        ("molf", "lora"),
        ("--training_args.torch_compile true",),
        "tests/job/test_passed_through.py::"
        "test_compiled_model_has_the_names_and_bits_of_the_plain_one",
    ),
    Evidence("ddp", _OPTIMIZERS, (_PLAIN, "--dtype bfloat16"), _ALIKE),
    Evidence("ddp", ("fft", "molf", WITH_DROPOUT), (_STOCHASTIC,), _ALIKE),
    Evidence("ddp", ("molf",), _CLIPPED, _PARITY),
    Evidence("ddp", ("fft", WITH_DROPOUT, "molf-e"), _CLIPPED, _ALL_FORMS),
    Evidence(
        "ddp",
        ("molf",),
        ("--save_steps 1",),
        "tests/job/test_many_processes.py::"
        "test_killed_process_ends_the_others_and_the_run_is_resumed",
    ),
    Evidence("shards", ("molf",), (_PLAIN, "--gradient_accumulation_steps 2"), _SHARDS),
    Evidence("shards", tuple(form for form in FORMS if form != "molf"), (_PLAIN,), _IN_SHARDS),
    Evidence("shards", ("molf",), ("--state_dtype 8bit", "--gradient_checkpointing"), _IN_SHARDS),
    Evidence(
        "shards",
        ("molf",),
        ("--dtype bfloat16",),
        "tests/job/test_fsdp_more.py::test_exact_bfloat16_shards_keep_their_low_halves",
    ),
    Evidence(
        "shards",
        ("molf",),
        ("--bf16",),
        "tests/job/test_fsdp_more.py::test_bfloat16_is_computed_with_float32_shards",
    ),
    Evidence(
        "shards",
        ("lora", "molf-e"),
        ("--dtype bfloat16",),
        "tests/job/test_fsdp_more.py::test_float32_factors_beside_frozen_bfloat16_shards",
    ),
    Evidence(
        "shards",
        ("molf",),
        ("--save_steps 1",),
        "tests/job/test_fsdp.py::test_killed_shards_are_resumed_to_the_same_bits",
    ),
    Evidence("fsdp", ("molf", WITH_DROPOUT, "molf-e"), (_PLAIN,), _PARITY),
    Evidence("fsdp", ("molf",), _CLIPPED, _PARITY),
    Evidence("fsdp", ("fft", WITH_DROPOUT, "molf-e"), (_PLAIN, *_CLIPPED), _ALL_FORMS),
    Evidence(
        "fsdp",
        ("molf",),
        ("--score pfn", "--score random"),
        _SCORES,
    ),
    Evidence(
        "fsdp",
        ("molf",),
        ("--score share:0.5:epd",),
        "tests/core/test_sharded.py::test_every_score_has_the_winners_of_one_process",
    ),
    Evidence(
        "fsdp",
        ("molf",),
        (_STOCHASTIC, "--state_dtype 8bit"),
        _BITS,
    ),
    Evidence(
        "fsdp",
        ("molf",),
        ("--dtype bfloat16",),
        "tests/core/test_sharded.py::test_bfloat16_shards_are_exact",
    ),
    Evidence(
        "fsdp",
        ("molf", "molf-e"),
        ("--nonfinite skip",),
        "tests/core/test_sharded.py::test_a_bad_number_in_one_process_is_refused_by_all_alike",
    ),
)
"""The tests of cells."""


def rows_of(device: str) -> tuple[Feature, ...]:
    """Return the rows of a device's table."""
    is_own_loop = DEVICES[device].is_sharded
    return tuple(feature for feature in FEATURES if not (is_own_loop and feature.is_job))


def state_of(form: str, feature: Feature, device: str) -> str:
    """Return the state of a cell: `TESTED`, `UNTESTED`, `REFUSED` or `NO_EFFECT`.

    Args:
        form: Key of `FORMS`.
        feature: One of `FEATURES`.
        device: Key of `DEVICES`.
    """
    if why_refused(form, feature, device) is not None:
        return REFUSED
    new = set(feature.settings) - set(FORMS[form])
    if new & set(unused_options(TrainSettings(**FORMS[form]))):
        return NO_EFFECT
    if feature.only == "cuda" and device == "cpu":
        return NO_EFFECT if "state_offload" in feature.settings else REFUSED
    return TESTED if any(_shows(one, form, feature, device) for one in EVIDENCE) else UNTESTED


def why_refused(form: str, feature: Feature, device: str) -> str | None:
    """Return the message of a refused cell; None if the settings are accepted."""
    settings = {**FORMS[form], **feature.settings, "fsdp": DEVICES[device].shards}
    processes = DEVICES[device].processes
    launched = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(processes)}
    try:
        with patch.dict(os.environ, launched):
            checked = TrainSettings(**settings)
        if DEVICES[device].is_sharded:
            check_exclusions({**checked.optimizer_options.as_keywords(), "shards": 2})
    except InputError as error:
        # The matrix is the same where an optional library is missing.
        return None if isinstance(error.__cause__, MissingLibraryError) else str(error)
    except OptionError as error:
        return error.as_option
    return None


def _shows(evidence: Evidence, form: str, feature: Feature, device: str) -> bool:
    return (
        evidence.device == device
        and form in evidence.forms
        and (
            not feature.has_own_tests if evidence.texts is None else feature.text in evidence.texts
        )
    )


def support_tables() -> str:
    """Return Markdown with a table for each device, and the reason of each refusal."""
    return "\n".join(line for device in DEVICES for line in _table(device))


def _table(device: str) -> Iterator[str]:
    title, text, *_ = DEVICES[device]
    rows = rows_of(device)
    columns: dict[tuple[str, ...], list[str]] = {}  # methods with the same states share a column
    for form in DEVICES[device].forms:
        states = tuple(state_of(form, feature, device) for feature in rows)
        columns.setdefault(states, []).append(form)
    yield f"## {title}\n\n{text}\n"
    # HTML, because a table of Markdown has no class.
    yield '<div class="table-wrapper"><table class="docutils matrix"><thead><tr><th></th>'
    for forms in columns.values():
        yield f"<th>{'<br>'.join(f'<code>{form}</code>' for form in forms)}</th>"
    yield "</tr></thead><tbody>"
    for index, feature in enumerate(rows):
        cells = "".join(f"<td>{_shown(states[index])}</td>" for states in columns)
        yield f"<tr><td>{_options(feature)}</td>{cells}</tr>"
    yield "</tbody></table></div>\n"
    tests = sorted({one.test for one in EVIDENCE if one.device == device})
    if tests:
        yield "Tests:\n"
        yield from (f"- `{test}`" for test in tests)
        yield ""


def _options(feature: Feature) -> str:
    """Return the options of a row, one per line."""
    options = feature.text.replace(" --", "\n--").split("\n")
    if not feature.settings:
        return feature.text
    return "<br>".join(f"<code>{option}</code>" for option in options)


def _shown(state: str) -> str:
    return f'<span class="{state.replace(" ", "-")}">{state}</span>'


def refusals() -> str:
    """Return Markdown with the message of each refused option, once."""
    found: dict[str, None] = {}
    for device in DEVICES:
        for form in DEVICES[device].forms:
            for feature in rows_of(device):
                if message := why_refused(form, feature, device):
                    found[message] = None
    return "\n".join(f"- {message}" for message in found)
