"""Options of short trainings that keep no model: a probe, a range test of rates."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from molf.errors import InputError
from molf.job.settings.settings import TrainSettings

# Checkpoints are off without a warning: every run's config.yaml has this option.
NO_CHECKPOINTS: dict[str, Any] = {"save_minutes": 0.0}
# Options of the model that is not saved, and of checkpoints; with their defaults.
NO_MODEL: dict[str, Any] = {
    "keep_low_halves": False,
    "save_dtype": None,
    "save_rounding": None,
    "save_steps": None,
    "save_total_limit": None,
    "async_save": False,
    "keep_best": False,
}


def check_short(settings: TrainSettings, what: str) -> None:
    """Refuse options of whole runs.

    Args:
        settings: The options, as given.
        what: The short training, such as "a probe".

    Raises:
        InputError: `dry_run` or `resume` is given.
    """
    if settings.dry_run:
        raise InputError(f"Invalid dry_run of {what}. Give fewer --max_steps, or leave it out.")
    if settings.resume:
        raise InputError(f"Invalid resume of {what}, which keeps no checkpoints. Leave it out.")


def warn_of_unused(settings: TrainSettings, unused: Mapping[str, Any], what: str) -> None:
    """Warn if options without effect are given.

    Args:
        settings: The options, as given.
        unused: The defaults of those without effect, by name.
        what: The short training, such as "a probe".

    Warns:
        UserWarning: One of them was given.
    """
    given = [name for name, default in unused.items() if getattr(settings, name) != default]
    if given:
        warnings.warn(f"Without effect in {what}: {', '.join(given)}.", stacklevel=4)
