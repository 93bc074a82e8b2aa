"""Messages between this process and a worker: a length and that many bytes of JSON."""

from __future__ import annotations

import struct
from typing import BinaryIO

_HEADER = struct.Struct(">I")


def write_frame(stream: BinaryIO, payload: bytes) -> None:
    """Write one message and flush it."""
    stream.write(_HEADER.pack(len(payload)))
    stream.write(payload)
    stream.flush()


def read_frame(stream: BinaryIO, max_bytes: int) -> bytes:
    """Read one message.

    Args:
        stream: The stream to read; the call waits until the message is complete.
        max_bytes: Longest message in bytes.

    Raises:
        EOFError: The stream ended before or inside the message.
        ValueError: The message is longer than allowed.
    """
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise EOFError("The stream ended.")
    (length,) = _HEADER.unpack(header)
    if length > max_bytes:
        raise ValueError(f"A message of {length} bytes, more than {max_bytes}.")
    payload = stream.read(length)
    if len(payload) < length:
        raise EOFError("The stream ended inside a message.")
    return payload
