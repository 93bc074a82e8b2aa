"""A signal ends a command also where Python or a library drops its exception."""

import importlib
import os
import signal
import sys
import time
import weakref
from contextlib import suppress

import pytest

from molf.cli import main


class Held:
    pass


class Deleted:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def in_a_weakref_callback():
    held = Held()
    _ = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGTERM))
    del held


def in_del():
    Deleted()


def in_a_bare_except():
    with suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def terminable(monkeypatch):
    """SIGTERM has its usual action, and no hook of pytest keeps dropped exceptions."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def ends(monkeypatch, command):
    """The exit code of `molf` with this function as its command."""
    monkeypatch.setattr(importlib.import_module("molf.cli.main"), "app", command)
    return main(["probe"])


@pytest.mark.parametrize("drop", [in_a_weakref_callback, in_del, in_a_bare_except])
def test_a_dropped_sigterm_is_sent_again(monkeypatch, terminable, drop):
    def command(*_, **__):
        drop()
        drop()
        time.sleep(30)

    assert ends(monkeypatch, command) == 143


def test_a_sigterm_that_ends_a_command_is_not_sent_again(monkeypatch, terminable):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *given: sent.append(given))

    def convert(*_, **__):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("while it cleaned up") from None

    def end(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    assert ends(monkeypatch, convert) == 1
    assert ends(monkeypatch, end) == 143
    time.sleep(0.3)
    assert not sent
