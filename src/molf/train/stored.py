"""The weights of a checkpoint as they are stored: which files, and which tensors are in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from molf.errors import InputError

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ckpt")


def stored_tensors(name: str, config: Any) -> dict[str, Path]:
    """Return the file of every stored tensor, by the tensor's name; those of a Hub id are fetched.

    Args:
        name: A directory or a Hub id.
        config: Its transformers configuration.

    Raises:
        InputError: There are no safetensors files, one that the index names is not there, or one
            cannot be read; the message names the file.
    """
    tensors: dict[str, Path] = {}
    for path in _weight_files(name, getattr(config, "transformers_weights", None)):
        tensors |= dict.fromkeys(_names_in(name, path), path)
    return tensors


def _names_in(name: str, path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"model {name}: {path.name} cannot be read as safetensors (cut short, or of another "
            f"format): {error}"
        ) from error


def _weight_files(name: str, explicit: str | None) -> list[Path]:
    """The files that transformers would load, one or those of an index."""
    first = SAFE_WEIGHTS_NAME if explicit is None else explicit
    if (single := _found(name, first)) is not None and single.suffix != ".json":
        return [single]
    index = single or _found(name, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise InputError(f"model {name} has no {first}{_instead(name)}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = {file: _found(name, file) for file in sorted(names)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"model {name}: {index.name} is no index of weights: {type(error).__name__}: {error}"
        ) from error
    missing = [file for file, path in files.items() if path is None]
    if missing:
        raise InputError(
            f"model {name}: {index.name} names {len(missing)} of {len(files)} files that are not "
            f"there, the first is {missing[0]}. Copy or download them again."
        )
    return [path for path in files.values() if path is not None]


def _found(name: str, file: str) -> Path | None:
    """A file of the checkpoint, fetched if it is a Hub id's; None if it has none of this name."""
    found = cached_file(
        name,
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _instead(name: str) -> str:
    """What a directory has in the place of safetensors, and what to do about it."""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else []
    other = [file.name for file in files if file.suffix in _OTHER_FORMATS]
    if not other:
        return ": there are no weights to load."
    return (
        f", and {other[0]} is not read: files of that kind can run code, or are no weights of "
        "transformers. Convert them where you trust them: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors."
    )
