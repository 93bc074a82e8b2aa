"""The parts of a study: cells, methods, rates, and the two phases of trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molf.study.assigning.rule import Rule

CHOOSE, REPORT = "choose", "report"
PHASES = (CHOOSE, REPORT)

# The option of `molf train` that selects the records to measure on, and its value in each phase.
EVAL_PART = "eval_part"
PARTS = {CHOOSE: "validation", REPORT: "test"}

GRID, RANDOM, TPE = "grid", "random", "tpe"
SAMPLERS = (GRID, RANDOM, TPE)
MEDIAN, HYPERBAND = "median", "hyperband"
PRUNERS = (MEDIAN, HYPERBAND)

KEEP_RECORDS, KEEP_MODELS = "records", "models"
KEPT = (KEEP_RECORDS, KEEP_MODELS)

LEARNING_RATE, LORA_RATE, RATIO = "learning_rate", "lora_learning_rate", "lora_lr_ratio"
RATES = (LEARNING_RATE, LORA_RATE, RATIO)

Point = dict[str, float]
"""A setting of the rates, by name of `RATES`."""


@dataclass(frozen=True)
class Range:
    """Rates between two numbers, on a logarithmic scale; from the samplers random and tpe."""

    low: float
    high: float


@dataclass(frozen=True)
class Rates:
    """The rates that are tried for a method: points, or ranges that a sampler draws from.

    Attributes:
        points: The points of a grid; empty with ranges.
        ranges: The range of each rate; empty with points.
    """

    points: tuple[Point, ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A task with its model and data: methods are compared within a cell.

    Attributes:
        name: Its name in tables and paths.
        options: Options of `molf train` that all methods share here.
        metric: The metric that the rates are chosen by.
        minimize: Whether a lower value is better.
        rates: Rates by name of method that replace those of the method in this cell.
        about: A description for the report.
    """

    name: str
    options: Mapping[str, Any]
    metric: str
    minimize: bool
    rates: Mapping[str, Rates] = field(default_factory=dict)
    about: str = ""


@dataclass(frozen=True)
class Method:
    """A method with its own options.

    Attributes:
        name: Its name in tables and paths.
        options: Options of `molf train` that belong to the method.
        rates: The rates to try.
        control_of: The method that this one is a control of, whose rates it has; None for others.
        share_of: `control_of`, if the measured share of full updates there becomes the probability
            of this one's score `random:Q`; None for a method with a score of its own.
        rule: How the assignment of each trial is made; None without one.
        about: A description for the report.
    """

    name: str
    options: Mapping[str, Any]
    rates: Rates
    control_of: str | None = None
    share_of: str | None = None
    rule: Rule | None = None
    about: str = ""


@dataclass(frozen=True)
class Choose:
    """The first phase: rates are tried on the validation part of the training data.

    Attributes:
        sampler: One of `SAMPLERS`.
        trials: Points per method, for random and tpe; None for grid.
        seeds: Seeds of each point.
        prune: One of `PRUNERS`, or None: no trial is ended early.
    """

    sampler: str
    trials: int | None
    seeds: tuple[int, ...]
    prune: str | None = None


@dataclass(frozen=True)
class Report:
    """The second phase: the chosen rates on the test part, with other seeds.

    Attributes:
        seeds: The seeds.
        baseline: Methods; the others are compared with the one of them that the first phase
            prefers.
    """

    seeds: tuple[int, ...]
    baseline: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A study as its file describes it, with recipes and axes written out.

    Attributes:
        name: Its name.
        output_dir: The directory of trials and results.
        storage: Address of Optuna's storage; None for a SQLite file in `output_dir`.
        cells: The cells, in the order of the file.
        methods: The methods, in the order of the file.
        choose: The first phase.
        report: The second phase.
        keep: One of `KEPT`: whether the models of trials stay on disk.
        seconds: Expected seconds of a trial, until some are measured.
        heartbeat: Seconds between signs of life of a worker.
        retries: How often a trial starts again whose worker died.
        about: A description for the report.
    """

    name: str
    output_dir: Path
    storage: str | None
    cells: tuple[Cell, ...]
    methods: tuple[Method, ...]
    choose: Choose
    report: Report
    keep: str = KEEP_RECORDS
    seconds: float = 30.0
    heartbeat: int = 20
    retries: int = 3
    about: str = ""

    def cell(self, name: str) -> Cell:
        """Return the cell of a name."""
        return next(cell for cell in self.cells if cell.name == name)

    def method(self, name: str) -> Method:
        """Return the method of a name."""
        return next(method for method in self.methods if method.name == name)

    def rates(self, cell: Cell, method: Method) -> Rates:
        """Return the rates of a method in a cell; a control has those of its method."""
        if method.control_of is not None:
            return self.rates(cell, self.method(method.control_of))
        return cell.rates.get(method.name, method.rates)

    def points(self, cell: Cell, method: Method) -> int:
        """Return the number of rate trials of a method in a cell, each of all seeds."""
        return self.choose.trials or len(self.rates(cell, method).points)

    @property
    def seeds(self) -> dict[str, tuple[int, ...]]:
        """The seeds of each phase."""
        return {CHOOSE: self.choose.seeds, REPORT: self.report.seeds}

    def most_trials(self, cell: Cell, method: Method, phase: str) -> int:
        """Return the number of trials of a method in a cell and a phase.

        Of a control it is an upper bound: its second phase has two points, its own chosen one and
        that of its method, unless these are the same.
        """
        if phase == CHOOSE:
            return self.points(cell, method) * len(self.choose.seeds)
        return (1 if method.control_of is None else 2) * len(self.report.seeds)

    @property
    def size(self) -> int:
        """The number of trials in both phases; with controls an upper bound."""
        return sum(
            self.most_trials(cell, method, phase)
            for cell in self.cells
            for method in self.methods
            for phase in PHASES
        )


def rate_options(point: Mapping[str, float]) -> dict[str, float]:
    """Return the rates of a point as options of `molf train`; a ratio becomes a rate."""
    options = {name: float(value) for name, value in point.items() if name != RATIO}
    if RATIO in point:
        # 3e-3, not 0.0030000000000000005
        options[LORA_RATE] = float(f"{point[LEARNING_RATE] * point[RATIO]:.6g}")
    return options


def rate_columns(point: Mapping[str, float]) -> dict[str, float]:
    """Return the rates of a point as columns of a row: as given, and as options."""
    return {**point, **rate_options(point)}


def point_text(point: Mapping[str, float]) -> str:
    """Return a point as part of a path, such as `lr0.001-ratio3`."""
    short = {LEARNING_RATE: "lr", LORA_RATE: "lora_lr", RATIO: "ratio"}
    return "-".join(f"{short[name]}{point[name]:.6g}" for name in RATES if name in point)
