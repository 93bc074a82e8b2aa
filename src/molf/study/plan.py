"""The trials of a study that are known, given the outcomes so far."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any

from molf.job.settings.settings import TrainSettings
from molf.study.choice import choose_point
from molf.study.definition import (
    CHOOSE,
    EVAL_PART,
    PARTS,
    REPORT,
    Cell,
    Method,
    Point,
    Study,
    point_text,
    rate_options,
)
from molf.study.rates import drawn_points

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
# A share of full updates this near to 0 or 1 has a control without a coin.
_NEAR = 5e-4
# Options without effect on what a trial measures.
_NOT_IDENTITY = ("output_dir", "overwrite", "fallback_dir", "report_to", "dry_run", "save_steps")

MakeSettings = Callable[[Cell, Method, str | None], TrainSettings]
"""Returns checked settings of a cell and a method, with this score if one is given."""


@dataclass(frozen=True)
class Outcome:
    """The end of a trial.

    Attributes:
        state: `complete`, `pruned`, or `failed`.
        value: The cell's metric; None unless complete.
        point: The rates.
        full_share: Share of updates that the expert full took; None without it.
        seconds: Its duration.
        error: The first line of its error; empty without one.
    """

    state: str
    value: float | None
    point: Point
    full_share: float | None = None
    seconds: float = 0.0
    error: str = ""


Identity = tuple[str, str, str, int, int]
"""Cell, method, phase, number of the point, seed."""


@dataclass(frozen=True)
class Planned:
    """A trial to run.

    Attributes:
        cell: Its cell.
        method: Its method.
        phase: `choose` or `report`.
        index: Number of its point among those of the method; that of the chosen point in the
            second phase.
        seed: Its seed.
        point: Its rates; None if the sampler draws them at the start.
        settings: Its settings without output directory; also without rates if these are drawn.
        key: Hash of the settings; equal keys are equal trials.
    """

    cell: Cell
    method: Method
    phase: str
    index: int
    seed: int
    point: Point | None
    settings: TrainSettings
    key: str

    @property
    def identity(self) -> Identity:
        """The place of the trial in the study."""
        return (self.cell.name, self.method.name, self.phase, self.index, self.seed)

    def at(self, point: Point) -> TrainSettings:
        """Return the settings with these rates."""
        return with_rates(self.settings, point)

    def label(self, point: Point) -> str:
        """Return the trial's name among those of its cell and method, part of paths."""
        return f"{self.phase}-{point_text(point)}-seed{self.seed}"


@dataclass(frozen=True)
class Choice:
    """The rates that the first phase prefers for a method in a cell.

    Attributes:
        index: Number of the point.
        point: The rates.
        value: Mean of the metric over the seeds of the phase.
    """

    index: int
    point: Point
    value: float


class TrialMaker:
    """Makes planned trials, each once.

    Args:
        study: The study.
        settings: Makes checked settings.
    """

    def __init__(self, study: Study, settings: MakeSettings) -> None:
        self._study = study
        self._settings = settings
        self._made: dict[Any, Planned] = {}

    def __call__(
        self,
        cell: Cell,
        method: Method,
        phase: str,
        index: int,
        seed: int,
        point: Point | None,
        score: str | None,
    ) -> Planned:
        """Return a trial of a cell and a method at a point, None if a sampler draws it."""
        rates = None if point is None else tuple(sorted(point.items()))
        place = (cell.name, method.name, phase, index, seed, rates, score)
        if place not in self._made:
            own: dict[str, Any] = {"seed": seed, EVAL_PART: PARTS[phase]}
            settings = replace(self._settings(cell, method, score), **own)
            if point is None:
                ranges = [
                    (name, one.low, one.high)
                    for name, one in sorted(self._study.rates(cell, method).ranges.items())
                ]
                key = trial_key(settings, [self._study.choose.sampler, index, ranges])
            else:
                settings = with_rates(settings, point)
                key = trial_key(settings)
            self._made[place] = Planned(cell, method, phase, index, seed, point, settings, key)
        return self._made[place]


