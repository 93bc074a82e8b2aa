"""One row per run in `results.csv`, beside the run directories."""

from __future__ import annotations

import csv
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from molf.masking import mask_text
from molf.shown import as_line
from molf.tasks.files import first_line
from molf.train.files import replacing_file

RESULTS = "results.csv"
LOCK_SECONDS = 10.0  # writing a row takes milliseconds

# Columns of every table of runs, whichever release wrote it. A table without them is not ours.
_OURS = frozenset(
    {"run", "started", "task", "method", "model", "seed", "training_loss", "peak_memory_bytes"}
)
_NAMES_TRIED = 100

_FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a formula begins with; the last four are the same in full width."""


class NotOursError(ValueError):
    """A file is no table of runs, or is damaged: it is left as it is."""


def check_results(folder: Path) -> None:
    """Say beforehand where the row of a run in a folder will be, without writing anything.

    Warns:
        UserWarning: `results.csv` is another's, or damaged, so that the row goes elsewhere; or the
            folder cannot be written, so that the run will be complete without its row.
    """
    if folder.is_dir() and not os.access(folder, os.W_OK):
        warnings.warn(
            f"{folder} cannot be written to: the run gets no row in {RESULTS}.", stacklevel=2
        )
        return
    fault = None
    for path in _tables(folder):
        try:
            _read(path)
        except NotOursError as error:
            fault = fault or error
            continue
        if fault is not None:
            warnings.warn(
                f"{folder / RESULTS} is not a table of molf's runs ({fault}). It stays as it is; "
                f"the run's row goes to {path.name}.",
                stacklevel=2,
            )
        return


def append_result(folder: Path, row: Mapping[str, Any]) -> Path:
    """Append a row to the folder's table of runs, in place of an earlier one of the same run.

    The table is `results.csv`, or the first of `results.molf.csv`, `results.molf-2.csv`, ... that
    is ours to write: a new file, or one that holds runs. Columns that it does not have yet are
    added at the right. Several runs may finish at the same time, so a lock is held while the file
    is rewritten.

    Returns:
        The table.

    Raises:
        OSError: The folder cannot be written, or another process does not give the lock back.
        NotOursError: No name is free.
    """
    for path in _tables(folder):
        try:
            _read(path)  # a file that is not ours gets no lock beside it either
            _append(Path(os.path.realpath(path)), row)
        except NotOursError:
            continue
        return path
    raise NotOursError(f"none of {_NAMES_TRIED} names like {RESULTS} is free")


def _tables(folder: Path) -> Iterator[Path]:
    """Where a row may go, in this order."""
    yield folder / RESULTS
    stem, suffix = os.path.splitext(RESULTS)
    for number in range(1, _NAMES_TRIED):
        yield folder / f"{stem}.molf{f'-{number}' if number > 1 else ''}{suffix}"


def _append(path: Path, row: Mapping[str, Any]) -> None:
    lock = path.with_name(f".{path.name}.lock")
    try:
        with FileLock(lock, timeout=LOCK_SECONDS):
            _rewrite(path, row)
    except Timeout as error:
        raise TimeoutError(f"another process has held {lock} for {LOCK_SECONDS:g} s") from error
    except NotImplementedError as error:
        raise OSError(f"{path.parent} is on a file system without locks") from error


def _rewrite(path: Path, row: Mapping[str, Any]) -> None:
    row = {name: as_cell(value) for name, value in row.items()}
    columns, rows = _read(path)
    columns += [name for name in row if name not in columns]
    with (
        replacing_file(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows([*(other for other in rows if other.get("run") != row["run"]), row])
        if path.exists():
            shutil.copymode(path, temporary)


def as_cell(value: Any) -> Any:
    """A value for a table: a text that a spreadsheet would compute gets an apostrophe in front.

    Secrets are masked. Line breaks and characters that cannot be seen are written as escapes.
    """
    if not isinstance(value, str):
        return value
    text = as_line(mask_text(value))
    return f"'{text}" if text.lstrip()[:1] in _FORMULAS else text


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a table of runs; spreadsheets save it with a byte order mark.

    Raises:
        NotOursError: There is something else.
    """
    if not os.path.lexists(path):
        return [], []
    if not path.is_file():
        raise NotOursError("it is no file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = next(reader, [])
            if not _OURS.issubset(columns) or len(set(columns)) < len(columns):
                raise NotOursError("its first line does not name the columns of runs, each once")
            rows = []
            for cells in reader:
                if len(cells) > len(columns):
                    raise NotOursError(
                        f"line {reader.line_num} has {len(cells)} cells for {len(columns)} columns"
                    )
                if cells:
                    rows.append(dict(zip(columns, cells, strict=False)))
            return columns, rows
    except (OSError, UnicodeError, csv.Error) as error:
        raise NotOursError(first_line(error)) from error
