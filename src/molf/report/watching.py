"""Serve the page of running runs on loopback, built from their files at each request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from molf.errors import InputError, system_reason
from molf.masking import mask_given
from molf.report.build import read_runs
from molf.report.page import render
from molf.report.run_data import RUNNING, RunData

HOST = "127.0.0.1"
REFRESH = 10  # seconds between two loads of the page, and between two looks at the runs
_HOSTS = (HOST, "localhost")


class Watcher:
    """A server of the page; it answers on loopback alone.

    Args:
        paths: The directories of the runs.
        port: Port; 0 for a free one.
        refresh: Seconds after which a browser loads the page again.

    Attributes:
        address: Address of the page.

    Raises:
        InputError: The port cannot be used.
    """

    def __init__(self, paths: Sequence[Path], port: int = 0, refresh: int = REFRESH) -> None:
        self._paths, self._refresh = tuple(paths), refresh
        self._lock = threading.Lock()
        try:
            self._server = ThreadingHTTPServer((HOST, port), self._handler())
        except (OSError, OverflowError) as error:
            reason = system_reason(error) if isinstance(error, OSError) else str(error)
            raise InputError(
                f"port {port} cannot be used: {reason.rstrip('.')}. Give another."
            ) from error
        self._server.daemon_threads = True
        self.address = f"http://{HOST}:{self._server.server_address[1]}/"

    def __enter__(self) -> Watcher:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def page(self) -> tuple[str, list[RunData]]:
        """Return the page of the files as they are now, and the runs."""
        with self._lock:  # one build at a time, however many windows are open
            runs = read_runs(self._paths)
            is_running = any(run.status == RUNNING for run in runs)
            return render(runs, refresh=self._refresh if is_running else None), runs

    def wait(self, pause: Callable[[float], None] = time.sleep) -> list[RunData]:
        """Return the runs when none is running any more."""
        while True:
            runs = read_runs(self._paths)
            if all(run.status != RUNNING for run in runs):
                return runs
            pause(self._refresh)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        watcher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                """Answer with the page, or with an error."""
                # A page elsewhere may let a name of its own lead to loopback, to read this one.
                host = self.headers.get("Host", "")
                if urlsplit(f"//{host}").hostname not in _HOSTS:
                    self.send_error(403)
                    return
                if urlsplit(self.path).path != "/":
                    self.send_error(404)
                    return
                try:
                    html, _ = watcher.page()
                except InputError as error:  # the directory was deleted or replaced
                    self.send_error(503, str(error)[:200].encode("ascii", "replace").decode())
                    return
                body = mask_given(html).encode("utf-8")
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Print no line for each request."""

        return Handler
