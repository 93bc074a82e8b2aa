"""Render runs as one HTML page that needs no other file and no network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molf.job.settings.defaults import ADAPTERS
from molf.report.change_figures import change_section
from molf.report.document import figure_values, filled
from molf.report.figures import Figure, Heat, Lines, Section
from molf.report.results import shown_results
from molf.report.routing_figures import routing_section
from molf.report.run_data import COMPLETE, RunData
from molf.report.samples import ABOUT_MARKS, MOST, Samples, marked_sample
from molf.report.training_figures import training_section

_WITHOUT = {  # options that methods have a value of, without an effect
    "learning_rate": (*ADAPTERS, "molf-e"),
    "lora_learning_rate": ("fft",),
    "ranks": ("fft",),
    "score": (*ADAPTERS, "fft", "hybrid"),
}


@dataclass(frozen=True)
class Drawn:
    """A figure of a run on the page.

    Attributes:
        id: Its name on the page.
        title: Its title.
        text: Sentences about it.
        run: Name of the run; empty if the page has one run.
        values: The values for the script.
    """

    id: str
    title: str
    text: str
    run: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The same figure of each run; None where a run lacks it."""

    figures: tuple[Drawn | None, ...]
    wide: bool


def sections_of(data: RunData) -> tuple[Section, ...]:
    """Return the figures of a run."""
    made = (training_section(data), routing_section(data), change_section(data))
    return tuple(section for section in made if section is not None)


def render(runs: Sequence[RunData], *, refresh: int | None = None) -> str:
    """Return the page of one run, or of several side by side.

    Args:
        runs: The runs.
        refresh: Load the page again after this many seconds; None never.
    """
    shown = _figure_sections(runs)
    rows = [row for section in shown for row in section["rows"]]
    figures = [
        {"id": one.id, "file": one.id, **one.values} for row in rows for one in row.figures if one
    ]
    results = shown_results(runs)
    samples = [[] if run.samples is None else _samples(run.samples) for run in runs]
    examples = [list(map(marked_sample, run.examples)) for run in runs]
    names = [
        ("result", "Result", bool(results)),
        *((section["name"], section["title"], True) for section in shown),
        ("samples", "Samples", any(samples)),
        ("examples", "Training examples", any(examples)),
        ("settings", "Settings", True),
    ]
    return filled(
        "page.html.j2",
        title=", ".join(run.name for run in runs),
        written=runs[0].written,
        sections=[(anchor, name) for anchor, name, is_there in names if is_there],
        data={"figures": figures, "samples": [*samples, *examples]},
        refresh=refresh,
        many=f" many n{min(len(runs), 4)}" if len(runs) > 1 else "",
        runs=[_run(run) for run in runs],
        results=results,
        figure_sections=shown,
        has_samples=any(samples),
        has_examples=any(examples),
    )


