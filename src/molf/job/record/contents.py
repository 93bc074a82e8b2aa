"""Hashes of the contents of a run's inputs: equal hashes are equal data, and equal models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.data.records import data_files, is_url
from molf.data.sources import OPTIONS, absolute_sources, sources_of
from molf.disk.files import sha256_of
from molf.job.record.ownership import ASSIGNMENT, ROUTING
from molf.paths import absolute, expanded

if TYPE_CHECKING:
    from molf.core.assignment.assignment import Assignment

ASSIGNED = "assignment"
"""Key in the record of a run's model: the hash of its assignment."""

_DATA = (*OPTIONS, "forgetting_data")
_MODEL, _ASSIGNMENT = "model", "assignment"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_DESCRIPTIONS = (".json", ".jinja", ".model", ".txt")
_END = 2**20  # bytes at each end of a file of weights


def contents_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of local data, of a local model and of an assignment by option.

    Each is read once in a process. Data files count whole. Of a model folder count its descriptions
    (configuration, tokenizer, chat template) whole, and names, sizes and both ends of its weights.
    Of a run as an assignment counts its `assignment.yaml`, or its routing log.

    Args:
        options: Options of `molf train`. Hub ids, addresses and missing files have no content here.
    """
    found = {}
    for name in (*_DATA, _MODEL, _ASSIGNMENT):
        source = options.get(name)
        if source is None or is_url(str(source)):
            continue
        place = absolute_sources if name in _DATA else absolute
        content = _content(name, place(str(source)))
        if content is not None:
            found[name] = content
    return found


@cache
def _content(name: str, source: str) -> str | None:
    try:
        if name == _MODEL:
            return _model(expanded(source))
        return _assignment(expanded(source)) if name == _ASSIGNMENT else _data(source)
    except OSError:  # unreadable: reported with its reason where it is loaded
        return None


def hash_of_model(model: str) -> str:
    """Return the hash of a model's contents as they are now; empty for a Hub id.

    Of a folder count its descriptions (configuration, tokenizer, chat template) whole, and names,
    sizes and both ends of its weights.

    Args:
        model: A directory or a Hub id.
    """
    try:
        return _model(expanded(absolute(model))) or ""
    except OSError:
        return ""


def hash_of_assignment(assignment: Assignment) -> str:
    """Return a hash of the training of each layer and of the rest; comments do not count."""
    layers = [[one.name, one.train, one.r, one.alpha] for one in assignment.entries]
    rest = [assignment.use_rslora, assignment.freeze_rest, sorted(assignment.frozen_rest)]
    return f"sha256:{short_hash([layers, rest])}"


def _data(source: str) -> str | None:
    parts: list[Any] = []
    has_files = False
    for one in sources_of(source):
        own = [sha256_of(path) for path in data_files(one.place)]
        has_files |= bool(own)
        if not own:
            parts.append(str(one))  # a Hub id beside files
        else:
            parts += own if one.weight == 1 else [[one.weight, *own]]
    return f"sha256:{short_hash(parts)}" if has_files else None


def _assignment(place: Path) -> str | None:
    made = place / ASSIGNMENT
    log = sorted((place / ROUTING).glob("*.parquet"))
    files = [place] if place.is_file() else [made] if made.is_file() else log
    return f"sha256:{short_hash([sha256_of(path) for path in files])}" if files else None


def _model(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    parts: list[Any] = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in (*_WEIGHTS, *_DESCRIPTIONS) or not path.is_file():
            continue
        if path.suffix in _DESCRIPTIONS:
            parts.append([path.name, sha256_of(path)])
            continue
        with path.open("rb") as file:
            size = path.stat().st_size
            ends = hashlib.sha256(file.read(_END))
            file.seek(max(0, size - _END))
            ends.update(file.read(_END))
            parts.append([path.name, size, ends.hexdigest()])
    return f"sha256:{short_hash(parts)}" if parts else None


def short_hash(value: Any) -> str:
    """Return the first 20 hexadecimal digits of the SHA-256 of a value as JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def hash_of_data(files: Mapping[str, Iterable[Mapping[str, Any]]], source: str) -> str:
    """Return a hash of the data of a run; the places of the files do not count.

    Args:
        files: Records of the files by option (`molf.job.record.provenance.file_records`).
        source: Where the data came from, for data without files: a Hub id, or the embedded world.
    """
    found = {name: sorted(str(one.get("sha256")) for one in files[name]) for name in sorted(files)}
    return short_hash(found if "data" in found else [found, source])
