"""Start workers as processes of this machine, and wait for them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

_POLL = 0.2  # seconds
_PATIENCE = 60  # seconds that a worker may take to end after SIGTERM


def run_workers(
    arguments: Sequence[str], count: int, restarts: int, say: Callable[[str], None]
) -> int:
    """Run worker processes until all have ended; return the number that ended with an error.

    A worker that is killed is started again. On an interrupt all workers are terminated.

    Args:
        arguments: Arguments of `molf` for a worker.
        count: Number of workers.
        restarts: How often killed workers are started again, together.
        say: Prints one line.
    """
    environment = dict(os.environ)
    # Threads of several workers would wait for one another's cores.
    threads = max(1, (os.cpu_count() or 1) // count)
    environment.setdefault("OMP_NUM_THREADS", str(threads))

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "molf", *arguments], env=environment)

    running = [start() for _ in range(count)]
    failed = 0
    try:
        while running:
            time.sleep(_POLL)
            for worker in list(running):
                code = worker.poll()
                if code is None:
                    continue
                running.remove(worker)
                if code < 0 and restarts > 0:
                    restarts -= 1
                    say(f"worker {worker.pid} was killed by signal {-code}; another one starts")
                    running.append(start())
                elif code != 0:
                    failed += 1
                    say(f"worker {worker.pid} ended with exit code {code}")
    finally:
        _end(running)
    return failed


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
