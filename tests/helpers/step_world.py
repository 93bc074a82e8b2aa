"""Two processes that share a small model, with different numbers of forward passes in each."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from forked import start_forked
from molf.measure.sharing import in_step, split_over
from molf.ranks import connect

PASSES = (5, 2)


class Model(nn.Module):
    """Two layers; it counts its passes, and one of them may fail in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.passes, self.failing = 0, 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        hidden = self.first(values)
        if self.passes == self.failing:
            raise ValueError("in the middle")
        return self.second(hidden)


def start(folder: str) -> list[dict[str, Any]]:
    """Run both processes; return what each has come to."""
    start_forked(run, (folder,), 2)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    with split_over(connect(timedelta(minutes=2))):
        for scenario in (different_numbers, failing_between, failing_within):
            model = Model()
            fully_shard(model.first, mesh=mesh)
            fully_shard(model.second, mesh=mesh)
            fully_shard(model, mesh=mesh)
            found[scenario.__name__] = scenario(rank, model)
            torch.save(found, f"{folder}/{rank}.pt")
    os._exit(0)  # the group has lost a process


def idle(model: Model) -> None:
    model(torch.zeros(1, 4))


def different_numbers(rank: int, model: Model) -> dict[str, Any]:
    """Results of the passes, and their number with the idle ones."""
    results = []

    def act() -> None:
        for number in range(PASSES[rank]):
            rows = number + 1  # passes of one step have different shapes
            results.append(model(torch.full((rows, 4), float(number))).detach())

    in_step(model, act, lambda: idle(model))
    return {"results": results, "passes": model.passes}


def error_of(rank: int, model: Model, act: Any) -> str:
    try:
        in_step(model, act, lambda: idle(model))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def failing_between(rank: int, model: Model) -> str:
    """The error of a process that fails after a pass, while the other has four to go."""

    def act() -> None:
        for number in range(5):
            if (rank, number) == (1, 1):
                raise ValueError("between passes")
            idle(model)

    return error_of(rank, model, act)


def failing_within(rank: int, model: Model) -> str:
    """The error of a process that fails in a pass and ends, and that of the other."""
    model.failing = 2 if rank == 1 else 0

    def act() -> None:
        for _ in range(5):
            idle(model)

    return error_of(rank, model, act)
