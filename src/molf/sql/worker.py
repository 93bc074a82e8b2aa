"""A process to ask that can be killed at any time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO, cast

from molf.sql.frames import read_frame, write_frame

_START_SECONDS = 60.0  # far above the fraction of a second that it takes on an idle machine

# Isolated (-I: no variables, no user's site), without site-packages (-S: no start-up hooks, which
# may import anything) and without writing byte code (-B).
_OPTIONS = ("-I", "-S", "-B")
_BOOT = (
    "import sys; sys.path += sys.argv[2:]; "
    "from importlib import import_module; import_module(sys.argv[1]).main()"
)
# Nothing of the environment is passed on but what an interpreter may need to start.
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


class WorkerError(RuntimeError):
    """A worker did not answer and has been killed.

    Attributes:
        timed_out: Whether it took too long; else it died or answered nonsense.
    """

    def __init__(self, message: str, *, timed_out: bool) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class Worker:
    """A process that runs `main()` of a module and answers one request at a time.

    It is started as a fresh interpreter, not forked, since this process may hold threads, a GPU and
    much memory. Messages are JSON: what comes back is read as data and never unpickled.

    Args:
        module: The module that the process runs; it uses `molf.sql.serve`.
        settings: Its first message.
        folder: Its working directory. If this process ends without closing it, it removes the
            folder, provided that is empty.
        paths: Folders to import from, beside the standard library and this package's own.

    Raises:
        RuntimeError: The process did not start.
    """

    def __init__(
        self, module: str, settings: dict[str, Any], folder: str, paths: tuple[str, ...] = ()
    ) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        environment = {k: os.environ[k] for k in _KEPT_VARIABLES if k in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, *_OPTIONS, "-c", _BOOT, module, package_root, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={**environment, "TZ": "UTC"},  # the same local time everywhere
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )
        self._expired = False
        try:
            ready = json.loads(self.ask(settings, _START_SECONDS, 2**16))
        except (WorkerError, ValueError) as error:
            self.close()
            raise RuntimeError(f"A worker for {module} did not start: {error}") from error
        if not ready["ready"]:
            self.close()
            raise RuntimeError(f"A worker for {module} did not start: {ready['error']}")

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def usable(self) -> bool:
        """Whether it can be asked."""
        return not self._expired and self._process.poll() is None

    def ask(self, request: dict[str, Any], seconds: float, max_bytes: int) -> bytes:
        """Send a request and wait for the reply.

        Where this is interrupted, the process must be closed: the next reply would be this one's.

        Args:
            request: JSON values.
            seconds: When to kill the process.
            max_bytes: A larger reply is not read.

        Raises:
            WorkerError: There is no reply; the process is gone.
        """
        timer = threading.Timer(seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            # Both block, and both end when the timer kills the process.
            write_frame(cast(BinaryIO, self._process.stdin), json.dumps(request).encode())
            return read_frame(cast(BinaryIO, self._process.stdout), max_bytes)
        except (OSError, EOFError, ValueError) as error:
            self.close()
            if self._expired:
                raise WorkerError(f"no answer in {seconds:g} s", timed_out=True) from error
            status = self._process.returncode
            raise WorkerError(f"{error} Exit status {status}.", timed_out=False) from error
        finally:
            timer.cancel()
            timer.join()

    def close(self) -> None:
        """Kill the process and wait until it is gone."""
        self._process.kill()  # works on a stopped process too
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # unsent bytes cannot be flushed any more
                    stream.close()

    def _expire(self) -> None:
        self._expired = True
        self._process.kill()
