"""Check and expand paths that a user gave, before anything is read or written there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from molf.errors import InputError

_SHOWN = 120  # characters of a path in a message


def check_path(path: str | Path, what: str) -> None:
    """Reject a path that the system cannot look up: too long, or with a null byte.

    Args:
        path: The path; it need not exist.
        what: The option or argument that gave it, for the message.

    Raises:
        InputError: It is too long, or holds a null byte.
    """
    try:
        # A look-up without following links or opening anything.
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # reported where the path is read or written
    except (OSError, ValueError) as error:
        text = str(path).replace("\0", "\\0")
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{what} {shown} is not a path: {reason}.") from error


def check_unicode(path: str | Path, what: str) -> None:
    """Reject a model path that is not UTF-8: safetensors and tokenizers cannot open it.

    Args:
        path: The path.
        what: The option or argument that gave it, for the message.

    Raises:
        InputError: It has bytes that are not UTF-8.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} {path} has bytes that are not UTF-8, and safetensors cannot open such a path. "
            "Rename it, or give another."
        ) from error


def expanded(path: str | Path) -> Path:
    """Return the path with a leading `~` or `~user` replaced by that home directory.

    Raises:
        InputError: No such home directory is known, and no file has that name.
    """
    given = os.fspath(path)
    found = os.path.expanduser(given)  # Path.expanduser raises an error for an unknown user
    if found == given and given.startswith("~") and not os.path.lexists(given):
        home = given.partition("/")[0]
        raise InputError(f"{given}: no home directory is known for {home}. Give the whole path.")
    return Path(found)


def settled(path: Path) -> Path:
    """Return a path to write to: `~` expanded, a link at its end followed, with a name.

    Raises:
        InputError: There is no such home directory.
    """
    path = expanded(path)
    # The directory is renamed when it is replaced, which needs its real name.
    if path.is_symlink() or path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return path


def absolute(source: str) -> str:
    """Return a source that is valid from any directory: an existing path becomes absolute."""
    path = expanded(source) if source.startswith("~") else source
    if source.startswith("~") or os.path.exists(path):
        return os.path.abspath(path)
    return source  # a Hub id, a URL, or missing: reported where it is read


def is_within(path: str | Path, directory: Path) -> bool:
    """Return whether a path, links followed, is the directory or lies in it."""
    place = os.path.realpath(directory)
    try:
        return os.path.commonpath([os.path.realpath(expanded(path)), place]) == place
    except ValueError:  # on another drive, or no path
        return False


def check_inputs_outside(directory: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Reject an output directory whose replacement would delete an input.

    Args:
        directory: The directory to be replaced.
        inputs: Sources by option. A source that is no existing path passes.

    Raises:
        InputError: One of them is the directory, or lies in it.
    """
    for option, source in inputs.items():
        if source is None or not os.path.exists(expanded(source)):
            continue  # such as a Hub id
        if is_within(source, directory):
            raise InputError(
                f"{option} {source} lies in output_dir {directory}, which --overwrite would "
                "delete. Give another --output_dir."
            )
