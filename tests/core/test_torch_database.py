"""Our optimizers with the inputs of torch's own test suite.

The inputs are torch's (`torch.testing._internal.common_optimizers`), the tests are ours.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from torch_database import (
    LIKE_TORCH,
    OTHER_DIFFERENCES,
    REFUSED_KEYWORDS,
    SUBJECTS,
    Problem,
    entry,
)

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs" / "optimizer.md"

try:
    DATABASE = entry()
    INPUTS = DATABASE.optim_inputs_func(CPU)
    SCHEDULES = [make for several in DATABASE.scheduler_inputs for make in several]
    IMPLEMENTATIONS = {*DATABASE.supported_impls, *DATABASE.not_og_supported_flags}
    WRONG = [
        (x.optimizer_error_input, x.error_type, x.error_regex)
        for x in DATABASE.optim_error_inputs_func(CPU, torch.float32)
    ]
    WRONG_NAMES = [given.desc for given, _, _ in WRONG]
    TAKEN = [one for one in INPUTS if not set(one.kwargs) & set(REFUSED_KEYWORDS)]
except (ImportError, AttributeError, LookupError, TypeError) as error:
    pytest.skip(f"torch's database of optimizer inputs cannot be used: {error!r}", True)

# Torch's wrong inputs that are right here, with the difference that it is.
RIGHT_HERE = {
    "betas must be either both floats or both Tensors": "one beta a number, the other a tensor",
    "all optimizer param groups should be with/without names.": (
        "a group without names beside groups with names"
    ),
}

each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda one: one.name)
each_like_torch = pytest.mark.parametrize("subject", LIKE_TORCH, ids=lambda one: one.name)
each_input = pytest.mark.parametrize(
    "options", [one.kwargs for one in TAKEN], ids=[one.desc for one in TAKEN]
)


@each_subject
@pytest.mark.parametrize("one", INPUTS, ids=lambda one: one.desc)
def test_every_input_is_taken_or_its_keyword_is_named(subject, one):
    refused = [key for key in one.kwargs if key in REFUSED_KEYWORDS]
    if not refused:
        subject(Problem.make().parameters, **one.kwargs)
        return
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{refused[0]}'"):
        subject(Problem.make().parameters, **one.kwargs)


@each_subject
def test_every_way_to_compute_that_is_not_taken_is_named(subject):
    assert set(REFUSED_KEYWORDS) >= IMPLEMENTATIONS
    for keyword in REFUSED_KEYWORDS:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            subject(Problem.make().parameters, **{keyword: True})


@each_subject
@pytest.mark.parametrize(("given", "error", "message"), WRONG, ids=WRONG_NAMES)
def test_every_wrong_input_is_refused(subject, given, error, message):
    params, options = given.params, given.kwargs
    refused = [key for key in options if key in REFUSED_KEYWORDS]
    if params is None:
        params = Problem.make().parameters
        named = next(key for key in ("beta", "lr", "weight_decay") if key in message)
        message = f"Invalid {named}"
    if given.desc in RIGHT_HERE:
        assert RIGHT_HERE[given.desc] in OTHER_DIFFERENCES
        subject.beside_a_layer(params, **options)
        return
    if refused:
        error, message = TypeError, f"unexpected keyword argument '{refused[0]}'"
    elif isinstance(params, torch.Tensor) and subject.score:
        error, message = ValueError, "No parameter group names a routed layer"
    expected = pytest.warns if issubclass(error, Warning) else pytest.raises
    with expected(error, match=message):
        subject.beside_a_layer(params, **options)


@each_like_torch
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_input
def test_moves_as_torchs_adamw_does(subject, dtype, contiguous, options):
    ours, theirs = (Problem.make(dtype, contiguous=contiguous) for _ in range(2))
    got = ours.run(subject(ours.parameters, **options), 7)
    expected = theirs.run(torch.optim.AdamW(theirs.parameters, **options), 7)
    torch.testing.assert_close(got, expected)


@each_subject
@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("contiguous", [True, False])
@each_input
def test_losses_fall_under_every_schedule(subject, contiguous, options, schedule):
    problem = Problem.make(contiguous=contiguous)
    optimizer = subject(problem.parameters, **options)
    scheduler = schedule and schedule(optimizer)
    first = problem.backward()
    for _ in range(20):
        loss = optimizer.step(problem.backward)
        if scheduler is not None:
            given = (loss,) if isinstance(scheduler, ReduceLROnPlateau) else ()
            scheduler.step(*given)
    assert problem.backward() < first


def test_the_table_in_the_documentation_is_that_of_the_tests():
    table = PAGE.read_text(encoding="utf-8").split("|---|---|---|---|\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert {len(row) for row in rows} == {4}
    keywords = {f"`{key}=`": why for key, why in REFUSED_KEYWORDS.items()}
    assert {name: why for name, _, _, why in rows} == keywords | OTHER_DIFFERENCES


def test_flags_of_torch_may_be_set_beside_the_database():
    assert not torch.backends.flags_frozen()