def _figure_sections(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return the sections that any run has, for the template."""
    by_run = [{section.name: section for section in sections_of(run)} for run in runs]
    names = [run.name if len(runs) > 1 else "" for run in runs]
    return [
        _figure_section([sections.get(name) for sections in by_run], names)
        for name in dict.fromkeys(name for sections in by_run for name in sections)
    ]


def _figure_section(found: Sequence[Section | None], runs: Sequence[str]) -> dict[str, Any]:
    """Return a section, from that of each run; None where a run lacks it."""
    first = next(filter(None, found))
    by_run = [{one.name: one for one in section.figures} if section else {} for section in found]
    rows = [
        _row([figures.get(name) for figures in by_run], runs)
        for name in dict.fromkeys(name for figures in by_run for name in figures)
    ]
    texts = [
        (run, section.text if section else ()) for run, section in zip(runs, found, strict=True)
    ]
    return {"name": first.name, "title": first.title, "rows": rows, "texts": texts}


def _row(same: Sequence[Figure | None], runs: Sequence[str]) -> Row:
    """Return a figure of each run, with common axes."""
    ranges = _common_ranges([one for one in same if isinstance(one, Lines)])
    drawn: list[Drawn | None] = []
    for number, (run, one) in enumerate(zip(runs, same, strict=True)):
        if one is None:
            drawn.append(None)
            continue
        place = f"{one.name}-{number}" if len(runs) > 1 else one.name
        drawn.append(Drawn(place, one.title, one.text, run, figure_values(one, ranges)))
    return Row(tuple(drawn), wide=isinstance(next(filter(None, same)), Heat))


def _common_ranges(found: Sequence[Lines]) -> dict[str, Any]:
    """Return the axes of the same figure of several runs; empty for one run."""
    if len(found) < 2:
        return {}
    x = np.concatenate([one.x for one in found])
    y = np.concatenate([series.values for one in found for series in one.series])
    y = y[~np.isnan(y)]
    if not len(y):
        return {}
    low, high = float(y.min()), float(y.max())
    edge = 0.05 * ((high - low) or abs(high) or 1.0)
    return {"x_range": [float(x.min()), float(x.max())], "y_range": [low - edge, high + edge]}


def _samples(samples: Samples) -> list[dict[str, Any]]:
    return [
        {
            "index": one.index,
            "task": one.task,
            "right": one.right,
            "left_out": one.left_out,
            "main": one.main,
            "texts": one.texts,
        }
        for one in samples.shown
    ]


def _run(run: RunData) -> dict[str, Any]:
    """Return the head of a run and its settings, for the template."""
    return {
        "name": run.name,
        "status": run.status,
        "notices": [*run.notices, *([f"Error: {run.error}"] if run.error else [])],
        "facts": list(_facts(run)),
        "samples": "" if run.samples is None else _about_samples(run.samples),
        "examples": _about_examples(run),
        "commands": list(_commands(run)),
        "details": [
            (title, [(name, _text(value)) for name, value in rows.items()])
            for title, rows in (
                ("All settings", run.options),
                ("Record of the run", run.recorded),
                ("Environment", run.environment),
            )
            if rows
        ],
    }


def _about_samples(samples: Samples) -> str:
    text = f"{samples.total:,} records"
    if samples.right + samples.wrong:
        text += f", {samples.right:,} right and {samples.wrong:,} wrong"
    if len(samples.shown) < samples.total:
        text += f"; the page has {len(samples.shown):,} of them, at most {MOST} of either kind"
    return f"{text}."


def _about_examples(run: RunData) -> str:
    """Return a sentence on the examples; empty without any."""
    if not run.examples:
        return ""
    data = run.recorded.get("data")
    total = data.get("examples") if isinstance(data, dict) else None
    of_all = f" of {total:,}" if isinstance(total, int) else ""
    return f"{len(run.examples):,}{of_all} examples, spread evenly over them. {ABOUT_MARKS}"


def _facts(run: RunData) -> Iterator[tuple[str, str]]:
    options, recorded = run.options, run.recorded
    if run.run is None:
        return
    yield "Method", run.run.method
    yield "Model", Path(str(options.get("model"))).name
    yield "Task", str(options.get("task"))
    done = f"{run.last_step:,} of {run.steps:,}" if run.status != COMPLETE else f"{run.steps:,}"
    yield "Steps", done
    if skipped := (recorded.get("training") or {}).get("skipped_steps"):
        yield "Skipped steps", f"{skipped:,}"
    model = recorded.get("model") or {}
    if trained := model.get("trained_parameters"):
        yield "Trained parameters", f"{trained:,} (the model has {model.get('parameters', 0):,})"
    for label, name in (
        ("Learning rate", "learning_rate"),
        ("LoRA learning rate", "lora_learning_rate"),
        ("Ranks", "ranks"),
        ("Score", "score"),
        ("Seed", "seed"),
    ):
        if options.get(name) is not None and run.run.method not in _WITHOUT.get(name, ()):
            yield label, _text(options[name])
    device = run.environment.get("device") or {}
    if device.get("name"):
        yield "Device", f"{device['name']} ({device.get('type')})"
    if (seconds := _training_seconds(run)) is not None:
        yield "Training time", f"{seconds:,.1f} s"
    if started := run.environment.get("started"):
        yield "Started", str(started).replace("T", " ")


def _training_seconds(run: RunData) -> float | None:
    """Return the recorded time of the training; of a run without a record, that of its log."""
    training = run.recorded.get("training")
    recorded = training.get("seconds") if isinstance(training, dict) else None
    if isinstance(recorded, int | float):
        return float(recorded)
    logged = run.log.get("train_runtime")
    return None if logged is None or not len(logged) else float(logged[-1])


def _commands(run: RunData) -> Iterator[tuple[str, str]]:
    command = run.environment.get("command")
    if isinstance(command, list) and command:
        yield "As it was started", shlex.join(["molf", *map(str, command[1:])])
    if run.run is not None and not run.run.is_probe:
        config = shlex.quote(str(run.path / "config.yaml"))
        yield "The same again", f"molf train --config {config} --output_dir NEW_DIRECTORY"


def _text(value: Any) -> str:
    if isinstance(value, (dict, list)):
        is_short = isinstance(value, list) and all(not isinstance(x, (dict, list)) for x in value)
        if is_short:
            return ", ".join(map(str, value))
        return json.dumps(value, indent=2, ensure_ascii=False)
    return "-" if value is None else str(value)
