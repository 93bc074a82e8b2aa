"""`molf train` in a process that kills itself at a chosen moment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from molf.checkpoint import writer
from molf.cli import main
from molf.job import evaluating, trained_model
from molf.job.trainer.trainer import Trainer

# Where a process dies: before a call, or after it.
MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "step": (Trainer, "training_step", False),
    "checkpoint": (writer, "write_tensors", True),  # its files are there, under a temporary name
    "evaluation": (evaluating, "evaluate", False),
    "saving": (trained_model, "save_model", False),
    "saved": (trained_model, "save_model", True),  # nothing records that it is saved
}


def run(
    arguments: Sequence[str],
    errors: Path,
    moment: str | None = None,
    number: int = 1,
    signal_number: int = signal.SIGKILL,
) -> None:
    """Run a command; end with its exit code, or by the signal.

    Args:
        arguments: Those of `molf`.
        errors: File for standard error.
        moment: One of `MOMENTS`; None for no signal.
        number: In which call of it, from 1.
        signal_number: The signal that the process sends itself.
    """
    torch.set_num_threads(1)
    sys.stderr = errors.open("w", buffering=1, encoding="utf-8")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    # A shell may have started the tests with signals ignored, as nohup and background jobs are.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if moment is not None:
        interrupt(moment, number, signal_number)
    code = main(list(arguments))
    sys.stderr.flush()
    os._exit(code)


def interrupt(moment: str, number: int = 1, signal_number: int = signal.SIGKILL) -> None:
    """Have this process send itself a signal at a moment."""
    owner, name, is_after = MOMENTS[moment]
    setattr(owner, name, _interrupted(getattr(owner, name), number, signal_number, is_after))


def _interrupted(
    act: Callable[..., Any], number: int, signal_number: int, is_after: bool
) -> Callable[..., Any]:
    count = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if is_after:
            result = act(*given, **named)
        if count == number:
            os.kill(os.getpid(), signal_number)
        return result if is_after else act(*given, **named)

    return counted
