"""A checkpoint's configuration, and where the checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from molf.errors import InputError


def place_of(model: str) -> str:
    """Return a model as transformers takes it: the path of a directory, or a Hub id."""
    path = Path(model).expanduser()
    return str(path) if path.is_dir() else model


def read_config(model: str) -> Any:
    """Read the transformers configuration of a directory or a Hub id.

    Raises:
        InputError: There is none, or its values are wrong.
    """
    try:
        return AutoConfig.from_pretrained(place_of(model), trust_remote_code=False)
    except Exception as error:  # configurations check their values in ways of their own
        raise not_loaded(model, error) from error


def not_loaded(model: str, error: Exception) -> InputError:
    """An error in one line, for what is raised when a checkpoint is loaded."""
    lines = str(error).strip().split("\n")
    reason = lines[0] or type(error).__name__
    if reason.endswith(":") and len(lines) > 1:
        reason = f"{reason} {lines[1].strip()}"
    return InputError(f"model {model} cannot be loaded: {reason}")
