"""Addresses that send too much, too little, too slowly, or something else than data."""

import contextlib
import http.server
import threading
import time

import pytest

from molf.data import fetch
from molf.data.records import read_records
from molf.errors import InputError


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the address; writes until the reader has gone, or the test has."""

    def do_GET(self):
        with contextlib.suppress(OSError):
            getattr(self, self.path.strip("/").partition(".")[0])()

    def log_message(self, *arguments):
        pass

    def head(self, **headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def good(self):
        self.head(Content_Length="10")
        self.wfile.write(b'[{"a": 1}]')

    def endless(self):
        self.head()
        while True:
            self.wfile.write(b" " * 2**16)

    def announced(self):
        self.head(Content_Length=str(2**50))

    def missing(self):
        self.send_error(404)

    def cut(self):
        self.head(Content_Length="1000")
        self.wfile.write(b'[{"a": 1}]')

    def trickle(self):
        self.head(Content_Length="1000")
        self.drip()

    def slow_head(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        self.drip()

    def drip(self):
        for _ in range(200):
            self.wfile.write(b"x")
            time.sleep(0.05)


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.daemon_threads = True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOLF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    yield
    left = list((tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else []
    assert all("good" in path.name for path in left)


def test_what_an_address_has(server):
    assert read_records(f"{server}/good.json") == [{"a": 1}]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("endless", "it has more than the 100,000 bytes allowed; MOLF_MAX_DOWNLOAD=BYTES"),
        ("announced", "it has 1,125,899,906,842,624 bytes, more than the 100,000 bytes allowed"),
        ("cut", "10 of 1,000 bytes arrived"),
        ("missing", "cannot download"),
    ],
)
def test_refused(server, monkeypatch, name, words):
    monkeypatch.setenv("MOLF_MAX_DOWNLOAD", "100000")
    with pytest.raises(InputError) as raised:
        read_records(f"{server}/{name}.jsonl")
    assert words in str(raised.value)
    assert "--data FILE" in str(raised.value)


@pytest.mark.parametrize("name", ["trickle", "slow_head"])
def test_too_slow(server, monkeypatch, name):
    """Every byte comes in time; another server would go on for days."""
    monkeypatch.setattr(fetch, "_WITHOUT_ANSWER", 0.3)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"\d+ bytes arrived in 0 seconds"):
        read_records(f"{server}/{name}.jsonl")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("given", ["much", "-1", "0", "9" * 5000])
def test_limit_that_is_no_number(server, monkeypatch, given):
    monkeypatch.setenv("MOLF_MAX_DOWNLOAD", given)
    with pytest.raises(InputError, match=r"MOLF_MAX_DOWNLOAD=.* is not a number of bytes"):
        read_records(f"{server}/endless.jsonl")


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/a.json",
        "http://a b/c.json",
        "http://x:port/a.json",
        "http:///a.json",
        f"http://127.0.0.1:1/{'x' * 300}.json",
        "http://127.0.0.1:1/a\x1b\n.json",
        "http://127.0.0.1:1/\u4e2d.json",
    ],
)
def test_odd_addresses(url):
    with pytest.raises(InputError):
        read_records(url)
