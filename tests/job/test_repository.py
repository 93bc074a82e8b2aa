"""What is recorded of the repository that a run is started in, which nobody need trust."""

import os
import shutil
import subprocess
from datetime import datetime

import pytest
import torch

from molf.job.record.environment import environment

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(*arguments):
    quiet = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    finished = subprocess.run(
        ["git", *who, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | quiet,
    )
    return finished.stdout.strip()


def recorded():
    return environment(torch.device("cpu"), datetime.now().astimezone())["git"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit; the process stands in it."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "repository"
    path.mkdir()
    monkeypatch.chdir(path)
    git("init", "-q")
    (path / "a.txt").write_text("a\n")
    (path / ".gitignore").write_text("*.log\n")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    return path


def test_commit_and_changes_are_recorded(repository, tmp_path, monkeypatch):
    commit = git("rev-parse", "HEAD")
    assert recorded() == {"commit": commit, "dirty": False}
    (repository / "ignored.log").write_text("")
    assert recorded() == {"commit": commit, "dirty": False}
    (repository / "inner").mkdir()
    monkeypatch.chdir("inner")
    (repository / "a.txt").write_text("b\n")
    assert recorded() == {"commit": commit, "dirty": True}
    git("-C", str(repository), "checkout", "-q", "a.txt")
    (repository / "new.txt").write_text("")
    assert recorded() == {"commit": commit, "dirty": True}
    (repository / "new.txt").unlink()
    git("worktree", "add", "-q", str(tmp_path / "tree"))
    monkeypatch.chdir(tmp_path / "tree")
    assert recorded() == {"commit": commit, "dirty": False}
    monkeypatch.chdir(tmp_path)
    assert recorded() is None
    # Variables that name another repository, as git sets them for its hooks.
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert recorded() is None


def test_a_repository_without_a_commit_or_without_git(tmp_path, repository, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    git("init", "-q")
    assert recorded() is None
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recorded() is None


@pytest.fixture
def trap(tmp_path):
    """A command that leaves a file behind when anything runs it."""
    script = tmp_path / "trap"
    script.write_text(f"#!/bin/sh\ntouch '{tmp_path}/sprung'\ncat 2>/dev/null\nexit 0\n")
    script.chmod(0o755)
    return script


CONFIGURED = {
    "fsmonitor": {"core.fsmonitor": "TRAP"},
    "hooks": {"core.hooksPath": "HOOKS"},
    "hooks of the repository": {},
    "filter": {"filter.evil.clean": "TRAP", "filter.evil.smudge": "TRAP"},
    "process": {"filter.evil.process": "TRAP", "filter.evil.required": "true"},
    "diff": {"diff.external": "TRAP", "diff.evil.command": "TRAP", "diff.evil.textconv": "TRAP"},
    "alias": {"alias.status": "!TRAP", "alias.rev-parse": "!TRAP"},
    "pager": {"core.pager": "TRAP", "pager.status": "TRAP", "pager.rev-parse": "TRAP"},
    "ssh": {
        "core.sshCommand": "TRAP",
        "remote.origin.url": "ssh://example.org/x",
        "remote.origin.promisor": "true",
        "extensions.partialClone": "origin",
    },
    "editor": {"core.editor": "TRAP", "sequence.editor": "TRAP", "core.askPass": "TRAP"},
    "credential": {"credential.helper": "!TRAP", "gpg.program": "TRAP"},
    "submodule": {"submodule.recurse": "true", "status.submoduleSummary": "true"},
    "include": {"include.path": "INCLUDED"},
}


@pytest.mark.parametrize("kind", CONFIGURED)
def test_nothing_of_a_repository_is_run(kind, repository, trap, tmp_path):
    def plant(where):
        hooks = where / ".git" / "hooks"
        hooks.mkdir(exist_ok=True)
        if kind.startswith("hooks"):
            for name in ("post-index-change", "fsmonitor-watchman", "pre-auto-gc", "post-checkout"):
                shutil.copy(trap, hooks / name)
        (tmp_path / "included").write_text(f"[core]\n\tfsmonitor = {trap}\n")
        for name, value in CONFIGURED[kind].items():
            value = value.replace("TRAP", str(trap)).replace("HOOKS", str(hooks))
            git(
                "-C",
                str(where),
                "config",
                name,
                value.replace("INCLUDED", str(tmp_path / "included")),
            )

    inner = tmp_path / "inner"
    inner.mkdir()
    git("-C", str(inner), "init", "-q")
    (inner / "b.txt").write_text("b\n")
    git("-C", str(inner), "add", "-A")
    git("-C", str(inner), "commit", "-q", "-m", "inner")
    git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner), "inner")
    (repository / ".gitattributes").write_text("*.txt filter=evil diff=evil\n")
    git("add", "-A")
    git("commit", "-q", "-m", "second")
    commit = git("rev-parse", "HEAD")
    submodule = repository / ".git" / "modules" / "inner"
    shutil.rmtree(repository / "inner")
    shutil.copytree(inner, repository / "inner")  # with a folder .git of its own
    assert submodule.is_dir()
    (repository / ".git" / "info" / "attributes").write_text("* filter=evil diff=evil\n")
    for where in (repository, repository / "inner"):
        plant(where)
    for path in (repository / "a.txt", repository / "inner" / "b.txt"):
        os.utime(path, (1, 1))  # git must look at its contents
    (tmp_path / "sprung").unlink(missing_ok=True)
    index = (repository / ".git" / "index").read_bytes()
    found = recorded()
    assert not (tmp_path / "sprung").exists()
    assert found is not None
    assert found["commit"] == commit
    assert (repository / ".git" / "index").read_bytes() == index
