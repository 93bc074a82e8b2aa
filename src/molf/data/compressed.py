"""Compressed data files (`.gz`, `.zst`)."""

from __future__ import annotations

from pathlib import Path

from molf.errors import InputError, reason_of
from molf.inputs import check_ordinary, memory_bytes

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Codecs of Arrow by the end of a file's name."""

_CHUNK = 2**20


def read_compressed(path: Path, codec: str, shown: str) -> bytes:
    """Return the decompressed content of a file; several compressed parts may follow each other.

    Args:
        path: The file.
        codec: A value of `COMPRESSIONS`.
        shown: The file's name in messages.

    Raises:
        InputError: The file cannot be read, is damaged or cut short, or its content is larger than
            the machine's memory.
    """
    check_ordinary(path, shown)
    import pyarrow

    if not pyarrow.Codec.is_available(codec):
        raise InputError(f"{shown}: pyarrow was built without {codec}. Give the file decompressed.")
    most = memory_bytes()
    chunks, size = [], 0
    try:
        with path.open("rb") as file, pyarrow.input_stream(file, compression=codec) as stream:
            while chunk := stream.read(_CHUNK):
                size += len(chunk)
                # A small file may expand to any size.
                if most is not None and size > most:
                    raise InputError(
                        f"{shown} decompresses to more than this machine's {most:,} bytes of "
                        "memory. Give a part of it."
                    )
                chunks.append(chunk)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{shown} is no readable {codec} file: {reason_of(error)}") from error
    return b"".join(chunks)
