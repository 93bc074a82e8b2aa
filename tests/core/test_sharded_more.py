"""Further cases of `test_sharded.py`: all forms, scores and storages, and eight processes."""

from __future__ import annotations

from functools import cache

import pytest

import sharded_world
from sharded_checks import assert_as_one_process, assert_resharded
from sharded_models import trained
from sharded_world import CHECKPOINTS, PARITY, RESHARDED, SCORES, SHARDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def world(folder) -> list[dict]:
    """What all processes have come to, by scenario."""
    return sharded_world.start(folder, thorough=True)


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> list[dict]:
    return sharded_world.start_eight(str(tmp_path_factory.mktemp("eight")))


@cache
def one_process(form: str, **options):
    return trained(form, **options)


@pytest.mark.parametrize("case", PARITY[True], ids=str)
def test_winners_and_weights_are_those_of_one_process(world, case):
    form, name, _ = case
    shards = SHARDS.get(name, int(name[-1]))
    found = [one["winner_parity"][case] for one in world[:shards]]
    assert_as_one_process(found, one_process(form))


@pytest.mark.parametrize("name", ["8", "ddp 8"])
def test_eight_processes(eight, name):
    assert_as_one_process([one[name] for one in eight], one_process("folded"))


@pytest.mark.parametrize("micro", [2, 4, 8])
def test_one_process_with_micro_batches(micro):
    assert_as_one_process([one_process("folded", micro=micro)], one_process("folded"))


@pytest.mark.parametrize("score", SCORES[True])
def test_every_score_has_the_winners_of_one_process(world, score):
    found = [one["scores"][score] for one in world[:3]]
    assert_as_one_process(found, one_process("folded", score=score))


@pytest.mark.parametrize("name", CHECKPOINTS[True])
@pytest.mark.parametrize(("source", "target"), [*RESHARDED, ("4", "1"), ("2x2", "1")])
def test_checkpoints_load_in_any_number_of_processes(world, folder, name, source, target):
    found = [one["checkpoints"] for one in world]
    assert_resharded(found, folder, name, source, target)
