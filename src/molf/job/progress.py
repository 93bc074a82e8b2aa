"""Show the progress of a run: bars on a terminal, a few lines elsewhere."""

from __future__ import annotations

import threading
import time
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
from rich.table import Column
from rich.text import Text

from molf.amounts import duration, fixed
from molf.console import PlainConsole
from molf.masking import mask_text
from molf.ranks import launched_rank
from molf.shown import as_line, counted
from molf.streams import best_effort

ShowEvaluation = Callable[[str, int, int], None]
ShowTraining = Callable[[int, Mapping[str, Any] | None], None]
ShowWork = Callable[[str], None]

_LINES = 10  # per training, without a terminal
_LONG = 5.0  # seconds


class Reporter:
    """Prints the progress of a run in plain lines, for logs and pipes.

    Args:
        console: The console; standard error, so that results can be piped.
    """

    def __init__(self, console: PlainConsole) -> None:
        console.file = best_effort(console.file)  # a closed terminal must not end the run
        self._console = console

    def say(self, text: str) -> None:
        """Print one line."""
        line = as_line(mask_text(text))
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def working(self, title: str, after: float = _LONG) -> Iterator[ShowWork]:
        """Show work that may take long; yield a function of its state.

        Args:
            title: The work.
            after: Seconds after which a log has a line of it; a terminal shows it at once.
        """
        line = threading.Timer(after, self.say, [title])
        line.daemon = True
        line.start()
        latest = time.monotonic()

        def show(state: str) -> None:
            nonlocal latest
            if time.monotonic() - latest >= 2 * _LONG:
                latest = time.monotonic()
                self.say(f"  {state}")

        try:
            yield show
        finally:
            line.cancel()

    @contextmanager
    def evaluating(self, title: str) -> Iterator[ShowEvaluation]:
        """Show an evaluation; yield a function of (measurement, done, total)."""
        self.say(title)
        yield lambda what, done, total: None

    @contextmanager
    def training(self, steps: int) -> Iterator[ShowTraining]:
        """Show a training; yield a function of (step, log entry or None)."""
        every = max(1, steps // _LINES)
        last_shown = last_evaluated = 0
        # A resumed training begins in its middle, and its first step is the slowest.
        begun: tuple[int, float] | None = None

        def show(step: int, logs: Mapping[str, Any] | None) -> None:
            nonlocal last_shown, last_evaluated, begun
            now = time.monotonic()
            begun = begun or (step, now)
            if logs and "loss" not in logs:  # an evaluation
                if step >= last_evaluated + every or step == steps:
                    last_evaluated = step
                    self.say(f"  step {step}/{steps}  {describe(logs)}")
            elif logs and (step >= last_shown + every or step in (1, steps)):
                last_shown = step
                line = f"  step {step}/{steps}  {describe(logs)}"
                if begun[0] < step < steps:
                    left = (now - begun[1]) / (step - begun[0]) * (steps - step)
                    line += f"  {duration(max(1, round(left)))} left"
                self.say(line)

        self.say(f"Training: {counted(steps, 'step')}")
        yield show


class TerminalReporter(Reporter):
    """Shows the progress of a run as bars."""

    @contextmanager
    def working(self, title: str, after: float = _LONG) -> Iterator[ShowWork]:
        """Show work without a known end, until it has ended; yield a function of its state."""
        with self._console.status(Text(as_line(mask_text(title)))) as status:
            yield lambda state: status.update(Text(as_line(mask_text(f"{title}: {state}"))))

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
            latest: dict[str, Any] = {}

            def show(step: int, logs: Mapping[str, Any] | None) -> None:
                latest.update(logs or {})
                progress.update(bar, completed=step, detail=describe(latest))

            yield show
        self.say(f"Training: {counted(steps, 'step')}  {describe(latest)}")

    def _progress(self) -> Progress:
        # On a narrow terminal the text is cut; figures, bar and time left stay.
        whole, cut = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        return Progress(
            MofNCompleteColumn(table_column=whole),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            TimeRemainingColumn(compact=True, table_column=whole),
            TextColumn("{task.description} {task.fields[detail]}", markup=False, table_column=cut),
            console=self._console,
            expand=True,
            transient=True,
        )


class SilentReporter(Reporter):
    """Shows nothing: of several processes, rank 0 shows the progress."""

    def say(self, text: str) -> None:
        """Print nothing."""


def make_reporter() -> Reporter:
    """Return a reporter for standard error: bars on a terminal, lines elsewhere."""
    console = PlainConsole(stderr=True)
    if launched_rank():
        return SilentReporter(console)
    return TerminalReporter(console) if console.is_terminal else Reporter(console)


def describe(logs: Mapping[str, Any]) -> str:
    """Return loss, speed and the share of layers won by each expert in one line."""
    parts = [f"loss {fixed(logs['loss'], 3)}"] if "loss" in logs else []
    if "eval_loss" in logs:
        parts.append(f"validation {fixed(logs['eval_loss'], 3)}")
    if "tokens_per_second" in logs:
        parts.append(f"{fixed(logs['tokens_per_second'], 0)} tokens/s")
    shares = [
        f"{name.removeprefix('won/')} {share:.0%}"
        for name, share in logs.items()
        if name.startswith("won/")
    ]
    if shares:
        parts.append("won: " + " ".join(shares))
    return "  ".join(parts)
