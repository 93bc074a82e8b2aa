"""The directory of a run: made fresh, never taken from an earlier run without being told to."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from molf.errors import InputError
from molf.paths import check_path, check_unicode
from molf.train.ownership import A_RUN, Ownership
from molf.train.room import existing

_LONGEST_NAME = 200  # bytes; names beside it are longer than it, and systems allow 255


def check_output(
    path: Path, *, overwrite: bool, ownership: Ownership = A_RUN, renames: bool = False
) -> None:
    """Check that a run may be written to `path`, without writing anything.

    Args:
        path: The directory.
        overwrite: Whether the user allowed an earlier run there to be replaced.
        ownership: What an earlier directory must be, to be ours to replace.
        renames: Whether the directory is made beside its place, so that the one above is written.

    Raises:
        InputError: There is something that must not be replaced, or the place cannot be written.
    """
    check_path(path, "output_dir")
    check_unicode(path, "output_dir")
    length = len(os.fsencode(path.name))
    if length > _LONGEST_NAME:
        raise InputError(
            f"output_dir {path.name[:50]}... has a name of {length} bytes. Must be at most "
            f"{_LONGEST_NAME}."
        )
    if path.exists():
        if not path.is_dir():
            raise InputError(f"output_dir {path} is a file. Give a directory that is new or empty.")
        if any(path.iterdir()):
            fault = ownership.fault(path)
            if not overwrite and fault is None:
                raise InputError(
                    f"output_dir {path} exists and is not empty. Give --overwrite to replace it, "
                    "or another --output_dir."
                )
            if not overwrite:
                raise InputError(
                    f"output_dir {path} exists and is not empty, and is not {ownership.what} alone "
                    f"({fault}), so --overwrite would not replace it either. Give another "
                    "--output_dir."
                )
            if fault is not None:
                raise InputError(
                    f"output_dir {path} is not {ownership.what} alone ({fault}), so --overwrite "
                    "does not replace it. Give another --output_dir."
                )
    place = existing(path.absolute().parent if renames else path)
    if not place.is_dir():
        raise InputError(f"output_dir {path} cannot be made: {place} is not a directory.")
    _check_writable(place, f"output_dir {path}")


def check_fallback(path: Path | None) -> None:
    """Check that weights could be kept in a directory, without leaving anything there.

    Raises:
        InputError: It is no directory, or cannot be written.
    """
    if path is None:
        return
    if not path.is_dir():
        raise InputError(f"fallback_dir {path} is not a directory. Give one that is there.")
    _check_writable(path, f"fallback_dir {path}")


def _check_writable(place: Path, given: str) -> None:
    try:
        # Permissions do not tell (read-only file systems, /proc): only trying does.
        tempfile.TemporaryDirectory(dir=place, prefix=".molf-").cleanup()
    except OSError as error:
        raise InputError(f"{given} cannot be written: {place}: {error.strerror}.") from error


class RunDirectory:
    """A run's directory, made when the run starts.

    An earlier run that it replaces is moved aside and deleted only by `complete()`, so that a run
    that fails costs nothing that was there before.

    Attributes:
        path: The directory.
        replaced: Where the earlier run is kept meanwhile, or None.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        check_output(path, overwrite=overwrite)
        self.path = path
        self.replaced: Path | None = None
        try:
            if path.is_dir() and any(path.iterdir()):
                self.replaced = path.rename(_unused_name(path))
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._restore()
            raise InputError(f"output_dir {path} cannot be made: {error.strerror}.") from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def complete(self) -> None:
        """Delete the earlier run, now that this one is whole."""
        if self.replaced is not None:
            shutil.rmtree(self.replaced)
            self.replaced = None

    def discard(self) -> None:
        """Delete this run, which has nothing worth keeping, and bring the earlier one back."""
        shutil.rmtree(self.path)
        self._restore()

    def _restore(self) -> None:
        if self.replaced is not None:
            self.replaced.rename(self.path)


def _unused_name(path: Path) -> Path:
    number = 0
    while True:
        number += 1
        candidate = path.with_name(f"{path.name}.replaced-{number}")
        if not candidate.exists():
            return candidate
