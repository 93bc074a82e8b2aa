"""Options that act during a training, and their checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from molf.errors import InputError

if TYPE_CHECKING:
    from molf.job.settings.settings import TrainSettings

BY_LOSS = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the loss of an evaluation instead of the steps."""


def check_during(settings: TrainSettings) -> None:
    """Check the schedule against the evaluations that it needs.

    Raises:
        InputError: It needs an evaluation during the training.
    """
    if settings.lr_scheduler_type in BY_LOSS:
        raise InputError(
            f"Invalid lr_scheduler_type={settings.lr_scheduler_type}: it follows evaluations in "
            "the training, which a run does not make. Give another."
        )
