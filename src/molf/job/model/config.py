"""Find a checkpoint, and read and check its configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from molf.errors import InputError
from molf.paths import expanded


def place_of(model: str) -> str:
    """Return the expanded path of a directory, or the Hub id, for transformers."""
    path = expanded(model)
    return str(path) if path.is_dir() else model


def read_config(model: str) -> Any:
    """Read the transformers configuration of a directory or a Hub id.

    Raises:
        InputError: The configuration is missing, or its values are wrong.
    """
    try:
        return AutoConfig.from_pretrained(place_of(model), trust_remote_code=False)
    except Exception as error:  # checks of configurations raise errors of many types
        raise not_loaded(model, error) from error


def check_generation_config(model: str) -> None:
    """Reject a broken generation configuration.

    Args:
        model: A directory, or a Hub id, whose file is downloaded.

    Raises:
        InputError: The file is no JSON object.
    """
    # transformers would silently use a default one instead.
    file = cached_file(
        place_of(model),
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return
    try:
        given = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"model {model}: {GENERATION_CONFIG_NAME} is broken: {error}. Copy or download it "
            "again, or delete it."
        ) from error
    if not isinstance(given, dict):
        raise InputError(
            f"model {model}: {GENERATION_CONFIG_NAME} is broken: it is a {type(given).__name__} "
            "and must be a JSON object. Copy or download it again, or delete it."
        )


def check_token_ids(model: str, generation: Any) -> None:
    """Reject a generation configuration whose special tokens are not ids.

    Args:
        model: The checkpoint, for messages.
        generation: The configuration; None for a model without one.

    Raises:
        InputError: A value is neither a whole number nor a list of them.
    """
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        given = getattr(generation, name, None)
        ids = given if isinstance(given, list) else [given]
        # By type, because `isinstance(True, int)` is true.
        if given is not None and not all(type(one) is int for one in ids):
            raise InputError(
                f"model {model}: {name} is {given!r} in its generation configuration. Must be a "
                "whole number, or a list of them."
            )


def not_loaded(model: str, error: Exception) -> InputError:
    """Return an InputError of one line for an error raised while a checkpoint is loaded."""
    lines = str(error).strip().split("\n")
    reason = lines[0] or type(error).__name__
    # huggingface_hub's validation puts the reason on the second line.
    if reason.endswith(":") and len(lines) > 1:
        reason = f"{reason} {lines[1].strip()}"
    return InputError(f"model {model} cannot be loaded: {reason}")
