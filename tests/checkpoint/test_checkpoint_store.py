"""Checkpoints on disk: damage is found, the last good one stays, and the background is as safe."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from molf.checkpoint import writer as writing
from molf.checkpoint.random_state import random_state, set_random_state
from molf.checkpoint.store import (
    complete_checkpoints,
    delete_checkpoint,
    delete_old,
    newest_checkpoint,
    read_values,
)
from molf.checkpoint.tensors import read_tensors
from molf.checkpoint.writer import CheckpointError, CheckpointWriter, Snapshot


def snapshot(step: int, value: float = 0.0) -> Snapshot:
    return Snapshot(step, {"model.w": torch.full((100,), value or step)}, {"step": step})


@pytest.fixture
def three(tmp_path):
    """Checkpoints of steps 1 to 3."""
    writer = CheckpointWriter(lambda: tmp_path)
    for step in (1, 2, 3):
        writer.write(snapshot(step))
    return tmp_path


def truncate(path: Path) -> None:
    file = path / "tensors" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def change(path: Path) -> None:
    file = path / "values.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def with_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


DAMAGE = {
    "truncated": (truncate, r"tensors/__0_0\.distcp has \d+ of \d+ bytes"),
    "changed": (change, r"the content of values\.pt has changed"),
    "missing": (lambda path: (path / "values.pt").unlink(), r"values\.pt: No such file"),
    "without manifest": (lambda path: (path / "manifest.json").unlink(), r"it has no manifest"),
    "bad manifest": (lambda path: (path / "manifest.json").write_text("{"), r"cannot be read"),
    "other format": (with_format, r"its format is 99, and this version of molf reads 1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_reported(three, kind):
    act, words = DAMAGE[kind]
    act(three / "checkpoint-3")
    with pytest.warns(UserWarning, match=f"checkpoint-3 is damaged and is not used: .*{words}"):
        assert newest_checkpoint(three) == three / "checkpoint-2"


def test_last_good_checkpoint_is_never_deleted(three):
    truncate(three / "checkpoint-3")
    truncate(three / "checkpoint-2")
    delete_old(three, keep=1)
    assert [step for step, _ in complete_checkpoints(three)] == [1]


def test_leftovers_of_killed_processes_are_deleted(three):
    (three / ".checkpoint-4.123000.tmp").mkdir()
    assert newest_checkpoint(three) == three / "checkpoint-3"
    assert sorted(path.name for path in three.iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
    ]


def test_deleted_checkpoint_leaves_nothing_under_its_name(three, monkeypatch):
    monkeypatch.setattr("molf.checkpoint.store.shutil.rmtree", lambda *given, **named: None)
    delete_checkpoint(three / "checkpoint-3")  # killed before its files are deleted
    assert newest_checkpoint(three) == three / "checkpoint-2"


def test_background_writes_the_state_of_its_step(tmp_path, monkeypatch):
    """The training changes its tensors while they are written."""
    started, go_on = threading.Event(), threading.Event()
    write = writing.write_tensors

    def waiting(*given):
        started.set()
        assert go_on.wait(10)
        write(*given)

    monkeypatch.setattr(writing, "write_tensors", waiting)
    weight = torch.ones(5)
    values = {"list": [1]}
    writer = CheckpointWriter(lambda: tmp_path, in_background=True)
    writer.write(Snapshot(1, {"w": weight}, values))
    assert started.wait(10)
    weight.zero_()
    values["list"].append(2)
    assert complete_checkpoints(tmp_path) == []
    go_on.set()
    writer.wait()
    found = {"w": torch.empty(5)}
    read_tensors(tmp_path / "checkpoint-1", found)
    assert torch.equal(found["w"], torch.ones(5))
    assert read_values(tmp_path / "checkpoint-1") == {"list": [1]}
    assert writer.totals.count == 1


def test_copies_for_the_background_wait_for_each_device(tmp_path, monkeypatch):
    waited = set()
    monkeypatch.setattr(torch.cuda, "synchronize", waited.add)
    monkeypatch.setattr(torch, "empty_like", lambda *given, **named: Mock())
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    writer = CheckpointWriter(lambda: tmp_path, in_background=True)
    writer._copy({str(device): Mock(device=device) for device in devices})
    assert waited == set(devices[:2])


def test_background_copies_the_current_dtype(tmp_path):
    writer = CheckpointWriter(lambda: tmp_path, in_background=True)
    for step, dtype in enumerate((torch.bfloat16, torch.float32)):
        writer.write(Snapshot(step, {"w": torch.full((5,), 0.1, dtype=dtype)}, {}))
    writer.wait()
    found = {"w": torch.empty(5)}
    read_tensors(tmp_path / "checkpoint-1", found)
    assert torch.equal(found["w"], torch.full((5,), 0.1))


def test_error_in_the_background_is_raised_once(tmp_path, monkeypatch):
    def fail(*given):
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(lambda: tmp_path, in_background=True)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_tensors", fail)
        writer.write(snapshot(1))
        with pytest.raises(CheckpointError) as caught:
            writer.wait()
    assert caught.value.step == 1
    assert isinstance(caught.value.__cause__, OSError)
    writer.write(snapshot(2))
    writer.wait()
    assert [step for step, _ in complete_checkpoints(tmp_path)] == [2]
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint-2"]


def test_random_states(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(3).tolist()

    draw()  # an odd number of normal draws: Python and NumPy keep the second of a pair
    torch.save(random_state(), tmp_path / "random.pt")
    expected = draw()
    draw()
    set_random_state(torch.load(tmp_path / "random.pt", weights_only=True))
    assert draw() == expected
