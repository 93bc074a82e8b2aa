"""Reading of one data file: a JSON list, JSON lines, Parquet, Arrow or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from molf.data.compressed import COMPRESSIONS, open_compressed
from molf.data.json_records import Record, json_records, text_lines
from molf.errors import InputError, reason_of
from molf.inputs import check_ordinary, open_input

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".arrow")
"""Kinds of data file; JSON and CSV may be compressed, as in `a.jsonl.gz`."""

_TEXTS = (".json", ".jsonl", ".csv")

_ROWS = 1000  # of a table that are objects at once

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
    """Read all records of a file; the arguments and errors are those of `records_in`."""
    return list(records_in(path, shown))


def records_in(path: Path, shown: str | None = None) -> Iterator[Record]:
    """Yield the records of a file, of which few are in memory at once.

    JSON lists and JSON lines are distinguished by content.

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
    is_empty = True
    for record in _records(path, suffix, shown):
        is_empty = False
        yield record
    if is_empty:
        raise InputError(f"{shown} is empty: it holds no records.")


def _records(path: Path, suffix: str, shown: str) -> Iterator[Record]:
    if suffix in _TABLES:
        yield from _table_records(path, suffix, shown)
        return
    codec = COMPRESSIONS.get(path.suffix.lower())

    def opened() -> BinaryIO:
        return open_compressed(path, codec, shown) if codec else open_input(path, shown)

    if suffix.startswith(".csv"):
        with opened() as file:
            yield from _csv_records(file, shown)
    else:
        yield from json_records(opened, shown)


def check_fields(record: Record, fields: Iterable[str], where: str) -> None:
    """Require fields in a record; null counts as absent, as in Parquet and CSV.

    Raises:
        InputError: The record, named by `where`, lacks a field.
    """
    for name in fields:
        if record.get(name) is None:
            raise InputError(
                f"{where}: lacks the field {name!r} "
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
    return list(json_records(lambda: open_input(path, str(path)), str(path)))


def _parquet_batches(file: Any) -> Iterator[Any]:
    import pyarrow.parquet

    yield from pyarrow.parquet.ParquetFile(file).iter_batches(_ROWS)


def _arrow_batches(file: Any) -> Iterator[Any]:
    """Yield the rows of a stream, as `datasets` writes it, or of a file with an index (Feather)."""
    import pyarrow

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(file)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = iter(pyarrow.ipc.open_stream(file))
    for batch in batches:
        yield from (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS))


_TABLES = {".parquet": ("Parquet", _parquet_batches), ".arrow": ("Arrow", _arrow_batches)}


def _table_records(path: Path, suffix: str, shown: str) -> Iterator[Record]:
    import pyarrow

    check_ordinary(path, shown)
    kind, batches = _TABLES[suffix]
    try:
        with path.open("rb") as file:  # pyarrow rejects paths that are not UTF-8
            for batch in batches(file):
                yield from rows_of(batch)
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"{shown} is not a readable {kind} file: {reason_of(error)}") from error


def rows_of(table: Any) -> Iterator[Record]:
    """Yield the rows of an Arrow table or batch; the objects in them are without null fields.

    Arrow gives each object of a column the keys of all others, with null as the value. Its maps
    become objects.

    Raises:
        KeyError, ValueError: Columns, or keys of an object, have the same name.
    """
    names = table.schema.names
    if len(set(names)) < len(names):
        raise ValueError("a column has the name of another")
    # The conversion of maps takes four times as long, also where there are none.
    maps = "strict" if "map<" in str(table.schema) else None
    for row in table.to_pylist(maps_as_pydicts=maps):
        yield {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value


def _csv_records(file: BinaryIO, shown: str) -> Iterator[Record]:
    """Yield rows as objects; the first line is the header, and an empty cell is null."""
    # csv.reader takes lines that end where those of CSV do: some files have carriage returns alone.
    lines = (part for line in text_lines(file, shown) for part in io.StringIO(line, newline=""))
    rows = csv.reader(lines, strict=True)
    names = _next_row(rows, shown) or []
    _check_header(names, shown)
    while (cells := _next_row(rows, shown)) is not None:
        if not cells:
            continue  # a blank line
        if len(cells) != len(names):
            raise InputError(
                f"{shown}, line {rows.line_num}: has {len(cells)} cells, "
                f"but the header names {len(names)}."
            )
        yield {n: cell or None for n, cell in zip(names, cells, strict=True)}


def _next_row(rows: Any, shown: str) -> list[str] | None:
    # A setting of the process, restored after each row.
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        row: list[str] | None = next(rows, None)
    except csv.Error as error:
        raise InputError(f"{shown}, line {rows.line_num}: not CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    return row


def _check_header(names: list[str], shown: str) -> None:
    for name in names:
        if not name.strip() or names.count(name) > 1:
            fault = f"names {name!r:.100} twice" if name.strip() else "has an empty name"
            raise InputError(
                f"{shown}: the first line must be a header of field names, but it {fault}."
            )
