"""Create and lock the directory of a run; an earlier run is replaced only with `--overwrite`."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from molf.disk.files import clear_unfinished, is_unfinished
from molf.disk.locks import InUseError, Lock, in_use
from molf.disk.room import check_writable, nearest_existing
from molf.errors import InputError
from molf.job.record.ownership import A_RUN, CONFIG, Ownership, is_run, run_of_part
from molf.paths import check_path, check_unicode
from molf.ranks import Ranks

_SHOWN_WITHIN = 60.0  # seconds
_LONGEST_NAME = 200  # bytes; temporary names beside it are longer, and the limit is 255


def check_output(
    path: Path,
    *,
    overwrite: bool,
    resume: bool = False,
    ownership: Ownership = A_RUN,
    renames: bool = False,
) -> None:
    """Check that a run may be written to `path`, without writing anything.

    Args:
        path: The directory.
        overwrite: Whether an earlier run there may be replaced.
        resume: Whether the run there is continued; other files in it stay.
        ownership: The kind of directory that may be replaced.
        renames: Whether the directory is written beside `path` and renamed, so that its parent
            must be writable.

    Raises:
        InputError: The directory must not be replaced, is in use, or cannot be written.
    """
    check_path(path, "output_dir")
    check_unicode(path, "output_dir")
    length = len(os.fsencode(path.name))
    if length > _LONGEST_NAME:
        raise InputError(
            f"output_dir {path.name[:50]}... has a name of {length} bytes. Must be at most "
            f"{_LONGEST_NAME}."
        )
    _check_not_in_use(path)
    _check_no_part(path)
    if path.exists() and resume:
        _check_is_run(path)
    elif path.exists():
        _check_content(path, overwrite=overwrite, ownership=ownership)
    place = nearest_existing(path.absolute().parent if renames else path)
    if not place.is_dir():
        raise InputError(f"output_dir {path} cannot be made: {place} is not a directory.")
    check_writable(place, f"output_dir {path}")


def check_fallback(path: Path | None) -> None:
    """Check that the fallback directory can be written.

    Raises:
        InputError: It is no directory, or cannot be written.
    """
    if path is None:
        return
    if not path.is_dir():
        raise InputError(f"fallback_dir {path} is not a directory. Give one that exists.")
    check_writable(path, f"fallback_dir {path}")


def _check_not_in_use(path: Path) -> None:
    """Reject a directory that another process uses, or that is inside a running run."""
    if in_use(path):
        raise InputError(_in_use(path))
    for parent in path.absolute().parents:
        # Only directories of runs count: other programs lock directories as well.
        if (parent / CONFIG).is_file() and in_use(parent, by_writers=True):
            raise InputError(
                f"output_dir {path} lies in {parent}, where a run of molf train has not ended. "
                "Wait for its end, or give another --output_dir."
            )


def _check_no_part(path: Path) -> None:
    """Reject a directory inside a run, which --overwrite would delete with that run."""
    run = run_of_part(path)
    if run is not None:
        raise InputError(
            f"output_dir {path} lies in a part of {run}, a run of molf train that is replaced as a "
            "whole. Give another --output_dir."
        )


def _check_content(path: Path, *, overwrite: bool, ownership: Ownership) -> None:
    """Reject an existing directory, unless molf wrote all of it and `overwrite` is set."""
    if not path.is_dir():
        raise InputError(f"output_dir {path} is a file. Give a directory that is new or empty.")
    if _is_empty(path):
        return
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


def _check_is_run(path: Path) -> None:
    """Reject a directory with files that is no run to continue."""
    if not path.is_dir() or not (is_run(path) or _is_empty(path)):
        raise InputError(f"output_dir {path} is not a run of molf train, so it cannot be resumed.")


def _is_empty(path: Path) -> bool:
    """Return whether a directory has no files except temporary ones of molf."""
    return all(is_unfinished(entry.name) for entry in path.iterdir())


def _in_use(path: Path) -> str:
    return (
        f"output_dir {path} is in use: a run of molf train is writing there, or another command is "
        "reading it. --overwrite does not replace it either. Wait for the end, or give another "
        "--output_dir."
    )


@contextmanager
def locking_runs(sources: Iterable[str | Path | None]) -> Iterator[None]:
    """Lock runs that inputs are read from, so that they are not replaced during the block.

    Args:
        sources: Paths of the inputs; those outside of runs are ignored.
    """
    with ExitStack() as stack:
        for source in sources:
            if source is None:
                continue
            path = Path(os.path.abspath(os.path.expanduser(source)))
            for place in (path, *path.parents):
                if (place / CONFIG).is_file():
                    with suppress(OSError):  # locked by its own run, so it is not replaced
                        stack.enter_context(Lock(place, shared=True, wait=0))
        yield


class RunDirectory:
    """A run's directory, created when the run starts and locked until `release`.

    A replaced run is renamed first and deleted only by `complete()`, so that a failed run does not
    destroy it.

    A user may move, delete or replace the directory during the run. The run then writes to the
    moved directory, or to a new one. Therefore paths in it are computed for each write
    (`directory / NAME`), and not stored.

    Args:
        path: The directory.
        overwrite: Whether an earlier run there is replaced.
        resume: Whether the run there is continued.
        ownership: The kind of directory that is made, and that `overwrite` replaces.

    Attributes:
        path: The directory.
        replaced: The path of the renamed earlier run, or None.
        is_resumed: Whether it held an unfinished run, which this one continues.

    Raises:
        InputError: The directory must not be replaced, or cannot be written.
    """

    def __init__(
        self, path: Path, *, overwrite: bool, resume: bool = False, ownership: Ownership = A_RUN
    ) -> None:
        check_output(path, overwrite=overwrite, resume=resume, ownership=ownership)
        self.path = path
        self.is_resumed = False
        self.replaced: Path | None = None
        self._earlier: Lock | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(path)
            # Another run may have renamed the directory between `mkdir` and the lock.
            if not self._lock.is_at(path):
                raise InUseError
            # Checked again under the lock: another run may have written there since.
            if resume:
                _check_is_run(path)
                self.is_resumed = not _is_empty(path)
                clear_unfinished(path)
            else:
                _check_content(path, overwrite=overwrite, ownership=ownership)
                if not _is_empty(path):
                    self._set_aside()
        except InUseError as error:
            self._restore()
            raise InputError(f"{_in_use(path)}{self.kept()}") from error
        except OSError as error:
            self._restore()
            raise InputError(
                f"output_dir {path} cannot be made: {error.strerror}.{self.kept()}"
            ) from error
        except InputError:
            self.release()
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __truediv__(self, name: str) -> Path:
        """Return the path of a file of the run, for a write at once.

        Warns:
            UserWarning: The directory was moved, deleted or replaced.
        """
        if self._lock.is_held and not self._lock.is_at(self.path):
            self._follow()
        return self.path / name

    def complete(self) -> None:
        """Delete the earlier run, after this one is complete.

        Warns:
            UserWarning: It cannot be deleted.
        """
        if self.replaced is None:
            return
        try:
            # Not if the user has moved it, or put another directory in its place.
            if self._earlier is None or self._earlier.is_at(self.replaced):
                shutil.rmtree(self.replaced)
        except OSError as error:
            warnings.warn(
                f"The run is complete, but the earlier one was not deleted from {self.replaced}: "
                f"{error}",
                stacklevel=2,
            )
        self.replaced = None

    def discard(self) -> None:
        """Delete this run, and restore the earlier one."""
        if self._lock.is_at(self.path):
            shutil.rmtree(self.path)
        self._restore()

    def kept(self) -> str:
        """Return a sentence with the path of the earlier run; empty if there is none."""
        return f" The earlier run is kept in {self.replaced}." if self.replaced else ""

    def release(self) -> None:
        """Release the locks at the end of the run."""
        for lock in (getattr(self, "_lock", None), self._earlier):
            if lock is not None:
                lock.release()

    def _set_aside(self) -> None:
        """Rename the earlier run, and create a new directory at its path."""
        # The lock belongs to the renamed directory, which stays locked until it is deleted.
        self._earlier = self._lock
        self.replaced = self.path.rename(_unused_name(self.path, "replaced"))
        self.path.mkdir()
        self._lock = Lock(self.path)

    def _restore(self) -> None:
        if self.replaced is not None and not os.path.lexists(self.path):
            self.replaced.rename(self.path)
            self.replaced = None
        self.release()

    def _follow(self) -> None:
        """Set `path` to where the directory was moved; if it was deleted, to a new one."""
        lost, place = self.path, self._lock.place()
        if place is not None:
            self.path = place
            warnings.warn(
                f"output_dir {lost} was moved during its run: the run writes to {place} "
                "from now on.",
                stacklevel=4,
            )
            return
        try:
            # Not the old path: it may hold something new of the user's.
            self.path = _unused_name(lost, "recovered")
            self.path.mkdir(parents=True)
        except OSError:
            self.path = Path(tempfile.mkdtemp(prefix=f"{lost.name}-"))
        self._lock.release()
        self._lock = Lock(self.path)
        warnings.warn(
            f"output_dir {lost} was deleted or replaced during its run: the run writes to "
            f"{self.path} from now on, and its earlier files are not there.",
            stacklevel=4,
        )


class FollowedDirectory(RunDirectory):
    """The directory of a run in the processes that do not write it.

    Args:
        path: The directory, as rank 0 has opened it.
        is_resumed: Whether it held an unfinished run.
    """

    def __init__(self, path: Path, *, is_resumed: bool) -> None:
        self.path, self.is_resumed = path, is_resumed
        self.replaced = self._earlier = None

    def __truediv__(self, name: str) -> Path:
        """Return the path of a file of the run, to read it."""
        return self.path / name

    def complete(self) -> None:
        """Leave the earlier run to rank 0."""

    def discard(self) -> None:
        """Leave this run to rank 0."""


def open_directory(ranks: Ranks, path: Path, *, overwrite: bool, resume: bool) -> RunDirectory:
    """Create or continue the directory of a run in rank 0, and follow it in the other processes.

    Raises:
        InputError: As `RunDirectory`, or a process does not see the directory.
    """
    opened: list[RunDirectory] = []

    def open_it() -> tuple[Path, bool]:
        opened.append(RunDirectory(path, overwrite=overwrite, resume=resume))
        return opened[0].path.absolute(), opened[0].is_resumed

    place, is_resumed = ranks.on_main(open_it)
    directory = opened[0] if opened else FollowedDirectory(place, is_resumed=is_resumed)
    if not all(ranks.gather(_appears(place))):
        if opened and not is_resumed:
            directory.discard()
        raise InputError(
            f"output_dir {path} is not on a disk that all processes share: rank 0 has made it, and "
            "another does not see it. Give a directory that all machines have mounted."
        )
    return directory


def _appears(path: Path) -> bool:
    """Return whether a directory is there; network file systems may take seconds to show it."""
    until = time.monotonic() + _SHOWN_WITHIN
    while not path.is_dir():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _unused_name(path: Path, suffix: str) -> Path:
    """Return an unused name beside `path`."""
    number = 0
    while True:
        number += 1
        candidate = path.with_name(f"{path.name}.{suffix}-{number}")
        if not candidate.exists():
            return candidate
