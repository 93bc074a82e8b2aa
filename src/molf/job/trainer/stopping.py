"""Stop a training after its current step at a signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from molf.ranks import launched_count

# A job scheduler, Ctrl-C, a closed terminal. Windows has no SIGHUP.
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP")


class StopRequest:
    """Whether a signal has asked to stop; a second signal ends the process as usual.

    Attributes:
        number: The signal; 0 before one arrived.
    """

    def __init__(self) -> None:
        self.number = 0

    @property
    def name(self) -> str | None:
        """Name of the signal; None before one arrived."""
        return signal.Signals(self.number).name if self.number else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep the first signal during the block; no-op outside of the main thread."""
        replaced: dict[int, Any] = {}

        def keep(number: int, frame: FrameType | None) -> None:
            # A launcher sends Ctrl-C on to processes that have it already, and later kills them.
            if not self.number or launched_count() > 1:
                self.number = self.number or number
                return
            usual = replaced[number]
            if callable(usual):
                usual(number, frame)
            else:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():
            numbers = []  # Python allows handlers in the main thread only
        for number in numbers:
            # An ignored signal stays ignored, such as SIGHUP under nohup.
            if (usual := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                replaced[number] = usual
        for number in replaced:
            signal.signal(number, keep)
        try:
            yield
        finally:
            for number, usual in replaced.items():
                signal.signal(number, usual)
