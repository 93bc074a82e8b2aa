"""A worker process that answers requests and can be killed at any time."""

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

_START_SECONDS = 60.0  # on an idle machine, a start takes a fraction of a second

# -I: ignore environment variables and the user's site; -S: no site-packages, whose start-up hooks
# may import anything; -B: write no byte code.
_OPTIONS = ("-I", "-S", "-B")
_BOOT = (
    "import sys; sys.path += sys.argv[2:]; "
    "from importlib import import_module; import_module(sys.argv[1]).main()"
)
# The only environment variables passed on: an interpreter may need them to start.
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


class WorkerError(RuntimeError):
    """A worker did not answer and has been killed.

    Attributes:
        timed_out: Whether the time limit was exceeded; else it died or its reply was invalid.
    """

    def __init__(self, message: str, *, timed_out: bool) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class Worker:
    """A process that runs `main()` of a module and answers one request at a time.

    It is a new interpreter, not a fork, because this process may have threads, a GPU and much
    memory. Messages are JSON: replies are parsed as data, never unpickled.

    Args:
        module: The module that the process runs; it uses `molf.sql.serve`.
        settings: The first message to the process.
        folder: The working directory of the process. If this process ends without `close`, the
            worker removes the folder if it is empty.
        paths: Import folders beside the standard library and this package.

    Raises:
        RuntimeError: The process did not start.
    """

    def __init__(
        self, module: str, settings: dict[str, Any], folder: str, paths: tuple[str, ...] = ()
    ) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        # Tokens in other variables stay out of reach of hostile SQL.
        environment = {k: os.environ[k] for k in _KEPT_VARIABLES if k in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, *_OPTIONS, "-c", _BOOT, module, package_root, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A traceback would be mixed with the progress.
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
    def usable(self) -> bool:
        """Whether the process can answer requests."""
        return not self._expired and self._process.poll() is None

    def ask(self, request: dict[str, Any], seconds: float, max_bytes: int) -> bytes:
        """Send a request and wait for the reply.

        If this call is interrupted, close the process: the reply to this request would be taken
        for that to the next one.

        Args:
            request: JSON values.
            seconds: Time after which the process is killed.
            max_bytes: Largest reply in bytes.

        Raises:
            WorkerError: There is no reply; the process has ended.
        """
        timer = threading.Timer(seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            # Both calls wait for the process; they end when the timer kills it.
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
        """Kill the process and wait for its end."""
        self._process.kill()  # works on a stopped process too
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # unsent bytes cannot be flushed any more
                    stream.close()

    def _expire(self) -> None:
        self._expired = True
        self._process.kill()
