"""Processes that are forked from one server, which has imported everything that takes seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def forking() -> ForkServerContext:
    """Return the context of the server, which starts with the first process.

    A process has one server: tests of several files share it, so that it preloads for all of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_training", "killed_run"])
    return context
