"""Group runs by task and model, refuse those that are not comparable, and name their methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molf.compare.runs import ComparedRun
from molf.errors import InputError

# Fields that the runs of a task and model must have in common, and their names in messages.
_SAME = {
    "eval_part": "eval_part",
    "metrics_version": "the version of the metrics",
    "prompt_version": "the version of the prompt",
    "data_hash": "the hash of the data",
    "evaluation_records": "the number of evaluated records",
    "max_eval_samples": "max_eval_samples",
    "few_shot": "few_shot",
}
# Options that methods should share in a fair comparison.
_BUDGET = (
    *("max_samples", "label_noise", "max_length", "num_train_epochs", "max_steps", "dtype", "bf16"),
    *("max_time", "keep_best", "early_stopping_patience"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "packing"),
    *("train_sampling_strategy", "lr_scheduler_type"),
    *("warmup_ratio", "weight_decay", "max_grad_norm", "load_in_4bit", "load_in_8bit"),
    # Of the data; evaluations in the training set a part of it aside.
    *("weights", "eval_strategy", "validation_share"),
)


@dataclass(frozen=True)
class Cell:
    """Runs of one task and model.

    Attributes:
        task: The task.
        model: Name of the model.
        methods: Runs by name of the method and by seed. Runs of one method with other settings
            have names of their own.
    """

    task: str
    model: str
    methods: Mapping[str, Mapping[int, ComparedRun]]

    @property
    def name(self) -> str:
        """Task and model."""
        return f"{self.task}, {self.model}"

    def of(self, method: str) -> list[str]:
        """Return the names whose runs have this method."""
        return [
            name
            for name, runs in self.methods.items()
            if next(iter(runs.values())).method == method
        ]


def cells_of(runs: Sequence[ComparedRun]) -> tuple[list[Cell], list[str]]:
    """Return the cells of runs in the order of their first run, and notices.

    Raises:
        InputError: Two runs of a task and model are not comparable; the message has the field, both
            runs and both values.
    """
    groups: dict[tuple[str, str], list[ComparedRun]] = {}
    contents = _contents(runs)
    for run in runs:
        key = (run.task, contents.get(run.model, run.model))
        groups.setdefault(key, []).append(run)
    names = _model_names([group[0].model for group in groups.values()])
    cells: list[Cell] = []
    notices: list[str] = []
    for (task, _), group in groups.items():
        for field, shown in _SAME.items():
            _check(group, field, shown)
        methods = _methods(group, notices)
        cells.append(Cell(task, names[group[0].model], methods))
        notices += _unequal(cells[-1])
    return cells, notices


def _contents(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """Return the hash of each model by its path; models of equal hash are one.

    Raises:
        InputError: The contents of one path have changed.
    """
    found: dict[str, str] = {}
    for model in dict.fromkeys(run.model for run in runs):
        same = [run for run in runs if run.model == model]
        _check(same, "base_hash", f"the hash of the base {model}")
        if known := [str(run.same["base_hash"]) for run in same if "base_hash" in run.same]:
            found[model] = known[0]
    return found


def _check(runs: Iterable[ComparedRun], field: str, shown: str) -> None:
    known = [run for run in runs if field in run.same]
    for run in known[1:]:
        first, other = known[0].same[field], run.same[field]
        if first != other:
            raise InputError(
                f"{known[0].name} and {run.name} are not comparable: {shown} is {first} in the "
                f"first and {other} in the second."
            )


def _model_names(models: Sequence[str]) -> dict[str, str]:
    """Return a short name for each model; the whole path where short ones are equal."""
    short = {model: Path(model).name if Path(model).is_absolute() else model for model in models}
    names = list(short.values())
    return {model: name if names.count(name) == 1 else model for model, name in short.items()}


def _methods(runs: Sequence[ComparedRun], notices: list[str]) -> dict[str, dict[int, ComparedRun]]:
    found: dict[str, dict[int, ComparedRun]] = {}
    for method in dict.fromkeys(run.method for run in runs):
        same = [run for run in runs if run.method == method]
        varied = _varied(same)
        for run in same:
            settings = ", ".join(f"{name}={run.settings[name]}" for name in varied)
            seeds = found.setdefault(f"{method} ({settings})" if settings else method, {})
            if (earlier := seeds.get(run.seed)) is not None:
                older, newer = sorted((earlier, run), key=lambda one: one.started)
                notices.append(
                    f"{older.name} is left out: {newer.name} has its method, settings and seed, "
                    "and is newer."
                )
                run = newer
            seeds[run.seed] = run
    return {name: dict(sorted(seeds.items())) for name, seeds in found.items()}


def _varied(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the settings that all runs have and that differ between them."""
    names = [name for name in runs[0].settings if all(name in run.settings for run in runs)]
    return [name for name in names if len({run.settings[name] for run in runs}) > 1]


def _unequal(cell: Cell) -> list[str]:
    """Return notices on the training that methods do not share, and on seeds and machines."""
    lines = []
    for option in _BUDGET:
        values = {
            name: ", ".join(dict.fromkeys(run.settings.get(option, "?") for run in runs.values()))
            for name, runs in cell.methods.items()
        }
        if len(set(values.values()) - {"?"}) > 1:
            lines.append(f"{cell.name}: {option} differs: {_listed(values)}.")
    seeds = {name: ", ".join(map(str, runs)) for name, runs in cell.methods.items()}
    if len(set(seeds.values())) > 1:
        lines.append(
            f"{cell.name}: seeds differ: {_listed(seeds)}. Differences are over common seeds alone."
        )
    runs = [run for seeds in cell.methods.values() for run in seeds.values()]
    places = dict.fromkeys(run.place for run in runs if run.place)
    if len(places) > 1:
        lines.append(
            f"{cell.name}: time and memory were measured on several machines or in several ways: "
            f"{'; '.join(places)}."
        )
    versions = dict.fromkeys(run.made_by for run in runs if run.made_by)
    if len(versions) > 1:
        lines.append(
            f"{cell.name}: runs of molf {', '.join(versions)}; their metrics have one version."
        )
    return lines


def _listed(values: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} {value}" for name, value in values.items())
