"""Showing how far a run is: bars on a terminal, a handful of lines anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from molf.console import PlainConsole
from molf.masking import mask_text
from molf.shown import as_line
from molf.streams import silenced

ShowEvaluation = Callable[[str, int, int], None]
ShowTraining = Callable[[int, Mapping[str, Any] | None], None]

_LINES = 10  # of a training, where there is no terminal


class Reporter:
    """Says in plain lines what a run does; for logs and pipes.

    Args:
        console: Where to write; standard error, so that results can be piped.
    """

    def __init__(self, console: PlainConsole) -> None:
        console.file = silenced(console.file)  # a run goes on where nobody can read of it
        self._console = console

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def evaluating(self, title: str) -> Iterator[ShowEvaluation]:
        """Show an evaluation; the function given is told what is done of how much."""
        self.say(title)
        yield lambda what, done, total: None

    @contextmanager
    def training(self, steps: int) -> Iterator[ShowTraining]:
        """Show a training; the function given is told of each step, and of each log entry."""
        every = max(1, steps // _LINES)
        last_shown = 0

        def show(step: int, logs: Mapping[str, Any] | None) -> None:
            nonlocal last_shown
            if logs and (step >= last_shown + every or step in (1, steps)):
                last_shown = step
                self.say(f"  step {step}/{steps}  {describe(logs)}")

        self.say(f"Training: {steps} steps")
        yield show


class TerminalReporter(Reporter):
    """Says the same with bars that move."""

    @contextmanager
    def evaluating(self, title: str) -> Iterator[ShowEvaluation]:
        """Show an evaluation as a bar per kind of measurement."""
        with self._progress() as progress:
            bars: dict[str, Any] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in bars:
                    name = as_line(mask_text(f"{title}: {what}"))
                    bars[what] = progress.add_task(name, total=total, detail="")
                progress.update(bars[what], completed=done, total=total)

            yield show
        self.say(title)

    @contextmanager
    def training(self, steps: int) -> Iterator[ShowTraining]:
        """Show a training as a bar with the last log entry beside it."""
        with self._progress() as progress:
            bar = progress.add_task("Training", total=steps, detail="")
            latest = ""

            def show(step: int, logs: Mapping[str, Any] | None) -> None:
                nonlocal latest
                if logs:
                    latest = describe(logs)
                progress.update(bar, completed=step, detail=latest)

            yield show
        self.say(f"Training: {steps} steps  {latest}")

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            transient=True,
        )


def make_reporter() -> Reporter:
    """Return the reporter that fits standard error."""
    console = PlainConsole(stderr=True)
    return TerminalReporter(console) if console.is_terminal else Reporter(console)


def describe(logs: Mapping[str, Any]) -> str:
    """Loss, speed and the share of layers that each expert won, in one line."""
    parts = [f"loss {logs['loss']:.3f}", f"{logs['tokens_per_second']:,.0f} tokens/s"]
    shares = [
        f"{name.removeprefix('won/')} {share:.0%}"
        for name, share in logs.items()
        if name.startswith("won/")
    ]
    if shares:
        parts.append("won: " + " ".join(shares))
    return "  ".join(parts)
