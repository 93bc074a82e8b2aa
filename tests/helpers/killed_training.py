"""A small training that goes on from its newest checkpoint, to be killed at any moment."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer of a process would import it, which takes a second
from torch import nn

from molf import MoLFAdamW, MoLFConfig
from molf.checkpoint.random_state import random_state, set_random_state
from molf.checkpoint.states import load_training_state, training_state
from molf.checkpoint.store import newest_checkpoint, read_values
from molf.checkpoint.writer import CheckpointWriter, Snapshot


def build() -> tuple[nn.Module, MoLFAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 96), nn.Dropout(0.1), nn.GELU(), nn.Linear(96, 64, bias=False)
    ).bfloat16()
    config = MoLFConfig(ranks=(2, 4), score="fresh")
    return model, MoLFAdamW.from_model(model, config, lr=1e-2)


def die_at(number: int) -> None:
    """Kill this process at one of its operations on files, counted from now."""
    count = 0

    def dying(act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*given, **named)

        return counted

    for module, name in (
        (os, "fsync"),
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (hashlib, "file_digest"),
        (shutil, "rmtree"),
    ):
        setattr(module, name, dying(getattr(module, name)))


def train(
    folder: Path, steps: int, *, in_background: bool = False, dies_at: int | None = None
) -> None:
    """Train to the end, with a checkpoint after each step, and write the bits of the end.

    Args:
        folder: Its checkpoints, and `end.pt`.
        steps: Number of steps of the whole training.
        in_background: Whether checkpoints are written while it continues.
        dies_at: Number of the operation on files at which it is killed.
    """
    torch.set_num_threads(1)
    if dies_at is not None:
        die_at(dies_at)
    model, optimizer = build()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps + 1))
    losses: list[float] = []
    newest = newest_checkpoint(folder)
    if newest is not None:
        values = read_values(newest)
        load_training_state(newest, values["optimizer"], model, optimizer)
        scheduler.load_state_dict(values["scheduler"])
        losses = values["losses"]
        set_random_state(values["random"])
    writer = CheckpointWriter(lambda: folder, keep=2, in_background=in_background)
    for step in range(len(losses), steps):
        data = torch.randn(8, 64).bfloat16()
        loss = (model(data) - data).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        tensors, values = training_state(model, optimizer)
        values = {
            "optimizer": values,
            "scheduler": scheduler.state_dict(),
            "losses": losses,
            "random": random_state(),
        }
        writer.write(Snapshot(step + 1, tensors, values))
    writer.wait()
    tensors, values = training_state(model, optimizer)
    torch.save({"tensors": tensors, "values": values, "losses": losses}, folder / "end.pt")
