"""Compressed data files (`.gz`, `.zst`)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

from molf.errors import InputError, reason_of
from molf.inputs import memory_bytes, open_input

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Codecs of Arrow by the end of a file's name."""


def open_compressed(path: Path, codec: str, shown: str) -> BinaryIO:
    """Open a compressed file to read its content; compressed parts may follow each other.

    Args:
        path: The file.
        codec: A value of `COMPRESSIONS`.
        shown: The file's name in messages.

    Returns:
        A file whose reads raise `InputError` where the compressed one is damaged or cut short, or
        its content is larger than the machine's memory.

    Raises:
        InputError: The file cannot be read.
    """
    import pyarrow

    if not pyarrow.Codec.is_available(codec):
        raise InputError(f"{shown}: pyarrow was built without {codec}. Give the file decompressed.")
    return io.BufferedReader(_Decompressed(open_input(path, shown), codec, shown), 2**20)


class _Decompressed(io.RawIOBase):
    """The content of a compressed file.

    Args:
        file: The file; it is closed with this one.
        codec: A value of `COMPRESSIONS`.
        shown: The file's name in messages.
    """

    def __init__(self, file: BinaryIO, codec: str, shown: str) -> None:
        import pyarrow

        self._stream = pyarrow.input_stream(file, compression=codec)
        self._shown = f"{shown} is no readable {codec} file"
        self._name = shown
        self._most = memory_bytes()
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import pyarrow

        try:
            chunk = self._stream.read(len(buffer))
        except InputError:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{self._shown}: {reason_of(error)}") from error
        self._size += len(chunk)
        # A small file may expand to any size.
        if self._most is not None and self._size > self._most:
            raise InputError(
                f"{self._name} decompresses to more than this machine's {self._most:,} bytes of "
                "memory. Give a part of it."
            )
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
