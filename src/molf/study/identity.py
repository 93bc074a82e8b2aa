"""The identity of a trial: hashes of its place, its options, and the contents of local inputs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from molf.job.record.contents import contents_of, short_hash
from molf.job.settings.settings import TrainSettings

# Options without effect on the results of a trial.
_NOT_IDENTITY = (
    *("output_dir", "overwrite", "resume", "fallback_dir", "report_to", "dry_run"),
    *("save_steps", "save_minutes", "save_total_limit", "async_save", "on_save_error"),
    *("dataset_num_proc", "token_cache"),
)


def settings_key(settings: TrainSettings, more: Any = None) -> str:
    """Return a hash of the options that differ from their defaults; equal keys are equal trainings.

    Local data and models count by their contents, so that their place is free. New options of later
    releases leave the hash unchanged.

    Args:
        settings: The options.
        more: Anything else that belongs to the identity, as JSON values.
    """
    defaults = {option.name: option.default for option in fields(TrainSettings)}
    given = {
        name: value
        for name, value in vars(settings).items()
        if name not in _NOT_IDENTITY and value != defaults.get(name) and value != {}
    }
    return short_hash([given | contents_of(given), more])


def trial_key(place: tuple[str, str, str, int | None, int], settings: str) -> str:
    """Return the identity of a planned trial.

    Args:
        place: Cell, method, phase, number of the point, seed. The number is None for points of a
            grid: their rates, part of the settings, tell them apart.
        settings: The result of `settings_key`.
    """
    return short_hash([place, settings])
