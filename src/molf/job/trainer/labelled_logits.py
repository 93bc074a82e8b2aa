"""Compute the logits of labelled tokens alone, also on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.trainer import utils

_CHOICE = "_use_triton"  # a private name of TRL; without it, TRL's own choice stays


@contextmanager
def labelled_logits() -> Iterator[None]:
    """Let TRL's loss skip tokens without label on a CPU, as it does on a GPU.

    TRL computes the logits of every token where there is no Triton, because some accelerators
    compile anew for every number of tokens. A CPU does not. With 32 of 272 tokens labelled, the
    forward and backward pass of a 135M-parameter model takes 15% less time (one thread). Loss and
    gradients stay the same sums, without terms that are 0.
    """
    chosen = getattr(utils, _CHOICE, None)
    if chosen is None:
        yield
        return

    def skips(device: torch.device) -> bool:
        return device.type == "cpu" or bool(chosen(device))

    setattr(utils, _CHOICE, skips)
    try:
        yield
    finally:
        setattr(utils, _CHOICE, chosen)
