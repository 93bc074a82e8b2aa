"""Messages between this process and a worker: one line of JSON each."""

from __future__ import annotations

from typing import BinaryIO


def write_frame(stream: BinaryIO, payload: bytes) -> None:
    """Write one message, JSON without line breaks, and flush it."""
    stream.write(payload + b"\n")
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
    # A limit, because hostile SQL may control the worker and write without end.
    line = stream.readline(max_bytes + 1)
    if line.endswith(b"\n"):
        return line[:-1]
    if len(line) > max_bytes:
        raise ValueError(f"A message of more than {max_bytes} bytes.")
    raise EOFError("The stream ended inside a message." if line else "The stream ended.")
