"""The command of the training that follows a probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from molf.job.settings.probe import ProbeSettings
from molf.job.settings.resolved import without_effect
from molf.job.settings.settings import TrainSettings

_METHOD = "hybrid"
# Options of the probe that the training does not have; it has all others that were given.
OF_THE_PROBE = frozenset(
    (
        # The assignment has them: the layers, their ranks and scalings, and the rest.
        *("method", "assignment", "use_rslora", "freeze_rest"),
        *without_effect(_METHOD),
        # Storage and steps of the probe, which have defaults of its own.
        *ProbeSettings.__annotations__,
        "grad_accumulation_dtype",  # needs bfloat16 weights, which the training need not have
        # Its directory.
        *("output_dir", "overwrite", "resume", "dry_run"),
    )
)


def training_command(given: Mapping[str, Any], directory: Path) -> list[str]:
    """Return the words of the command, with the same data, batches and rates as the probe.

    Args:
        given: The options that the probe was given, by name.
        directory: Directory of the probe.
    """
    defaults = TrainSettings()
    words = ["molf", "train"]
    for option in fields(TrainSettings):
        name, value = option.name, given[option.name]
        if name not in OF_THE_PROBE and value is not None and value != getattr(defaults, name):
            words += _words(f"--{name}", value)
    return [*words, "--method", _METHOD, "--assignment", str(directory)]


def _words(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option] if value else [option, "false"]
    if isinstance(value, Mapping):
        return [word for name, one in value.items() for word in _words(f"{option}.{name}", one)]
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    # A value with a hyphen would be read as an option.
    return [f"{option}={text}"] if text.startswith("-") else [option, text]
