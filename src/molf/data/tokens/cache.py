"""Tokens of all examples in a file, for later runs on the same data (`--token_cache`).

A file is `KEY-CONTENT.arrow`. The key is a hash of everything that the tokens depend on, and the
content that of the file, so that a damaged file is recognised. A file is written beside its place
and renamed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

from molf.amounts import decimal_size
from molf.data.encoding import EncodedSamples
from molf.data.rows import Rows
from molf.data.samples import Sample, hash_of_samples
from molf.disk.files import flush, making_directory
from molf.disk.locks import Lock
from molf.errors import system_reason

_VERSION = 3  # incremented with every change of the tokens, labels or faults of a sample
_PACKAGES = ("molf", "tokenizers", "transformers", "trl", "jinja2")
_STATE = ("truncation", "padding")  # of the last call of a tokenizer; training uses neither
_DATE = "strftime_now"  # in a template that writes the date of the day
_DIGITS = 16  # of a hash, in a file's name


def key_of(tokenizer: Any, samples: Sequence[Sample], max_length: int) -> str:
    """Return a hash of everything that the tokens of samples depend on.

    These are the samples in their order (and so the data, the task and its draws), the tokenizer
    with its templates and settings, `max_length`, the versions of the libraries and of this file.

    Args:
        tokenizer: A fast tokenizer.
        samples: The samples.
        max_length: Longest sample in tokens.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    inputs = [
        _VERSION,
        {name: version(name) for name in _PACKAGES},
        type(tokenizer).__name__,
        {name: value for name, value in backend.items() if name not in _STATE},
        template,
        str(date.today()) if _DATE in template else "",
        {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        tokenizer.eos_token_id,
        bool(getattr(tokenizer, "split_special_tokens", False)),
        max_length,
        hash_of_samples(samples),
    ]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def cached(folder: Path, key: str, encode: Callable[[], EncodedSamples]) -> EncodedSamples:
    """Return the encoded samples of a key: read from the folder, or encoded and written there.

    Of several processes with one key on one machine, the first encodes, and the others wait for it.

    Args:
        folder: The folder; made if it is missing.
        key: The result of `key_of`.
        encode: Encodes all samples.

    Raises:
        InputError: As `encode`.

    Warns:
        UserWarning: A file is damaged, or cannot be written; the tokens are right.
    """
    if (found := _read(folder, key)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder / f".{key}.lock")
    except OSError as error:
        _warn(folder, error)
        return encode()
    with lock:
        if (found := _read(folder, key)) is not None:
            return found
        encoded = encode()
        try:
            size = _write(folder, key, encoded)
        except OSError as error:
            _warn(folder, error)
            return encoded
    return replace(encoded, source=f"Tokens: kept in {folder} ({decimal_size(size)}).")


@contextmanager
def _held(path: Path, lock: Lock) -> Iterator[None]:
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> Any:
    """Wait for a lock on a file that is deleted with the lock's end; return its context."""
    while True:
        path.touch()
        lock = Lock(path, wait=inf)
        if lock.is_at(path):  # else its holder has deleted it
            return _held(path, lock)
        lock.release()


def _warn(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"The tokens cannot be kept in token_cache {folder}: {system_reason(error)}. The run goes "
        "on.",
        stacklevel=4,
    )


def _write(folder: Path, key: str, encoded: EncodedSamples) -> int:
    """Write a file, and return its size in bytes."""
    import pyarrow

    assert isinstance(encoded.input_ids, Rows)
    assert isinstance(encoded.labels, Rows)
    values = {
        "left_out": encoded.left_out,
        "longest": encoded.longest,
        "faults": dict(encoded.faults),
    }
    table = pyarrow.table(
        {
            "position": pyarrow.array(encoded.kept, type=pyarrow.int64()),
            "input_ids": encoded.input_ids.as_arrow(),
            "labels": encoded.labels.as_arrow(),
        },
        metadata={"molf": json.dumps(values)},
    )
    # In a folder of its own, which is deleted later if this process is killed.
    with making_directory(folder / key) as temporary:
        path = temporary / "tokens.arrow"
        with path.open("wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        flush(path)
        path = path.replace(folder / f"{key}-{_content(path)}.arrow")
    for other in _files(folder, key):
        if other != path:  # damaged
            with suppress(OSError):
                other.unlink()
    return path.stat().st_size


def _read(folder: Path, key: str) -> EncodedSamples | None:
    """Return the encoded samples of a file; None if there is none, or if it is damaged."""
    import pyarrow

    damaged = []
    for path in _files(folder, key):
        try:
            if path.stem != f"{key}-{_content(path)}":
                damaged.append(path)
                continue
            # Pages that are not read stay on the disk.
            with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_file(file) as reader:
                batch, metadata = reader.get_batch(0), reader.schema.metadata
        except (OSError, pyarrow.ArrowException):
            continue
        values = json.loads(metadata[b"molf"])
        return EncodedSamples(
            input_ids=Rows.of_arrow(batch.column("input_ids")),
            labels=Rows.of_arrow(batch.column("labels")),
            kept=array("q", batch.column("position").to_numpy().tobytes()),
            left_out=values["left_out"],
            longest=values["longest"],
            faults=Counter(values["faults"]),
            source=f"Tokens: read from {path}.",
        )
    for path in damaged:
        warnings.warn(f"{path} is damaged: its tokens are made again.", stacklevel=4)
    return None


def _files(folder: Path, key: str) -> list[Path]:
    return sorted(folder.glob(f"{key}-*.arrow"))


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]
