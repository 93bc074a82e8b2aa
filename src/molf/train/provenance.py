"""Which files a run read: path, size and SHA-256, so that they can be told apart later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from molf.tasks.records import data_files

_CHUNK = 2**20


def file_records(sources: Mapping[str, str | None]) -> dict[str, list[dict[str, Any]]]:
    """Describe the files of each source, by the option that it was given by.

    Args:
        sources: Files, folders or addresses; those without files here (Hub ids, None) are left out.
    """
    found = {
        option: [_record(path) for path in data_files(source)]
        for option, source in sources.items()
        if source is not None
    }
    return {option: records for option, records in found.items() if records}


def same_files(one: str, other: str) -> bool:
    """Whether two sources are the same, or have files of the same contents."""
    if one == other:
        return True
    found = file_records({"one": one, "other": other})
    return bool(found) and contents(found.get("one", ())) == contents(found.get("other", ()))


def contents(records: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """What some files hold, by the SHA-256 of each."""
    return frozenset(str(record.get("sha256")) for record in records)


def _record(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {
        "path": str(path.resolve()),
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
    }
