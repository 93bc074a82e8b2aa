"""Locks that the kernel keeps: held, shared, gone with their process, and with what they are on."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from molf.disk.locks import InUseError, Lock, in_use, is_abandoned

HOLD = """
import os, sys, time
from pathlib import Path
from molf.disk.locks import Lock
lock = Lock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


def test_one_holds_it(tmp_path):
    with Lock(tmp_path):
        assert in_use(tmp_path)
        assert in_use(tmp_path, by_writers=True)
        assert not is_abandoned(tmp_path)
        with pytest.raises(InUseError):
            Lock(tmp_path, wait=0)
        with pytest.raises(InUseError):
            Lock(tmp_path, shared=True, wait=0)
    assert not in_use(tmp_path)
    assert is_abandoned(tmp_path)
    assert not in_use(tmp_path / "nothing")


def test_readers_share_it(tmp_path):
    with Lock(tmp_path, shared=True), Lock(tmp_path, shared=True, wait=0):
        assert in_use(tmp_path)
        assert not in_use(tmp_path, by_writers=True)


def test_somebody_who_looks_is_waited_for(tmp_path):
    import threading

    held = Lock(tmp_path)
    threading.Timer(0.1, held.release).start()
    Lock(tmp_path).release()


def test_a_killed_process_holds_nothing_though_its_child_lives(tmp_path):
    """As data workers do, the child inherits what the parent had open."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        assert in_use(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not in_use(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_where_it_is(tmp_path):
    path, moved = tmp_path / "a", tmp_path / "b"
    path.mkdir()
    with Lock(path) as lock:
        assert lock.is_at(path)
        path.rename(moved)
        path.mkdir()  # another's
        assert not lock.is_at(path)
        assert lock.is_at(moved)
        assert lock.place() == moved
        shutil.rmtree(moved)
        assert not lock.is_at(moved)
        assert lock.place() is None
    assert not lock.is_at(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    started = time.monotonic()
    assert not in_use(tmp_path / "pipe")
    assert time.monotonic() - started < 5
