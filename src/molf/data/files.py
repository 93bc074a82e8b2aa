"""Reading of one data file: a JSON list, JSON lines, Parquet, Arrow or CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from molf.data.compressed import COMPRESSIONS, read_compressed
from molf.errors import InputError, reason_of
from molf.inputs import as_text, check_ordinary, read_text

Record = dict[str, Any]

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".arrow")
"""Kinds of data file; JSON and CSV may be compressed, as in `a.jsonl.gz`."""

_TEXTS = (".json", ".jsonl", ".csv")

_LONGEST_CELL = 2**31 - 1  # characters; csv's own limit of 131,072 is too small for documents


def data_suffix(name: str | Path) -> str | None:
    """Return the end of a data file's name in lower case, `.jsonl.gz` included; None for others."""
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return suffix
    inner = Path(path.stem).suffix.lower()
    return inner + suffix if suffix in COMPRESSIONS and inner in _TEXTS else None


def read_file(path: Path, shown: str | None = None) -> list[Record]:
    """Read all records of a file; JSON lists and JSON lines are distinguished by content.

    Args:
        path: The file.
        shown: Its name in messages; the path if not given.

    Raises:
        InputError: The file cannot be read, is of another kind, is empty, is not UTF-8, not
            JSON or not CSV (with its line), or contains a value that is not an object.
    """
    shown = shown or str(path)
    suffix = data_suffix(path)
    if suffix is None:
        raise InputError(
            f"{shown}: unknown kind of data file. Must be one of {', '.join(SUFFIXES)}; "
            f"{', '.join(_TEXTS)} may be compressed ({', '.join(COMPRESSIONS)})."
        )
    if suffix in _TABLES:
        records = _read_table(path, suffix, shown)
    else:
        codec = COMPRESSIONS.get(Path(path).suffix.lower())
        if codec is None:
            text = read_text(path, shown)
        else:
            text = as_text(read_compressed(path, codec, shown), shown)
        read = _csv_records if suffix.startswith(".csv") else _json_records
        records = read(text, shown)
    if not records:
        raise InputError(f"{shown} is empty: it holds no records.")
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
    return _json_records(read_text(path, str(path)), str(path))


def _json_records(text: str, shown: str) -> list[Record]:
    # A line of JSON lines must be an object, so a list is the whole file.
    if text.lstrip().startswith("["):
        values = _parse(text, shown, line=1)
    else:
        values = [
            _parse(line, shown, number)
            for number, line in enumerate(_lines(text), start=1)
            if line.strip()
        ]
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise InputError(
                f"{shown}, record {index}: is not an object but {type(value).__name__}."
            )
    return list(values)


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of a text, one at a time, so that a large file is not in memory twice.

    splitlines() would also split at characters that JSON strings may contain.
    """
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


class DuplicateKeyError(Exception):
    """An object has a duplicate key; the argument is the key."""


def _without_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; reject duplicate keys, of which json drops all but the last."""
    # Interned: otherwise each record has its own copy of the names.
    made = {sys.intern(name): value for name, value in pairs}
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


def _parquet_table(file: Any) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(file)


def _arrow_table(file: Any) -> Any:
    """Read a stream, as `datasets` writes it, or a file with an index (Feather)."""
    import pyarrow

    if file.read(6) == b"ARROW1":
        return pyarrow.ipc.open_file(file).read_all()
    file.seek(0)
    return pyarrow.ipc.open_stream(file).read_all()


_TABLES = {".parquet": ("Parquet", _parquet_table), ".arrow": ("Arrow", _arrow_table)}


def _read_table(path: Path, suffix: str, shown: str) -> list[Record]:
    import pyarrow

    check_ordinary(path, shown)
    kind, read = _TABLES[suffix]
    try:
        with path.open("rb") as file:  # pyarrow rejects paths that are not UTF-8
            rows: list[Record] = read(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{shown} is not a readable {kind} file: {reason_of(error)}") from error
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


def _csv_records(text: str, shown: str) -> list[Record]:
    """Read rows as objects; the first line is the header, and an empty cell is null."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    # A setting of the process, restored below.
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        names = next(rows, [])
        _check_header(names, shown)
        records = []
        for cells in rows:
            if not cells:
                continue  # a blank line
            if len(cells) != len(names):
                raise InputError(
                    f"{shown}, line {rows.line_num}: has {len(cells)} cells, "
                    f"but the header names {len(names)}."
                )
            records.append({n: cell or None for n, cell in zip(names, cells, strict=True)})
    except csv.Error as error:
        raise InputError(f"{shown}, line {rows.line_num}: not CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    return records


def _check_header(names: list[str], shown: str) -> None:
    for name in names:
        if not name.strip() or names.count(name) > 1:
            fault = f"names {name!r:.100} twice" if name.strip() else "has an empty name"
            raise InputError(
                f"{shown}: the first line must be a header of field names, but it {fault}."
            )
