"""A checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from molf.errors import InputError


def load_tokenizer_and_limit(model: str, max_length: int) -> tuple[Any, int]:
    """Load a tokenizer, and the longest example that its model takes.

    Args:
        model: A directory or a Hub id.
        max_length: The longest example that the settings allow, in tokens.

    Raises:
        InputError: The tokenizer or the configuration cannot be loaded.
    """
    from molf.evaluate.inference import position_limit

    path = Path(model).expanduser()
    name = str(path) if path.is_dir() else model
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"model {model} cannot be loaded: {reason}") from error
    return tokenizer, min(max_length, position_limit(config) or max_length)
