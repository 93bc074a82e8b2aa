"""Processes that are forked from one server, which has imported everything that takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

_PRELOADED = ["killed_training", "killed_run", "launched"]


def forking() -> ForkServerContext:
    """Return the context of the server, which is started here and has imported everything.

    A process has one server: tests of several files share it, so that it preloads for all of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        # The server gets the environment, but not the path of modules (Python 3.11). Modules that
        # it cannot import are left out without an error.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    ready = context.Process(target=int)  # is forked when the server has imported everything
    ready.start()
    ready.join()
    return context


def start_forked(function: Callable[..., object], given: tuple[Any, ...], count: int) -> None:
    """Run a function in several processes, each with its number first; wait until all have ended.

    An error in one of them ends the others and is raised. A spawned process would import torch and
    transformers again, which takes seconds.
    """
    from torch.multiprocessing import start_processes

    forking()
    start_processes(function, given, nprocs=count, start_method="forkserver")


def write_imported(path: Path) -> None:
    """Write the names of the modules that this process has, a line each."""
    path.write_text("\n".join(sys.modules))
