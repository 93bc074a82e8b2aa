"""A checkpoint holds every bit of a training, in every form and storage, and loads in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core_helpers import assert_same_bits
from executors import EXECUTORS
from molf.checkpoint.manifest import DamagedError
from molf.checkpoint.states import load_training_state, training_state
from molf.checkpoint.store import newest_checkpoint, read_values
from molf.checkpoint.writer import CheckpointWriter, Snapshot
from molf.planning.measure import PeakBytes
from optimizer_cells import Cell, Training, cells


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Iterator[Cell]:
    """One cell of the table."""
    form, storage, name = request.param
    with EXECUTORS[name].around() as carrier:
        yield Cell(form, storage, EXECUTORS[name], carrier)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int = 1) -> Path:
    tensors, values = training_state(model, optimizer)
    CheckpointWriter(lambda: folder).write(Snapshot(step, tensors, values))
    found = newest_checkpoint(folder)
    assert found is not None
    return found


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    load_training_state(path, read_values(path), model, optimizer)


@cells(
    "eager",
    "backward",
    "offload",
    "offload backward",
    storages=["float32", "float64", "exact", "stochastic", "8bit"],
)
def test_a_loaded_training_takes_the_same_steps(cell, tmp_path):
    training = cell.build().train(0, 1)
    path = save(tmp_path, training.model, training.optimizer)
    other = cell.build()
    with torch.no_grad():
        for parameter in other.trained.values():
            parameter.zero_()
    load(path, other.model, other.optimizer)
    cell.check_place(other)
    assert_same_bits(training.bits(), other.bits())
    training.train(2, 3)
    other.train(2, 3)
    assert_same_bits(training.bits(), other.bits())
    assert training.routing == other.routing


@pytest.mark.parametrize("score", ["fresh", "epd-balanced"])
def test_numbers_that_a_score_keeps(score, tmp_path):
    cell = Cell("folded", "float32", EXECUTORS["eager"], None)
    training = cell.build(score=score).train(0, 1, 2)
    path = save(tmp_path, training.model, training.optimizer)
    other = cell.build(score=score)
    load(path, other.model, other.optimizer)
    assert_same_bits(training.train(3).bits(), other.train(3).bits())
    assert training.routing == other.routing


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": False, "foreach": True}])
def test_torchs_adamw(options, tmp_path):
    def build() -> Training:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
        return Training(model, torch.optim.AdamW(model.parameters(), **options))

    training = build().train(0, 1)
    training.model(torch.randn(3, 5))  # the buffers of the norm have changed
    path = save(tmp_path, training.model, training.optimizer)
    other = build()
    load(path, other.model, other.optimizer)
    assert other.model[1].num_batches_tracked == 1
    assert_same_bits(training.train(2).bits(), other.train(2).bits())
    for state, loaded in zip(
        training.optimizer.state.values(), other.optimizer.state.values(), strict=True
    ):
        assert {k: v.device for k, v in state.items()} == {k: v.device for k, v in loaded.items()}


def big() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(20)))
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def test_loading_takes_no_second_copy(tmp_path):
    model, optimizer = big()
    model(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    path = save(tmp_path, model, optimizer)
    values = read_values(path)
    other, fresh = big()
    peak = PeakBytes(torch.device("cpu"), list(other.parameters()))
    with peak:
        load_training_state(path, values, other, fresh)
    weight = 4 * 256 * 256
    # Weights are there, the state's 2 are made; the next tensor is read before the last is freed.
    assert peak.bytes < (20 * 3 + 3) * weight


def test_state_is_read_without_the_model(tmp_path):
    """By torch alone, as any program may."""
    import torch.distributed.checkpoint as dcp

    cell = Cell("folded", "exact", EXECUTORS["eager"], None)
    training = cell.build().train(0)
    path = save(tmp_path, training.model, training.optimizer)
    values = torch.load(path / "values.pt", weights_only=True)
    assert values["groups"][0]["layer"] == "up"
    name = "optimizer.up.weight.exp_avg"
    (state,) = [s for p, s in training.optimizer.state.items() if p is training.model.up.weight]
    wanted = {name: torch.zeros_like(state["exp_avg"])}
    dcp.load(wanted, checkpoint_id=path / "tensors", no_dist=True)
    assert torch.equal(wanted[name], state["exp_avg"])


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_parameters_that_were_frozen_during_the_training(form, tmp_path):
    """Their trained values are in the checkpoint; frozen too early, they are named."""
    cell = Cell(form, "float32", EXECUTORS["eager"], None)
    training = cell.build().train(0, 1)
    training.model.up.requires_grad_(False)
    training.train(2)
    path = save(tmp_path, training.model, training.optimizer)
    other = cell.build()
    with torch.no_grad():
        for parameter in other.trained.values():
            parameter.zero_()
    other.model.up.requires_grad_(False)
    with pytest.raises(DamagedError, match=r"in 2 tensors: model.up.bias is frozen in the model"):
        load(path, other.model, other.optimizer)
    other.model.up.requires_grad_(True)
    load(path, other.model, other.optimizer)
    other.model.up.requires_grad_(False)
    assert_same_bits(training.bits(), other.bits())
    assert_same_bits(training.train(3).bits(), other.train(3).bits())


@pytest.mark.parametrize("change", ["rank", "layer", "missing"])
def test_other_model_is_refused(change, tmp_path):
    cell = Cell("folded", "float32", EXECUTORS["eager"], None)
    training = cell.build().train(0)
    path = save(tmp_path, training.model, training.optimizer)
    options = {"ranks": (2, 4)} if change == "rank" else {}
    options |= {"exclude_modules": ("up",)} if change == "layer" else {}
    other = cell.build(**options)
    if change == "missing":
        other.model.up.weight.requires_grad_(False)
    with pytest.raises((DamagedError, ValueError), match=r"other parameters|Cannot load|differ in"):
        load(path, other.model, other.optimizer)


def test_code_in_the_metadata_is_not_run(tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    model = nn.Linear(2, 2)
    path = save(tmp_path, model, torch.optim.SGD(model.parameters()))
    (path / "tensors" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DamagedError, match="mkdir is not allowed"):
        load(path, model, torch.optim.SGD(model.parameters()))
    assert not (tmp_path / "made").exists()


def test_bits_of_every_dtype(tmp_path):
    from molf.checkpoint.tensors import read_tensors, stored_tensors, write_tensors

    made: dict[str, Tensor] = {
        str(dtype): torch.randint(-100, 100, (3, 4)).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.int16, torch.uint8, torch.bool)
    }
    made |= {"empty": torch.zeros(0, 4), "one": torch.tensor(float("nan"))}
    made["view"] = torch.arange(12.0).view(3, 4)[:, 1:3]
    write_tensors(tmp_path, made)
    assert {n: x[0] for n, x in stored_tensors(tmp_path).items()} == {
        n: x.shape for n, x in made.items()
    }
    targets = {name: torch.full_like(tensor, 1) for name, tensor in made.items()}
    read_tensors(tmp_path, targets)
    assert_same_bits(made, targets)
