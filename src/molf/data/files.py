"""Reading of one data file: a JSON list, JSON lines, Parquet or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from molf.errors import InputError, reason_of
from molf.inputs import check_ordinary, read_text

Record = dict[str, Any]

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")

_LONGEST_CELL = 2**31 - 1  # characters; csv's own limit of 131,072 is too small for documents


def read_file(path: Path) -> list[Record]:
    """Read all records of a file; JSON lists and JSON lines are distinguished by content.

    Raises:
        InputError: The file cannot be read, is of another kind, is empty, is not UTF-8, not
            JSON or not CSV (with its line), or contains a value that is not an object.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: unknown kind of data file. Must be one of {', '.join(SUFFIXES)}."
        )
    read = {".parquet": _read_parquet, ".csv": _read_csv}.get(suffix, read_json)
    records = read(path)
    if not records:
        raise InputError(f"{path} is empty: it holds no records.")
    return records


def check_fields(records: Iterable[Record], fields: Iterable[str], source: str) -> None:
    """Require fields in every record; null counts as absent, as in Parquet and CSV.

    Raises:
        InputError: A record lacks a field.
    """
    needed = tuple(fields)
    for index, record in enumerate(records):
        for name in needed:
            if record.get(name) is None:
                raise InputError(
                    f"{source}, record {index}: lacks the field {name!r} "
                    f"(it has: {', '.join(present_fields(record)) or 'none'})."
                )


def present_fields(record: Record) -> list[str]:
    """Return the names of the fields that are not null."""
    return [name for name, value in record.items() if value is not None]


def read_json(path: Path) -> list[Record]:
    """Read the objects of a JSON list or of JSON lines, under any file name; possibly none.

    Raises:
        InputError: The file cannot be read, is not UTF-8 or not JSON (with its line), or contains
            a value that is not an object.
    """
    text = read_text(path, str(path))
    # A line of JSON lines must be an object, so a list is the whole file.
    if text.lstrip().startswith("["):
        values = _parse(text, str(path), line=1)
    else:
        # Split at \n only: splitlines() also splits at characters that JSON strings may contain.
        values = [
            _parse(line, str(path), number)
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise InputError(
                f"{path}, record {index}: is not an object but {type(value).__name__}."
            )
    return list(values)


class DuplicateKeyError(Exception):
    """An object has a duplicate key; the argument is the key."""


def _without_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; reject duplicate keys, of which json drops all but the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return made


def unique_json(text: str) -> Any:
    """Parse JSON without duplicate keys in objects.

    Raises:
        DuplicateKeyError: An object has a duplicate key.
        ValueError: The text is not JSON.
    """
    return json.loads(text, object_pairs_hook=_without_duplicate_keys)


def _parse(text: str, path: str, line: int) -> Any:
    """Parse a JSON text that starts at the given line of a file."""
    try:
        return unique_json(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg}). "
            "The file must hold a list of records, or one record per line."
        ) from error
    except DuplicateKeyError as error:
        raise InputError(
            f"{path}, line {line}: the key {error.args[0]!r:.100} comes twice in one object."
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise InputError(f"{path}, line {line}: not usable JSON ({reason_of(error)}).") from error


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    check_ordinary(path, str(path))
    try:
        with path.open("rb") as file:  # pyarrow rejects paths that are not UTF-8
            rows: list[Record] = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {reason_of(error)}") from error
    return [without_nulls(row) for row in rows]


def without_nulls(value: Any) -> Any:
    """Remove null fields of objects, at any depth.

    Arrow gives each object of a column the keys of all others, with null as the value.
    """
    if isinstance(value, dict):
        return {name: without_nulls(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def _read_csv(path: Path) -> list[Record]:
    """Read rows as objects; the first line is the header, and an empty cell is null."""
    rows = csv.reader(io.StringIO(read_text(path, str(path)), newline=""), strict=True)
    # A setting of the process, restored below.
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        names = next(rows, [])
        _check_header(names, path)
        records = []
        for cells in rows:
            if not cells:
                continue  # a blank line
            if len(cells) != len(names):
                raise InputError(
                    f"{path}, line {rows.line_num}: has {len(cells)} cells, "
                    f"but the header names {len(names)}."
                )
            records.append({n: cell or None for n, cell in zip(names, cells, strict=True)})
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    return records


def _check_header(names: list[str], path: Path) -> None:
    for name in names:
        if not name.strip() or names.count(name) > 1:
            fault = f"names {name!r:.100} twice" if name.strip() else "has an empty name"
            raise InputError(
                f"{path}: the first line must be a header of field names, but it {fault}."
            )
