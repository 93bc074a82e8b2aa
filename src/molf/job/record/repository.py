"""Find the git commit of the working directory, without running programs of its repository.

A repository's configuration can name programs (file system monitors, hooks, filters, pagers), and
any folder may contain one. Therefore git searches for changes with a configuration of molf.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_TIMEOUT = 10  # seconds; a huge folder of new files takes longer
# Variables passed on to git. Others may name another repository, or programs.
_ALLOWED = (
    "GIT_CEILING_DIRECTORIES",
    "GIT_CONFIG_GLOBAL",
    "GIT_CONFIG_NOSYSTEM",
    "GIT_CONFIG_SYSTEM",
    "GIT_DISCOVERY_ACROSS_FILESYSTEM",
    "GIT_EXEC_PATH",
)
_OPTIONS = ("--no-pager", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")


class _Repository(NamedTuple):
    tree: str
    objects: str
    index_file: str
    object_format: str
    commit: str


def repository() -> dict[str, Any] | None:
    """Return the commit of the working directory's repository, and whether it has changes.

    Returns:
        `commit` and `dirty`; `dirty` is None if it is not known. None without git, repository or
        commit, and in a repository of another user.
    """
    try:
        found = _find()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    try:
        dirty = _is_dirty(found)
    except (OSError, subprocess.SubprocessError):
        dirty = None
    return {"commit": found.commit, "dirty": dirty}


def _find() -> _Repository:
    # Reads names only. Reading the tree or the index could run programs.
    lines = _git(
        *("rev-parse", "--path-format=absolute", "--show-toplevel"),
        *("--git-path", "objects", "--git-path", "index", "--show-object-format", "HEAD"),
    ).splitlines()
    tree, objects, index_file, object_format, commit = lines
    return _Repository(tree, objects, index_file, object_format, commit)


def _is_dirty(found: _Repository) -> bool:
    with tempfile.TemporaryDirectory(prefix="molf-git-") as folder:
        own = Path(folder)
        (own / "refs").mkdir()
        (own / "HEAD").write_text(f"{found.commit}\n", encoding="utf-8")
        (own / "config").write_text(
            "[core]\n\trepositoryformatversion = 1\n\tbare = false\n"
            f"[extensions]\n\tobjectFormat = {found.object_format}\n",
            encoding="utf-8",
        )
        where = {
            "GIT_DIR": folder,
            "GIT_WORK_TREE": found.tree,
            "GIT_OBJECT_DIRECTORY": found.objects,
            "GIT_INDEX_FILE": found.index_file,
        }
        # Submodules are ignored, because git would read their configuration.
        return bool(_git("status", "--porcelain", "--ignore-submodules=all", variables=where))


def _git(*arguments: str, variables: Mapping[str, str] | None = None) -> str:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name in _ALLOWED
    }
    own = {
        "GIT_ALLOW_PROTOCOL": "none",  # missing objects are not fetched
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_OPTIONAL_LOCKS": "0",  # the index is not rewritten
        "GIT_TERMINAL_PROMPT": "0",
    }
    finished = subprocess.run(
        ["git", *_OPTIONS, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=_TIMEOUT,
        env={**kept, **own, **(variables or {})},
    )
    return os.fsdecode(finished.stdout).strip()
