"""`molf report --watch`: the page of the files as they are, on loopback, while a run is running."""

import http.client
import re
import socket

import pytest

from molf.cli import main
from molf.disk.locks import Lock
from molf.report.place import is_page
from molf.report.watching import HOST, Watcher
from run_files import write_evaluation, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", complete=False)


def get(watcher, path="/", host=None):
    port = int(re.search(r":(\d+)/", watcher.address)[1])
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_page_follows_the_files(run):
    with Watcher([run]) as watcher:
        with Lock(run):
            status, page = get(watcher)
            assert status == 200
            assert '<meta http-equiv="refresh" content="10">' in page
            assert ">running</span>" in page
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 61, "loss": 0.5}\n')
            assert "61 of 60" in get(watcher)[1]
        status, page = get(watcher)
        assert ">stopped</span>" in page
        assert 'http-equiv="refresh"' not in page


def test_other_paths_and_names_are_refused(run):
    with Watcher([run]) as watcher:
        assert get(watcher, "/config.yaml")[0] == 404
        assert get(watcher, host="example.com")[0] == 403
        assert get(watcher, host="localhost:1")[0] == 200
        (run / "config.yaml").unlink()
        assert get(watcher)[0] == 503


def test_watch_ends_with_the_run(run, monkeypatch, capsys):
    seen = []
    lock = Lock(run)

    def pause(seconds):
        seen.append(capsys.readouterr().out)
        write_evaluation(run)
        lock.release()

    monkeypatch.setattr(Watcher.wait, "__defaults__", (pause,))
    assert main(["report", str(run), "--watch"]) == 0
    assert re.fullmatch(r"watch     http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", seen[0])
    assert capsys.readouterr().out.splitlines()[0] == "run: complete"
    assert ">complete</span>" in (run / "report.html").read_text()


def test_watch_of_an_ended_run_writes_the_page(run, capsys):
    assert main(["report", str(run), "--watch"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "watch     no run is running",
        "run: stopped",
    ]
    assert is_page(run / "report.html")


def test_used_port(run, capsys):
    with socket.create_server((HOST, 0)) as taken, Lock(run):
        port = taken.getsockname()[1]
        assert main(["report", str(run), "--watch", "--port", str(port)]) == 2
        assert f"port {port} cannot be used: " in capsys.readouterr().err
        assert main(["report", str(run), "--watch", "--port", "70000"]) == 2
        assert "port 70000 cannot be used: " in capsys.readouterr().err
    assert not (run / "report.html").exists()
