"""A small server on loopback that answers pushes as the Hub does, and keeps all it received."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_" + "a1B2c3D4" * 4


@dataclass
class Repository:
    """A repository: whether it is private, and the files of each branch."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


@dataclass
class FakeHub:
    """All that a fake hub has received.

    Attributes:
        address: Where it listens.
        repos: Repositories by `owner/name`.
        requests: Method and path of all requests.
        tokens: The values of the header `authorization`.
        agents: The values of the header `user-agent`.
        commits: Repository, branch, title and paths of each commit.
        failures: Status codes to answer with before anything else, by a part of the path.
        large: Whether weights are uploaded as large files, before the commit.
    """

    address: str = ""
    repos: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    agents: set[str | None] = field(default_factory=set)
    commits: list[tuple[str, str, str, list[str]]] = field(default_factory=list)
    failures: dict[str, list[int]] = field(default_factory=dict)
    large: bool = True
    objects: dict[str, bytes] = field(default_factory=dict)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        return self.repos[repo].branches[branch]


def _handler(hub: FakeHub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *given: Any) -> None:
            """Print nothing."""

        def answer(self, status: int, value: Any = None) -> None:
            content = json.dumps({} if value is None else value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def handle_all(self) -> None:
            path, content = urlsplit(self.path).path, self.body()
            hub.requests.append((self.command, path))
            hub.agents.add(self.headers.get("user-agent"))
            for part, codes in hub.failures.items():
                if part in path and codes:
                    return self.answer(codes.pop(0), {"error": "on purpose"})
            if path.startswith("/objects/"):
                hub.objects[path.rpartition("/")[2]] = content
                return self.answer(200)
            hub.tokens.add(self.headers.get("authorization"))
            if self.headers.get("authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid user token."})
            return self.answer(*self.reply(path, content))

        do_GET = do_POST = do_PUT = do_HEAD = handle_all  # noqa: N815

        def reply(self, path: str, content: bytes) -> tuple[int, Any]:
            if path.endswith(".git/info/lfs/objects/batch"):
                wanted = json.loads(content)["objects"]
                for one in wanted:
                    href = f"{hub.address}/objects/{one['oid']}"
                    one["actions"] = {"upload": {"href": href}}
                return 200, {"transfer": "basic", "objects": wanted}
            if path == "/api/validate-yaml":
                return 200, {}
            given = json.loads(content) if path == "/api/repos/create" else None
            if given is not None:
                name = f"{given['organization'] or 'me'}/{given['name']}"
                is_known = name in hub.repos
                if not is_known:
                    is_private = given.get("visibility") == "private" or given.get("private")
                    hub.repos[name] = Repository(bool(is_private))
                return 409 if is_known else 200, {"url": f"{hub.address}/{name}"}
            owner, name, *action = path.removeprefix("/api/models/").split("/")
            repo = f"{owner}/{name}"
            if repo not in hub.repos:
                return 404, {"error": "Repository not found"}
            if not action or action[0] == "revision":
                is_private = hub.repos[repo].private
                return 200, {"id": repo, "private": is_private, "sha": "0" * 40, "siblings": []}
            branch = unquote(action[1])
            if action[0] == "branch":
                hub.repos[repo].branches.setdefault(branch, dict(hub.files(repo)))
                return 200, {}
            if branch not in hub.repos[repo].branches:
                return 404, {"error": f"Invalid rev id: {branch}"}
            if action[0] == "preupload":
                files = json.loads(content)["files"]
                for one in files:
                    is_large = hub.large and one["path"].endswith(".safetensors")
                    one["uploadMode"] = "lfs" if is_large else "regular"
                    one["shouldIgnore"] = False
                return 200, {"files": files}
            return 200, self.commit(repo, branch, content)

        def commit(self, repo: str, branch: str, content: bytes) -> Any:
            title, paths = "", []
            for line in content.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    title = value["summary"]
                    continue
                paths.append(value["path"])
                if entry["key"] == "lfsFile":
                    found = hub.objects[value["oid"]]
                    assert hashlib.sha256(found).hexdigest() == value["oid"]
                else:
                    found = base64.b64decode(value["content"])
                hub.files(repo, branch)[value["path"]] = found
            hub.commits.append((repo, branch, title, sorted(paths)))
            oid = f"{len(hub.commits):040d}"
            return {"commitUrl": f"{hub.address}/{repo}/commit/{oid}", "commitOid": oid}

    return Handler


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Start a fake hub, and point the client of the Hub to it, with a token."""
    from huggingface_hub import constants

    hub = FakeHub()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Large files go by LFS, which is plain HTTP.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        server.shutdown()
