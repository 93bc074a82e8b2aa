"""Load and test a checkpoint's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from molf.errors import InputError, reason_of
from molf.job.model.config import place_of, read_config

# Parts of the names of files that hold a vocabulary.
_VOCABULARIES = ("tokenizer.", "vocab", "spiece", "sentencepiece", "tekken", "tiktoken", "merges")
_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Several scripts, as a tokenizer for one script or for DNA may lack all other characters.
_TRIED = "The year 1984: ACGT, мир, 世界, سلام, नमस्ते."


def load_tokenizer_and_limit(model: str, max_length: int) -> tuple[Any, int]:
    """Load a tokenizer; return it with the longest example that model and settings allow.

    Args:
        model: A directory or a Hub id.
        max_length: The limit of the settings, in tokens.

    Raises:
        InputError: The tokenizer or the configuration cannot be loaded.
    """
    from molf.measure.inference import position_limit

    limit = position_limit(read_config(model))
    return load_tokenizer(model), min(max_length, limit or max_length)


def load_tokenizer(model: str) -> Any:
    """Load a tokenizer, and check that it encodes text.

    Args:
        model: A directory or a Hub id.

    Raises:
        InputError: There is no tokenizer, a file is broken, or it returns no tokens for text.
    """
    name = place_of(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokens = tokenizer(_TRIED, add_special_tokens=False)["input_ids"]
    except Exception as error:  # the type depends on the library that reads the files
        broken = _broken_file(Path(name))
        raise InputError(
            f"model {model}: its tokenizer cannot be loaded: {broken or reason_of(error)}"
        ) from error
    if not tokens:
        kind = type(tokenizer).__name__
        raise InputError(
            f"model {model}: its tokenizer ({kind}, {len(tokenizer)} tokens) gives no tokens for "
            f"text. {_why(Path(name))}"
        )
    return tokenizer


def _broken_file(directory: Path) -> str | None:
    """Return which file of a local tokenizer is missing or broken; None if none is."""
    files = [path.name for path in directory.iterdir()] if directory.is_dir() else None
    if files is not None and not any(part in name for name in files for part in _VOCABULARIES):
        return "the directory has no tokenizer.json. Copy the tokenizer's files into it."
    whole = directory / "tokenizer.json"
    if whole.is_file():
        try:
            PreTrainedTokenizerFast(tokenizer_file=str(whole))
        except Exception as error:  # tokenizers raises plain exceptions
            return f"{whole.name} is broken: {str(error).strip()}"
    for name in _JSON_FILES:
        if (path := directory / name).is_file():
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                return f"{name} is broken: {error}"
    return None


def _why(directory: Path) -> str:
    """Return advice for a tokenizer that returns no tokens."""
    if directory.is_dir() and not (directory / "tokenizer.json").is_file():
        return "The directory has no tokenizer.json: copy the tokenizer's files into it."
    return "Its files are not those of a trained tokenizer."
