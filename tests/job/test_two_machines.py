"""Two agents of `torchrun`, as on two machines, by the command of `docs/sharding.md`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from resumed_runs import assert_same_runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KILLED = ROOT / "tests" / "helpers" / "killed_machine.py"
FURTHER = ("--no-report", "--no-spectra")


@pytest.fixture(scope="module")
def documented():
    """The words of the command for two machines, up to `molf`, with one process on each."""
    text = (ROOT / "docs" / "sharding.md").read_text()
    command = re.search(r"^torchrun --nnodes 2 .*?\\\n\s+-m molf train", text, re.M | re.S)[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = command.replace("\\\n", "").split()
    words[0:1] = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.2"]
    changed = {"node0:29500": f"127.0.0.1:{port}", "8": "1"}
    return [changed.get(word, word) for word in words][:-3]


@pytest.fixture
def agents(tmp_path):
    """Starts an agent; those that still run at the end are ended."""
    started = []

    def start(words, name, **variables):
        with (tmp_path / f"{name}.txt").open("w") as file:
            one = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **variables}
            )
        started.append(one)
        return one, tmp_path / f"{name}.txt"

    yield start
    for one in started:
        one.terminate()
        one.wait(timeout=60)


def wait_for_store(words):
    """Wait until an agent listens, which is then `node0` of the documentation."""
    port = int(words[words.index("--rdzv_endpoint") + 1].rpartition(":")[2])
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    pytest.fail("no agent listens")


@pytest.fixture(scope="module")
def two(launch, command, folder):
    """A run of two processes of one machine."""
    path = folder / "one machine"
    launch.to_the_end(command(path, 5, 1, "--fsdp", "all", *FURTHER))
    return path


def test_two_machines_train_as_one(documented, agents, command, folder, two):
    path = folder / "two machines"
    given = ["-m", "molf", *command(path, 5, 1, "--fsdp", "all", *FURTHER, "--resume")]
    started = [agents([*documented, *given], name) for name in ("first", "second")]
    for one, printed in started:
        assert one.wait(timeout=240) == 0, printed.read_text()
    assert_same_runs(two, path)


def test_machine_that_fails(documented, agents, command, folder, two):
    """The other agent waits for a machine, then ends; both are started again and continue."""
    path = folder / "failed machine"
    given = command(path, 5, 1, "--fsdp", "all", *FURTHER, "--resume")
    words = [*documented, "--rdzv_conf", "join_timeout=5", str(KILLED), *given]
    left, printed = agents(words, "left")
    wait_for_store(words)
    failed, _ = agents(words, "failed", KILLED_AT="6")
    assert failed.wait(timeout=240) == -signal.SIGKILL, printed.read_text()
    assert left.wait(timeout=240) == 1
    assert "The connection to another process is lost: it has ended." in printed.read_text()
    assert "RendezvousTimeoutError" in printed.read_text()
    started = [agents([*documented, "-m", "molf", *given], name) for name in ("third", "fourth")]
    for one, printed in started:
        assert one.wait(timeout=240) == 0, printed.read_text()
    said = "".join(printed.read_text() for _, printed in started)
    assert f"Resuming {path} from checkpoint-4." in said
    assert_same_runs(two, path)
