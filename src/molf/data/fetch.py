"""Download of one address to a file, with limits on size and waiting time."""

from __future__ import annotations

import os
import threading
import time
import urllib.request
from pathlib import Path
from typing import BinaryIO

from molf.errors import reason_of

_CHUNK = 2**18
_WITHOUT_ANSWER = 60.0  # seconds
_LEAST_RATE = 1000  # bytes a second, averaged over `_WITHOUT_ANSWER`


class FetchError(Exception):
    """The download failed; the argument is the reason."""


def fetch(url: str, path: Path, most: int) -> None:
    """Download the content of an address to a file.

    A socket timeout does not catch a server that sends one byte at a time. So a thread downloads,
    and the caller's thread checks its rate.

    Args:
        url: The http(s) address.
        path: The file to overwrite.
        most: The largest number of bytes.

    Raises:
        FetchError: The address is unreachable, its content is too long, or arrives too slowly.
    """
    with path.open("wb") as file:
        transfer = _Transfer(url, file, most)
        transfer.start()
        try:
            transfer.watch()
        finally:
            transfer.stop()


class _Transfer(threading.Thread):
    """The thread that downloads; a daemon, so that it does not block the end of the process."""

    def __init__(self, url: str, file: BinaryIO, most: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._file = file
        self._most = most
        self._received = 0
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._stopped = threading.Event()
        self._writing = threading.Lock()

    def run(self) -> None:
        """Download; store an error for `watch`."""
        try:
            self._fetch()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def watch(self) -> None:
        """Wait for the end of the download; raise its error."""
        while True:
            before, since = self._received, time.monotonic()
            if self._ended.wait(_WITHOUT_ANSWER):
                break
            rate = (self._received - before) / (time.monotonic() - since)
            if rate < _LEAST_RATE:
                raise FetchError(
                    f"{self._received - before:,} bytes arrived in {_WITHOUT_ANSWER:.0f} seconds"
                )
        if self._error is not None:
            raise FetchError(reason_of(self._error)) from self._error

    def stop(self) -> None:
        """Stop writing, and wait for a write in progress."""
        self._stopped.set()
        with self._writing:
            pass

    def _fetch(self) -> None:
        with urllib.request.urlopen(self._url, timeout=_WITHOUT_ANSWER) as response:
            announced = response.headers.get("Content-Length")
            length = int(announced) if announced and announced.isdecimal() else None
            if length is not None and length > self._most:
                raise self._too_long(f"{length:,} bytes, more")
            # `read1` returns the bytes that have arrived; `read` would wait for a whole chunk.
            while chunk := response.read1(_CHUNK):
                # Counted before the write, so that a file without a length stays below the limit.
                self._received += len(chunk)
                if self._received > self._most:
                    raise self._too_long("more")
                with self._writing:
                    if self._stopped.is_set():
                        return
                    self._file.write(chunk)
            # urllib does not report a connection that ends early.
            if length is not None and self._received < length:
                raise FetchError(f"{self._received:,} of {length:,} bytes arrived")

    def _too_long(self, found: str) -> FetchError:
        return FetchError(
            f"it has {found} than the {self._most:,} bytes allowed; {MOST_BYTES}=BYTES allows more"
        )


MOST_BYTES = "MOLF_MAX_DOWNLOAD"
_DEFAULT_MOST = 4 * 2**30


def most_bytes() -> int:
    """Return the largest size of a download in bytes: `MOLF_MAX_DOWNLOAD`, else 4 GiB.

    Raises:
        FetchError: The environment variable is not a positive integer.
    """
    given = os.environ.get(MOST_BYTES)
    if not given:
        return _DEFAULT_MOST
    if not given.isdecimal() or not 0 < int(given[:20]) < 2**63:
        raise FetchError(f"{MOST_BYTES}={given} is not a number of bytes")
    return int(given)
