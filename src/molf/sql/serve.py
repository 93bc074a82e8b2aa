"""The worker's side: answer requests from the pipe, in a process that can do little else.

Runs in the worker, so it imports the standard library alone.
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
"""From a request to the JSON text of its reply."""

_MAX_REQUEST_BYTES = 2**30  # the parent is trusted; its own limits are far below
_ALARM_FACTOR = 2


def serve(prepare: Callable[[dict[str, Any]], Handler]) -> None:
    """Answer requests until the parent goes away; then remove the working directory, if empty.

    Args:
        prepare: From the settings, the first message, to the handler of the requests. It locks the
            process down. An exception of it is reported to the parent.
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
        except EOFError:  # the parent is gone, and cannot clean up any more
            with contextlib.suppress(OSError):
                os.rmdir(os.getcwd())
            return
        _set_alarm(_ALARM_FACTOR * settings["seconds"] + 1)
        reply = handle(request).encode()
        _set_alarm(0)
        write_frame(replies, reply)


def restrict_process(address_space_bytes: int, *, open_files: bool) -> None:
    """Give up what a worker does not need: memory, files, processes, core dumps.

    Windows has no such limits; there SQLite's own and the parent's clock have to do. macOS does
    not enforce the address space.

    Args:
        address_space_bytes: Limit of the process's virtual memory.
        open_files: Whether files may still be opened, for reading alone. Without it, opening
            anything fails, whatever it is that tries.
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
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _set_alarm(seconds: float) -> None:
    """Have the kernel end this process after so long: nobody else would if the parent were gone."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)
