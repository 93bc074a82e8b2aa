"""Print the summary of a run: metrics before and after, cost, routing, and paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from molf.amounts import binary_size, decimal_size, duration, fixed
from molf.console import PlainConsole, new_table
from molf.job.model.card import show_metric, show_saved
from molf.job.record.ownership import ADAPTER, ASSIGNMENT, LOW_HALVES, MODEL
from molf.job.record.result import RunResult
from molf.measure import Evaluation
from molf.measure.harness import PREFIX
from molf.measure.meanings import meanings
from molf.shown import as_line, counted

_ANSWERS = 3  # records whose answers are shown
_MOST_CHARACTERS = 100  # of one answer

_PARTS = (
    ("model", MODEL),
    ("adapter", ADAPTER),
    ("halves", LOW_HALVES),
    ("layers", ASSIGNMENT),
)


def print_summary(result: RunResult, page: Path | None = None) -> None:
    """Print a finished run and the path of its page to standard output."""
    console = PlainConsole()
    table = new_table(result.directory.name, "metric", "before", "after", "count")
    # A metric may be missing before or after, such as one of an empty set of answers.
    for name in {**result.before.metrics, **result.after.metrics}:
        before, after = result.before.metrics.get(name), result.after.metrics.get(name)
        known = after or before
        table.add_row(
            name, show_metric(before), show_metric(after), str(known.count if known else 0)
        )
    console.print(table)
    console.lines(*_legend({**result.before.metrics, **result.after.metrics}))
    steps = counted(result.steps, "step")
    if result.skipped_steps:
        steps += f", {result.skipped_steps} of them skipped"
    lines = [
        f"time     training {duration(result.training_seconds)} ({steps}, "
        f"{fixed(result.tokens / max(result.training_seconds, 1e-9), 0)} tokens/s), "
        f"evaluation {duration(result.evaluation_seconds)}",
        f"memory   {binary_size(result.peak_memory_bytes)} at most ({result.peak_memory_of})",
    ]
    if saves := result.checkpoints:
        lines.append(
            f"saves    {counted(saves['count'], 'checkpoint')} of {decimal_size(saves['bytes'])}, "
            f"for which the training waited {duration(saves['pause_seconds'])} "
            f"({saves['share_of_training']:.1%})"
        )
    if result.kernels:
        lines.append(f"kernels  {result.kernels} (the optimizer's steps)")
    if result.shares:
        shares = "  ".join(f"{name} {share:.1%}" for name, share in result.shares.items())
        lines.append(f"won      {shares} of all layers' updates")
    if result.routing:
        lines.append(f"routing  {result.routing}")
    if saved := show_saved(result.saved):
        lines.append(f"saved    {saved}")
    for name, part in _PARTS:
        if (result.directory / part).exists():
            lines.append(f"{name:<7}  {result.directory / part}")
    lines.append(f"run      {result.directory}")
    if page is not None:
        lines.append(f"page     {page}")
    if result.results is not None:
        lines.append(f"compare  {result.results}")
    if result.print_error:
        lines.append(f"stderr   failed; progress was not shown from then on: {result.print_error}")
    if result.shares:
        lines.append(f"decided  molf routing {result.directory}")
    console.lines(*_answers(result), *_notes(result.after), *lines)


def _answers(result: RunResult) -> list[str]:
    """Return the answers to the first records, of the base and of the saved model."""
    before = {one["index"]: one.get("prediction") for one in result.before.predictions}
    lines = []
    for one in result.after.predictions:
        first, answer = before.get(one["index"]), one.get("prediction")
        if first is None or answer is None:
            continue
        lines.append(f"record {one['index']}")
        if prompt := one.get("prompt"):
            lines[-1] += f": {_cut(prompt)}"
        lines += [f"  before {_cut(first)}", f"  after  {_cut(answer)}"]
        if len(lines) == 3 * _ANSWERS:
            break
    return [*lines, ""] if lines else []


def _cut(text: str) -> str:
    text = as_line(text.strip())
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


def print_evaluations(evaluations: Mapping[str, Evaluation], *, stderr: bool = False) -> None:
    """Print a table of metrics per task to standard output, or to standard error."""
    console = PlainConsole(stderr=stderr)
    for name, evaluation in evaluations.items():
        table = new_table(name, "metric", "value", "count")
        for metric_name, metric in evaluation.metrics.items():
            table.add_row(metric_name, show_metric(metric), str(metric.count))
        console.print(table)
        # A metric of lm-evaluation-harness may have the name of one of ours, but another meaning.
        known = () if name.startswith(PREFIX) else evaluation.metrics
        console.lines(*_legend(known), *_notes(evaluation))


def _legend(metrics: Iterable[str]) -> list[str]:
    rows = meanings(metrics)
    width = max((len(names) for names, _ in rows), default=0)
    return [f"  {names:<{width}}  {meaning}" for names, meaning in rows] + [""]


def _notes(evaluation: Evaluation) -> list[str]:
    """Return the notes of an evaluation as lines, without counts of zero."""
    lines = []
    for name, note in evaluation.notes.items():
        if isinstance(note, dict):
            note = ", ".join(f"{key} {value}" for key, value in note.items() if value)
        elif isinstance(note, (list, tuple)):
            note = ", ".join(map(str, note))
        if note:
            lines.append(f"{name.replace('_', ' ')}: {note}")
    return lines
