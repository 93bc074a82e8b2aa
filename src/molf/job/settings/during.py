"""Options that act during a training, and their checks."""

from __future__ import annotations

from typing import Any

from molf.errors import InputError
from molf.inputs import check_choice

EVAL_STRATEGIES = ("no", "steps", "epoch")
"""When a training is evaluated; the names of transformers."""

BY_LOSS = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the loss of an evaluation instead of the steps."""


def eval_strategy_of(settings: Any) -> str:
    """Return when the training is evaluated: one of `EVAL_STRATEGIES`."""
    if settings.eval_strategy is None:
        return "no" if settings.eval_steps is None else "steps"
    return str(settings.eval_strategy)


def check_during(settings: Any) -> None:
    """Check the evaluations during the training, and the options that need them.

    Raises:
        InputError: They exclude each other, or a needed evaluation is missing.
    """
    check_choice("eval_strategy", settings.eval_strategy, (None, *EVAL_STRATEGIES))
    strategy = eval_strategy_of(settings)
    if settings.validation_data is not None and strategy == "no":
        raise InputError(
            "Invalid validation_data without evaluations in the training. Give --eval_steps, or "
            "--eval_strategy epoch; --eval_data is measured before and after the training."
        )
    if settings.eval_steps is not None and strategy != "steps":
        raise InputError(
            f"Invalid eval_steps={settings.eval_steps} with eval_strategy={strategy}: only "
            "eval_strategy=steps counts steps. Leave one of the two out."
        )
    if strategy != "no":
        return
    needing = [
        name
        for name, is_given in (
            ("keep_best", settings.keep_best),
            ("early_stopping_patience", settings.early_stopping_patience is not None),
            (f"lr_scheduler_type={settings.lr_scheduler_type}", _follows_loss(settings)),
        )
        if is_given
    ]
    if needing:
        raise InputError(
            f"Invalid {needing[0]} without evaluations in the training. Give --eval_steps, or "
            "--eval_strategy epoch."
        )


def _follows_loss(settings: Any) -> bool:
    return bool(settings.lr_scheduler_type in BY_LOSS)
