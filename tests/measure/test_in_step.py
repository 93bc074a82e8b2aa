"""Forward passes of a model that processes share: as many in each, whatever they measure."""

from __future__ import annotations

import pytest
import torch

import step_world
from step_world import PASSES, Model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return step_world.start(str(tmp_path_factory.mktemp("world")))


def test_processes_have_any_number_of_passes(world):
    model = Model()
    for found, count in zip([one["different_numbers"] for one in world], PASSES, strict=True):
        assert found["passes"] == max(PASSES)
        assert len(found["results"]) == count
        for number, result in enumerate(found["results"]):
            own = model(torch.full((number + 1, 4), float(number))).detach()
            torch.testing.assert_close(result, own)


def test_an_error_between_passes_is_raised_in_all(world):
    assert [one["failing_between"] for one in world] == ["ValueError: between passes"] * 2


def test_an_error_in_a_pass_ends_that_process_and_so_the_others(world):
    other, failed = (one["failing_within"] for one in world)
    assert failed == "ValueError: in the middle"
    assert other  # that of a lost connection
    assert "in the middle" not in other
