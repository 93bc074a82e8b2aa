"""Add a row per run to `results.csv`, beside the run directories."""

from __future__ import annotations

import csv
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from molf.disk.files import replacing_file
from molf.errors import reason_of
from molf.masking import mask_text
from molf.shown import as_line

RESULTS = "results.csv"
LOCK_SECONDS = 10.0  # writing a row takes milliseconds

# Columns of each table of runs, in all releases. A table without them was not written by molf.
_RUN_COLUMNS = frozenset(
    {"run", "started", "task", "method", "model", "seed", "training_loss", "peak_memory_bytes"}
)
_NAMES_TRIED = 100

# First characters of a formula; the last four are full-width.
_FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


class ForeignTableError(ValueError):
    """A file is no table of runs, or is damaged; it is not changed."""


def check_results(folder: Path) -> None:
    """Warn before a run if its row cannot be added to `results.csv`; nothing is written.

    Warns:
        UserWarning: `results.csv` is no table of runs, or damaged, so the row is written to another
            file; or the folder cannot be written, so the run gets no row.
    """
    if folder.is_dir() and not os.access(folder, os.W_OK):
        warnings.warn(
            f"{folder} cannot be written to: the run gets no row in {RESULTS}.", stacklevel=2
        )
        return
    fault = None
    for path in _tables(folder):
        try:
            read_results(path)
        except ForeignTableError as error:
            fault = fault or error
            continue
        if fault is not None:
            warnings.warn(
                f"{folder / RESULTS} is not a table of molf's runs ({fault}). It is not changed; "
                f"the run's row goes to {path.name}.",
                stacklevel=2,
            )
        return


def append_result(folder: Path, row: Mapping[str, Any]) -> Path:
    """Append a row to the folder's table of runs; an earlier row of the same run is replaced.

    The table is `results.csv`, or the first of `results.molf.csv`, `results.molf-2.csv`, ... that
    is new or a table of runs. Missing columns are added at the right.

    Returns:
        The path of the table.

    Raises:
        OSError: The folder cannot be written, or another process does not release the lock.
        ForeignTableError: No name is free.
    """
    for path in _tables(folder):
        try:
            read_results(path)  # first, so that no lock file is made beside another program's table
            _append(Path(os.path.realpath(path)), row)
        except ForeignTableError:
            continue
        return path
    raise ForeignTableError(f"none of {_NAMES_TRIED} names like {RESULTS} is free")


def _tables(folder: Path) -> Iterator[Path]:
    """Yield the possible tables for a row, in order."""
    yield folder / RESULTS
    stem, suffix = os.path.splitext(RESULTS)
    for number in range(1, _NAMES_TRIED):
        yield folder / f"{stem}.molf{f'-{number}' if number > 1 else ''}{suffix}"


def _append(path: Path, row: Mapping[str, Any]) -> None:
    lock = path.with_name(f".{path.name}.lock")
    try:
        # Several runs may finish at the same time, and each rewrites the file.
        with FileLock(lock, timeout=LOCK_SECONDS):
            _rewrite(path, row)
    except Timeout as error:
        raise TimeoutError(f"another process has held {lock} for {LOCK_SECONDS:g} s") from error
    except NotImplementedError as error:
        raise OSError(f"{path.parent} is on a file system without locks") from error


def _rewrite(path: Path, row: Mapping[str, Any]) -> None:
    row = {name: as_cell(value) for name, value in row.items()}
    columns, rows = read_results(path)
    columns += [name for name in row if name not in columns]
    with (
        replacing_file(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        # A run with --overwrite replaces its earlier row.
        writer.writerows([*(other for other in rows if other.get("run") != row["run"]), row])
        if path.exists():
            # The table may be shared with a group.
            shutil.copymode(path, temporary)


def as_cell(value: Any) -> Any:
    """Return a value for a table; text that a spreadsheet would compute gets a leading apostrophe.

    Secrets are masked. Line breaks and invisible characters are escaped.
    """
    if not isinstance(value, str):
        return value
    text = as_line(mask_text(value))
    return f"'{text}" if text.lstrip()[:1] in _FORMULAS else text


def read_results(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and rows of a table of runs; empty if there is no file.

    Raises:
        ForeignTableError: The file is no table of runs.
    """
    if not os.path.lexists(path):
        return [], []
    if not path.is_file():
        raise ForeignTableError("it is no file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets add a BOM
            reader = csv.reader(file, strict=True)
            columns = next(reader, [])
            if not _RUN_COLUMNS.issubset(columns) or len(set(columns)) < len(columns):
                raise ForeignTableError(
                    "its first line does not name the columns of runs, each once"
                )
            rows = []
            for cells in reader:
                if len(cells) > len(columns):
                    raise ForeignTableError(
                        f"line {reader.line_num} has {len(cells)} cells for {len(columns)} columns"
                    )
                if cells:
                    rows.append(dict(zip(columns, cells, strict=False)))
            return columns, rows
    except (OSError, UnicodeError, csv.Error) as error:
        raise ForeignTableError(reason_of(error)) from error
