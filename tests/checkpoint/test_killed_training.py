"""A training that is killed again and again ends in the bits of one that is left alone."""

from __future__ import annotations

import random
import shutil
import signal
import time
from multiprocessing.context import ForkServerProcess

import pytest
import torch

from core_helpers import assert_same_bits
from forked import forking
from killed_training import train
from molf.checkpoint.store import complete_checkpoints
from molf.disk.files import is_unfinished

STEPS = 16


@pytest.fixture(scope="module")
def start():
    """Start a process that has torch already; a new one would take seconds to import it."""
    context = forking()

    def started(folder, **options) -> ForkServerProcess:
        folder.mkdir(exist_ok=True)
        process = context.Process(target=train, args=(folder, STEPS), kwargs=options)
        process.start()
        return process

    return started


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """The end of a training that is left alone, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    begun = time.monotonic()
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    seconds = time.monotonic() - begun
    return {**torch.load(folder / "end.pt", weights_only=True), "seconds": seconds}


def is_the_same(folder, undisturbed) -> None:
    end = torch.load(folder / "end.pt", weights_only=True)
    assert end["losses"] == undisturbed["losses"]
    assert end["values"] == undisturbed["values"]
    assert_same_bits(end["tensors"], undisturbed["tensors"])


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True], ids=["waiting", "background"])
def test_killed_at_each_operation_of_a_save(start, undisturbed, tmp_path, in_background):
    """Each life dies one operation later than the one before."""
    torn = kills = 0
    has_any = False
    for number in range(1, 200):
        process = start(tmp_path, in_background=in_background, dies_at=3 * number)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        torn += any(is_unfinished(path.name) for path in tmp_path.iterdir())
        found = bool(complete_checkpoints(tmp_path))
        assert found or not has_any  # once there is something to go on from, there always is
        has_any = found
    assert kills >= 8
    assert torn >= 4
    is_the_same(tmp_path, undisturbed)


@pytest.mark.parametrize("in_background", [False, True], ids=["waiting", "background"])
def test_killed_at_random_moments(start, undisturbed, tmp_path, in_background):
    moments = random.Random(1)
    kills = 0
    reached = set()  # newest steps, 0 before the first checkpoint
    while kills < 10:
        process = start(tmp_path, in_background=in_background)
        # Later moments for later lives, so that a machine that became slow reaches a checkpoint.
        time.sleep(undisturbed["seconds"] * moments.uniform(0.1, 0.9) * (1 + kills / 5))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it ended before: another training
            is_the_same(tmp_path, undisturbed)
            shutil.rmtree(tmp_path)
            continue
        kills += 1
        reached.add(max((step for step, _ in complete_checkpoints(tmp_path)), default=0))
    assert reached - {0}  # it was killed while it trained, not only while it started
    process = start(tmp_path, in_background=in_background)
    process.join()
    assert process.exitcode == 0
    is_the_same(tmp_path, undisturbed)
    assert [step for step, _ in complete_checkpoints(tmp_path)] == [STEPS - 1, STEPS]
