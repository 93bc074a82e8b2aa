"""The identity of a trial: hashes of its place, its options, and the contents of local inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from molf.data.records import data_files, is_url
from molf.job.settings.settings import TrainSettings
from molf.paths import absolute, expanded

# Options without effect on the results of a trial.
_NOT_IDENTITY = (
    *("output_dir", "overwrite", "resume", "fallback_dir", "report_to", "dry_run"),
    *("save_steps", "save_minutes", "save_total_limit", "async_save", "on_save_error"),
)
_DATA = ("data", "eval_data", "forgetting_data")
_MODEL = "model"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_DESCRIPTIONS = (".json", ".jinja", ".model", ".txt")
_END = 2**20  # bytes at each end of a file of weights


def settings_key(settings: TrainSettings, more: Any = None) -> str:
    """Return a hash of the options that differ from their defaults; equal keys are equal trainings.

    Local data and models count by their contents, so that their place is free. New options of later
    releases leave the hash unchanged.

    Args:
        settings: The options.
        more: Anything else that belongs to the identity, as JSON values.
    """
    defaults = {option.name: option.default for option in fields(TrainSettings)}
    given = {
        name: value
        for name, value in vars(settings).items()
        if name not in _NOT_IDENTITY and value != defaults.get(name) and value != {}
    }
    return _hash([given | contents_of(given), more])


def trial_key(place: tuple[str, str, str, int, int], settings: str) -> str:
    """Return the identity of a planned trial.

    Args:
        place: Cell, method, phase, number of the point, seed.
        settings: The result of `settings_key`.
    """
    return _hash([place, settings])


def contents_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of the content of each local data file, data folder and model by option.

    Each is read once in a process. Data files count whole. Of a model folder count its descriptions
    (configuration, tokenizer, chat template) whole, and names, sizes and both ends of its weights.

    Args:
        options: Options of `molf train`. Hub ids, addresses and missing files have no content here.
    """
    found = {}
    for name in (*_DATA, _MODEL):
        source = options.get(name)
        if source is None or is_url(str(source)):
            continue
        content = _content(name == _MODEL, absolute(str(source)))
        if content is not None:
            found[name] = content
    return found


@cache
def _content(is_model: bool, source: str) -> str | None:
    try:
        return _model(expanded(source)) if is_model else _data(source)
    except OSError:  # unreadable: reported with its reason where it is loaded
        return None


def _data(source: str) -> str | None:
    parts = []
    for path in data_files(source):
        with path.open("rb") as file:
            parts.append(hashlib.file_digest(file, "sha256").hexdigest())
    return f"sha256:{_hash(parts)}" if parts else None


def _model(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    parts: list[Any] = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in (*_WEIGHTS, *_DESCRIPTIONS) or not path.is_file():
            continue
        with path.open("rb") as file:
            if path.suffix in _DESCRIPTIONS:
                parts.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
                continue
            size = path.stat().st_size
            ends = hashlib.sha256(file.read(_END))
            file.seek(max(0, size - _END))
            ends.update(file.read(_END))
            parts.append([path.name, size, ends.hexdigest()])
    return f"sha256:{_hash(parts)}" if parts else None


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
