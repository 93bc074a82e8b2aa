"""One row per run in `results.csv`, beside the run directories."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from molf.train.files import replacing_file

RESULTS = "results.csv"


def append_result(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row; columns that the file does not have yet are added to it at the right.

    Several runs may finish at the same time, so a lock is held while the file is rewritten.
    """
    with FileLock(path.with_name(f".{path.name}.lock")):
        columns, rows = _read(path)
        columns += [name for name in row if name not in columns]
        with (
            replacing_file(path) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows([*rows, row])


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    if not path.exists():
        return [], []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        return list(reader.fieldnames or ()), rows
