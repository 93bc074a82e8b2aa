"""Record path, size and SHA-256 of the files that a run reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from molf.data.records import data_files
from molf.data.stdin import STDIN, is_stdin_copy


def file_records(sources: Mapping[str, str | None]) -> dict[str, list[dict[str, Any]]]:
    """Return the records of each source's files, by option.

    Args:
        sources: Files, folders or addresses by option; Hub ids and None are left out.
    """
    found = {
        option: [_record(path) for path in data_files(source)]
        for option, source in sources.items()
        if source is not None
    }
    return {option: records for option, records in found.items() if records}


def contents(records: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Return the SHA-256 of each file of the records."""
    return frozenset(str(record.get("sha256")) for record in records)


def _record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {
        "path": STDIN if is_stdin_copy(path) else str(path.resolve()),
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
    }
