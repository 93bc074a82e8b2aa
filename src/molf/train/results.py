"""One row per run in `results.csv`, beside the run directories."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from molf.errors import InputError
from molf.masking import mask_text
from molf.shown import as_line
from molf.tasks.files import first_line
from molf.train.files import replacing_file

RESULTS = "results.csv"

_FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a formula begins with; the last four are the same in full width."""


def check_results(path: Path) -> None:
    """Make sure beforehand that a row can be added, without writing anything.

    Raises:
        InputError: What is there is no table of runs.

    Warns:
        UserWarning: The folder cannot be written to: the run will be complete without its row.
    """
    try:
        _read(path)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path} cannot take the run's row: {first_line(error)}. Mend it or move it away, or "
            "give an --output_dir elsewhere."
        ) from error
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        warnings.warn(
            f"{path.parent} cannot be written to: the run gets no row in {path.name}.", stacklevel=2
        )


def append_result(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row, in place of an earlier one of the same run.

    Columns that the file does not have yet are added to it at the right. Several runs may finish at
    the same time, so a lock is held while the file is rewritten.

    Raises:
        OSError: The file or its folder cannot be written.
        ValueError: It is no table.
    """
    row = {name: as_cell(value) for name, value in row.items()}
    with FileLock(path.with_name(f".{path.name}.lock")):
        columns, rows = _read(path)
        columns += [name for name in row if name not in columns]
        with (
            replacing_file(path) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows([*(other for other in rows if other["run"] != row["run"]), row])


def as_cell(value: Any) -> Any:
    """A value for a table: a text that a spreadsheet would compute gets an apostrophe in front.

    Secrets are masked. Line breaks and characters that cannot be seen are written as escapes.
    """
    if not isinstance(value, str):
        return value
    text = as_line(mask_text(value))
    return f"'{text}" if text.lstrip()[:1] in _FORMULAS else text


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a table, which spreadsheets save with a byte order mark."""
    if not path.exists():
        return [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns = next(reader, [])
        if not columns:
            return [], []
        if "run" not in columns or len(set(columns)) < len(columns):
            raise ValueError("its first line does not name the columns of runs, each once")
        rows = []
        for cells in reader:
            if len(cells) > len(columns):
                raise ValueError(
                    f"line {reader.line_num} has {len(cells)} cells for {len(columns)} columns"
                )
            if cells:
                rows.append(dict(zip(columns, cells, strict=False)))
        return columns, rows
