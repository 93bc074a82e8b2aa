"""The worker's main loop: answer requests from a pipe in a restricted process.

This module runs in the worker and imports only the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from molf.sql.frames import read_frame, write_frame

if sys.platform != "win32":
    import resource
    import signal

Handler = Callable[[dict[str, Any]], str]
"""Converts a request to the JSON text of its reply."""

_MAX_REQUEST_BYTES = 2**30  # the parent is trusted, and its own limits are far lower
_ALARM_FACTOR = 2


def serve(prepare: Callable[[dict[str, Any]], Handler]) -> None:
    """Answer requests until the parent ends; then remove the working directory, if empty.

    Args:
        prepare: Converts the settings (the first message) to a handler of requests, and restricts
            the process. Its exceptions are reported to the parent.
    """
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    settings = json.loads(read_frame(requests, _MAX_REQUEST_BYTES))
    try:
        handle = prepare(settings)
    except Exception as error:
        ready = {"ready": False, "error": f"{type(error).__name__}: {error}"}
        write_frame(replies, json.dumps(ready).encode())
        return
    write_frame(replies, b'{"ready": true}')
    while True:
        try:
            request = json.loads(read_frame(requests, _MAX_REQUEST_BYTES))
        except EOFError:  # the parent has ended without removing the folder
            with contextlib.suppress(OSError):
                os.rmdir(os.getcwd())
            return
        # Later than the parent's timer, which knows the reason.
        _set_alarm(_ALARM_FACTOR * settings["seconds"] + 1)
        reply = handle(request).encode()
        _set_alarm(0)
        write_frame(replies, reply)


def restrict_process(address_space_bytes: int, *, open_files: bool) -> None:
    """Limit this process's memory, files, child processes and core dumps.

    Windows has no such limits: only SQLite's limits and the parent's timer apply. macOS does not
    enforce the address space.

    Args:
        address_space_bytes: Limit of the process's virtual memory.
        open_files: Whether files may still be opened for reading. Otherwise opening any file
            fails.
    """
    if sys.platform == "win32":
        return
    if sys.platform != "darwin":
        _lower(resource.RLIMIT_AS, address_space_bytes)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_NPROC, 0)
    if not open_files:
        _lower(resource.RLIMIT_NOFILE, 3)  # the two pipes and the null device are open already


def _lower(limit: int, value: int) -> None:
    # A process cannot raise its hard limit again.
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _set_alarm(seconds: float) -> None:
    """Set a timer that kills this process, in case the parent has ended and cannot."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)
