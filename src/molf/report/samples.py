"""Samples of a page: predictions, a bounded number of right and wrong ones, and examples."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molf.shown import counted, printable
from molf.tasks.preview import PreviewedRecord

MOST = 200  # samples of a page that are right, and as many that are wrong
MOST_CHARACTERS = 1200  # of one text
ABOUT_MARKS = "Marked text carries loss: the model learns to predict it."
_FIRST = ("prompt", "prediction", "expected", "target_new", "target_true", "answer")
_LEFT_OUT = ("index", "right", "left_out")


@dataclass(frozen=True)
class Sample:
    """One prediction.

    Attributes:
        index: Number of its record, from 0.
        task: Name of the task, from the file's name; empty for a single one.
        right: Whether it counts as right; None if the file does not have it.
        left_out: Why the record has no answer; empty if it has one.
        main: Number of texts that are shown at once: prompt, prediction, expected text.
        texts: Name and text of the other entries, those first.
    """

    index: int
    task: str
    right: bool | None
    left_out: str
    main: int
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Samples:
    """Predictions of a run.

    Attributes:
        shown: At most `MOST` of the right ones and of the others.
        total: Number of all.
        right: Number of those that are right.
        wrong: Number of those that are wrong.
    """

    shown: tuple[Sample, ...]
    total: int
    right: int
    wrong: int


def read_samples(files: Iterable[Path]) -> tuple[Samples | None, list[str]]:
    """Return the predictions of files, and a notice for each that cannot be read."""
    notices: list[str] = []
    shown: dict[bool, list[Sample]] = {True: [], False: []}
    total = right = wrong = 0
    for path in files:
        task, damaged = path.stem.removeprefix("predictions").removeprefix("-"), 0
        try:
            with path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    entry = _entry(line)
                    if entry is None:
                        damaged += 1
                        continue
                    total += 1
                    right += entry.get("right") is True
                    wrong += entry.get("right") is False
                    kept = shown[entry.get("right") is True]
                    if len(kept) < MOST:
                        kept.append(_sample(entry, task))
        except OSError:
            notices.append(f"{path.name} is missing or cannot be read.")
        if damaged:
            notices.append(f"{path.name}: {counted(damaged, 'line')} cannot be read.")
    if not total:
        return None, notices
    ordered = sorted((*shown[True], *shown[False]), key=lambda one: (one.task, one.index))
    return Samples(tuple(ordered), total, right, wrong), notices


def read_examples(path: Path) -> tuple[tuple[PreviewedRecord, ...], list[str]]:
    """Return the examples of a run's file, and a notice if it cannot be read; none without it."""
    found, damaged = [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return (), []
    except OSError:
        return (), [f"{path.name} cannot be read."]
    for line in lines:
        try:
            found.append(PreviewedRecord.of_record(json.loads(line)))
        except (KeyError, TypeError, ValueError, RecursionError):
            damaged += 1
    notices = [f"{path.name}: {counted(damaged, 'line')} cannot be read."] if damaged else []
    return tuple(found), notices


def marked_sample(record: PreviewedRecord) -> dict[str, Any]:
    """Return a record for the script of a page, which marks its text with loss."""
    return {
        "index": record.index,
        "task": "",
        "right": None,
        "state": record.state,
        "about": f"{record.tokens:,} tokens, {record.loss_tokens:,} with loss",
        "segments": [[printable(text), has_loss] for text, has_loss in record.segments],
        "main": 0,
        "texts": [["doubtful", fault] for fault in record.faults],
    }


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(entry, dict) and isinstance(entry.get("index"), int)
    return entry if is_one else None


def _sample(entry: dict[str, Any], task: str) -> Sample:
    names = [name for name in _FIRST if entry.get(name) is not None]
    main = len(names)
    names += [name for name in entry if name not in (*_FIRST, *_LEFT_OUT)]
    right = entry.get("right")
    return Sample(
        index=entry["index"],
        task=task,
        right=right if isinstance(right, bool) else None,
        left_out=str(entry.get("left_out") or ""),
        main=main,
        texts=tuple((str(name), _shown(entry[name])) for name in names),
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(_short(value), ensure_ascii=False)
    text = printable(text)
    if len(text) > MOST_CHARACTERS:
        more = len(text) - MOST_CHARACTERS
        text = f"{text[: MOST_CHARACTERS // 2]} […] {text[-MOST_CHARACTERS // 2 :]} ({more:,} more)"
    return text


def _short(value: Any) -> Any:
    """Return a value with numbers of 4 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _short(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_short(one) for one in value]
    return value
