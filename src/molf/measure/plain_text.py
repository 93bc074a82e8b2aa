"""The plain text for `forgetting_loss`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from molf.errors import InputError
from molf.inputs import read_input


def default_plain_text() -> str:
    """Return the English prose shipped with the package: everyday and expository passages.

    It was written for molf, so models older than molf were not pre-trained on it.
    """
    return files("molf.measure").joinpath("plain_text.txt").read_text(encoding="utf-8")


def read_plain_text(path: str | Path) -> str:
    """Read a UTF-8 text file to measure forgetting on.

    Raises:
        InputError: The file is missing, unreadable, not UTF-8, or blank.
    """
    shown = f"forgetting_data: {path}"
    try:
        text = read_input(path, shown).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is not UTF-8 text (byte {error.start}).") from error
    if not text.strip():
        raise InputError(f"forgetting_data: {path} is empty; a plain text is needed.")
    return text
