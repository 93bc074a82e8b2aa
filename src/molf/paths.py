"""What can be said of a path that a user gave, before anything is read or written there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from molf.errors import InputError

_SHOWN = 120  # characters of a path in a message


def check_path(path: str | Path, what: str) -> None:
    """Make sure that the system can be asked about a path at all, whether it exists or not.

    Args:
        path: The path.
        what: The option or argument that it was given by, for the message.

    Raises:
        InputError: It is too long, or holds a null byte.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # for whoever reads or writes there to say
    except (OSError, ValueError) as error:
        text = str(path).replace("\0", "\\0")
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{what} {shown} is not a path: {reason}.") from error


def check_unicode(path: str | Path, what: str) -> None:
    """Refuse a path of a model that safetensors and tokenizers could not open.

    Args:
        path: The path.
        what: The option or argument that it was given by, for the message.

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
    """A path with `~` or `~user` at its beginning replaced by that home directory.

    Raises:
        InputError: There is no such home directory, nor anything here that is called so.
    """
    given = os.fspath(path)
    found = os.path.expanduser(given)  # unlike Path's own, it leaves unknown users alone
    if found == given and given.startswith("~") and not os.path.lexists(given):
        home = given.partition("/")[0]
        raise InputError(f"{given}: no home directory is known for {home}. Give the whole path.")
    return Path(found)


def settled(path: Path) -> Path:
    """The place that a path to be written means: `~` expanded, no link at its end, with a name.

    Raises:
        InputError: There is no such home directory.
    """
    path = expanded(path)
    if path.is_symlink() or path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return path


def absolute(source: str) -> str:
    """A source as it reads from any directory: what exists here becomes an absolute path."""
    path = expanded(source) if source.startswith("~") else source
    if source.startswith("~") or os.path.exists(path):
        return os.path.abspath(path)
    return source  # a Hub id, a URL, or nothing: whoever reads it says so


def is_within(path: str | Path, directory: Path) -> bool:
    """Whether a path, links followed, is a directory or lies in it."""
    place = os.path.realpath(directory)
    try:
        return os.path.commonpath([os.path.realpath(expanded(path)), place]) == place
    except ValueError:  # on another drive, or no path
        return False


def check_inputs_outside(directory: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse to replace a directory that holds what is to be read.

    Args:
        directory: What is to be replaced.
        inputs: Sources by the option that they were given by; those that are no path pass.

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
