"""Faults of one of several processes, each for `Launcher(before=...)`."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from trl import SFTTrainer

from molf.job.trainer.trainer import Trainer

NAN = float("nan")


def at_step(number: int, act: Callable[[], object]) -> None:
    """Call `act` before the forward pass of a step, from 1."""
    count = 0
    step = Trainer.training_step

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            act()
        return step(*given, **named)

    Trainer.training_step = counted  # type: ignore[method-assign]


def allow_offload() -> None:
    """Allow `fsdp_cpu_offload` on a CPU, where shards are copied from host memory to itself."""
    from molf.job import shards

    shards.check_offload = lambda device: None  # type: ignore[assignment]


def spoil(faults: Mapping[int, str]) -> None:
    """Give steps, from 1, a NaN in the "loss" alone, or in a "gradient" alone."""
    count = 0
    compute = SFTTrainer.compute_loss

    def spoiled(self: Any, model: Any, *given: Any, **named: Any) -> Any:
        nonlocal count
        loss = compute(self, model, *given, **named)
        count += 1
        if count not in faults:
            return loss
        if faults[count] == "loss":
            return loss + NAN  # gradients stay finite
        first = next(p for p in model.parameters() if p.requires_grad and p.dim() == 2)
        handle = first.register_hook(lambda grad: handle.remove() or grad * NAN)
        return loss

    SFTTrainer.compute_loss = spoiled


def kill_worker(number: int) -> None:
    """Kill the data-loader's worker at a step."""
    at_step(number, lambda: os.kill(active_children()[0].pid or 0, signal.SIGKILL))


def limit_files(first: int, last: int) -> None:
    """Let no file grow over 1 kB from one step to another."""
    for step, soft in ((first, 1000), (last, resource.RLIM_INFINITY)):
        limits = (soft, resource.RLIM_INFINITY)
        at_step(step, partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))


def fill(disk: Path) -> None:
    """Leave not a byte."""
    file = os.open(disk / "full", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while True:
            os.write(file, bytes(4096))
    except OSError:
        os.close(file)


def fill_disk(disk: Path, first: int, last: int) -> None:
    """Leave no byte on a disk from one step to another."""
    from molf.job.trainer import checkpoints

    # The estimate of the room would leave out the checkpoint.
    checkpoints.free_bytes = lambda path: None
    at_step(first, partial(fill, disk))
    at_step(last, (disk / "full").unlink)