class Plan:
    """The trials that can be named now, in the order in which they should run.

    Args:
        study: The study.
        outcomes: Finished trials by key.
        make: Makes the trials.
        drawn: Points that the sampler tpe has drawn so far, by cell, method and number.

    Attributes:
        trials: The trials, finished ones too.
        choices: By cell and method, the chosen rates; None if every rate failed; absent before the
            first phase is over.
    """

    def __init__(
        self,
        study: Study,
        outcomes: Mapping[str, Outcome],
        make: TrialMaker,
        drawn: Mapping[tuple[str, str, int], Point],
    ) -> None:
        self._study = study
        self._outcomes = outcomes
        self._planned = make
        self._drawn = drawn
        self.trials: list[Planned] = []
        self.choices: dict[tuple[str, str], Choice | None] = {}
        self._chosen: dict[tuple[str, str], list[Planned]] = {}
        self._reported: dict[tuple[str, str], list[Planned]] = {}
        for cell in study.cells:
            # Controls follow their models, so that their shares are known.
            for method in sorted(study.methods, key=lambda one: one.share_of is not None):
                self._add(cell, method)

    @property
    def by_key(self) -> dict[str, Planned]:
        """The trials by key."""
        return {trial.key: trial for trial in self.trials}

    def outcome(self, trial: Planned) -> Outcome | None:
        """Return the outcome of a trial; None before its end."""
        return self._outcomes.get(trial.key)

    @property
    def unfinished(self) -> list[Planned]:
        """The trials without an outcome."""
        return [trial for trial in self.trials if trial.key not in self._outcomes]

    def _add(self, cell: Cell, method: Method) -> None:
        place = (cell.name, method.name)
        first, whole = self._first_phase(cell, method)
        self._chosen[place] = first
        self.trials += first
        if not whole or any(trial.key not in self._outcomes for trial in first):
            return
        choice = self.choices[place] = self._choice(cell, first)
        if choice is None:
            return
        reported = [
            self._planned(cell, method, REPORT, choice.index, seed, choice.point, score)
            for seed in self._study.report.seeds
            for score in self._scores(cell, method, REPORT, choice.index) or ()
        ]
        self._reported[place] = reported
        self.trials += reported

    def _first_phase(self, cell: Cell, method: Method) -> tuple[list[Planned], bool]:
        """Return the known trials of the first phase, and whether these are all of them."""
        study = self._study
        points = drawn_points(study, cell, method)
        source = method.share_of or method.name
        planned: list[Planned] = []
        whole = True
        for index in range(study.points(cell, method)):
            point = points[index] if points is not None else None
            shared = point or self._drawn.get((cell.name, source, index))
            scores = self._scores(cell, method, CHOOSE, index)
            whole = whole and scores is not None
            for score in scores or ():
                for number, seed in enumerate(study.choose.seeds):
                    # The sampler draws in the trial of the first seed.
                    draws = number == 0 and method.share_of is None
                    here = point if draws else shared
                    if here is None and not draws:
                        whole = False
                        continue
                    planned.append(self._planned(cell, method, CHOOSE, index, seed, here, score))
        return planned, whole

    def _scores(
        self, cell: Cell, method: Method, phase: str, index: int
    ) -> tuple[str | None, ...] | None:
        """Return the score of a share-matched control, one of None for other methods.

        Empty if its model failed there; None before its model's trials are over.
        """
        if method.share_of is None:
            return (None,)
        place = (cell.name, method.share_of)
        if phase == CHOOSE:
            model = [trial for trial in self._chosen[place] if trial.index == index]
            expected = len(self._study.choose.seeds)
        else:
            model = self._reported.get(place, [])
            expected = len(self._study.report.seeds)
        outcomes = [self._outcomes.get(trial.key) for trial in model]
        if len(model) < expected or None in outcomes:
            if phase == REPORT and self.choices.get(place, ()) is None:
                return ()
            return None
        shares = [o.full_share for o in outcomes if o is not None and o.full_share is not None]
        return (control_score(fmean(shares)),) if shares else ()

    def _choice(self, cell: Cell, trials: list[Planned]) -> Choice | None:
        values: dict[int, list[float]] = {}
        points: dict[int, Point] = {}
        for trial in trials:
            outcome = self._outcomes[trial.key]
            value = outcome.value if outcome.state == COMPLETE else None
            values.setdefault(trial.index, []).append(math.nan if value is None else value)
            points[trial.index] = outcome.point or trial.point or {}
        chosen = choose_point(values, minimize=cell.minimize)
        if chosen is None:
            return None
        return Choice(chosen.index, points[chosen.index], chosen.value)


def with_rates(settings: TrainSettings, point: Point) -> TrainSettings:
    """Return settings with the rates of a point."""
    rates: dict[str, Any] = dict(rate_options(point))
    return replace(settings, **rates)


def control_score(share: float) -> str:
    """Return the score that gives the expert full this share of updates at random."""
    if share <= _NEAR:
        return "lora"
    if share >= 1 - _NEAR:
        return "full"
    return f"random:{share:.3f}"


def trial_key(settings: TrainSettings, more: Any = None) -> str:
    """Return the identity of a trial: a hash of the options that differ from their defaults.

    New options of later releases leave it unchanged.
    """
    defaults = {option.name: option.default for option in fields(TrainSettings)}
    given = {
        name: value
        for name, value in vars(settings).items()
        if name not in _NOT_IDENTITY and value != defaults.get(name) and value != {}
    }
    text = json.dumps([given, more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
