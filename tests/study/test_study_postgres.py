"""Workers on a PostgreSQL server, which the test starts as a user that is not root."""

import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from molf.cli import main
from molf.study.ledger import Ledger
from molf.study.outcome import all_results
from molf.study.plan import Plan
from study_helpers import start_worker, study_of, write_study


def _program(name):
    found = shutil.which(name) or max(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), default=None)
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed (Debian: apt-get install postgresql)")
    return found


def _server_user():
    """The user to start the server as: it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres")


@pytest.fixture
def address():
    """The address of a database on a new server."""
    control, init, user = _program("pg_ctl"), _program("initdb"), _server_user()
    # pytest's folders are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="molf-postgres-"))
    own = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    data = folder / "data"
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"

    def run(*command):
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **own)

    run(init, "-D", data, "-U", "molf", "-A", "trust", "-E", "UTF8")
    log = folder / "log"
    start = [control, "-D", data, "-o", options, "-l", log, "-w", "start"]
    subprocess.run(start, check=True, stdout=subprocess.DEVNULL, cwd=folder, **own)
    try:
        yield f"postgresql://molf:geheim@127.0.0.1:{port}/postgres"
    finally:
        run(control, "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.mark.slow
def test_workers_on_postgresql_one_killed(tmp_path, address, capsys):
    changes = {"storage": address, "heartbeat": 1}
    path = write_study(tmp_path, **changes)
    log = tmp_path / "log"
    workers = [start_worker(path, log, 0.3) for _ in range(3)]
    deadline = time.monotonic() + 120
    while not (log.exists() and f"start {workers[0].pid} " in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers[0].send_signal(signal.SIGKILL)
    codes = [worker.wait(120) for worker in workers]
    assert codes == [-signal.SIGKILL, 0, 0]

    study, make = study_of(tmp_path, **changes)
    ended = Counter(
        line.split(" ", 2)[2] for line in log.read_text().splitlines() if line.startswith("end")
    )
    assert len(ended) == len(all_results(study)) == study.size
    assert set(ended.values()) == {1}
    snapshot = Ledger(study).read()
    assert not Plan(study, snapshot.outcomes, make, snapshot.drawn).unfinished
    assert not (study.output_dir / "optuna.sqlite").exists()

    assert main(["study", "status", str(path)]) == 0
    assert f"{study.size} of {study.size} trials complete" in capsys.readouterr().out
    assert "geheim" not in (study.output_dir / "study.json").read_text()
