"""The trials of a study that are known, given the outcomes so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from molf.job.settings.settings import TrainSettings
from molf.study.assigning.trial_rule import TrialRule
from molf.study.choice import choose_point
from molf.study.definition import (
    CHOOSE,
    EVAL_PART,
    GRID,
    PARTS,
    REPORT,
    Cell,
    Method,
    Point,
    Study,
    point_text,
    rate_options,
)
from molf.study.identity import settings_key, trial_key
from molf.study.rates import drawn_points

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
# A share of full updates this near to 0 or 1 has a control without a coin.
_NEAR = 5e-4

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
        is_reused: Whether its result was on disk, so that nothing was trained.
    """

    state: str
    value: float | None
    point: Point
    full_share: float | None = None
    seconds: float = 0.0
    error: str = ""
    is_reused: bool = False


Place = tuple[str, str, str]
"""Cell, method, phase."""
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
        key: Its identity: a hash of its place in the study and of its settings.
        is_drawn: Whether a sampler draws the points, so that two of them may be equal.
        trial_rule: How its assignment is made; None without a rule.
    """

    cell: Cell
    method: Method
    phase: str
    index: int
    seed: int
    point: Point | None
    settings: TrainSettings
    key: str
    is_drawn: bool = False
    trial_rule: TrialRule | None = None

    @property
    def place(self) -> Place:
        """Its cell, method and phase, by name."""
        return (self.cell.name, self.method.name, self.phase)

    @property
    def identity(self) -> Identity:
        """The place of the trial in the study."""
        return (*self.place, self.index, self.seed)

    def at(self, point: Point) -> TrainSettings:
        """Return the settings with these rates."""
        return with_rates(self.settings, point)

    def settings_key(self, point: Point) -> str:
        """Return the hash of the settings with these rates; equal ones are equal trainings."""
        more = None if self.trial_rule is None else self.trial_rule.identity(point)
        return settings_key(self.at(point), more)

    def label(self, point: Point) -> str:
        """Return the trial's name among those of its cell and method, part of paths."""
        number = f"-point{self.index}" if self.is_drawn else ""
        return f"{self.phase}-{point_text(point)}{number}-seed{self.seed}"


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
        if place in self._made:
            return self._made[place]
        own: dict[str, Any] = {"seed": seed, EVAL_PART: PARTS[phase]}
        settings = replace(self._settings(cell, method, score), **own)
        trial_rule = None
        if method.rule is not None:
            routed = self._settings(cell, self._study.method(method.rule.of), None)
            trial_rule = TrialRule(method.rule, replace(routed, **own))
        if point is not None:
            settings = with_rates(settings, point)
        more = self._more(cell, method, point, trial_rule)
        is_drawn = self._study.choose.sampler != GRID
        # A rate that is added in the middle of a grid moves the numbers of those behind it.
        number = index if is_drawn else None
        key = trial_key((cell.name, method.name, phase, number, seed), settings_key(settings, more))
        made = self._made[place] = Planned(
            cell, method, phase, index, seed, point, settings, key, is_drawn, trial_rule
        )
        return made

    def _more(
        self, cell: Cell, method: Method, point: Point | None, trial_rule: TrialRule | None
    ) -> list[Any] | None:
        """Return what belongs to a trial's identity beside its settings; None for nothing."""
        ruled = None if trial_rule is None else trial_rule.identity(point)
        if point is not None:
            return ruled
        ranges = sorted(self._study.rates(cell, method).ranges.items())
        drawn = [self._study.choose.sampler, [(name, one.low, one.high) for name, one in ranges]]
        return drawn if ruled is None else [*drawn, ruled]

    def options(self, cell: Cell, method: Method) -> TrainSettings:
        """Return the settings of a cell and a method without seed, part and rates."""
        return self._settings(cell, method, None)


@dataclass(frozen=True)
class _Trials:
    """The known trials of a method in one phase, or some of them.

    Attributes:
        known: The trials.
        are_all: Whether no further one can become known.
    """

    known: list[Planned]
    are_all: bool

    def at(self, index: int, seeds: int) -> _Trials:
        """Return those at the point of a number, which has a trial for each of so many seeds."""
        found = [trial for trial in self.known if trial.index == index]
        return _Trials(found, len(found) >= seeds)


@dataclass(frozen=True)
class _Scores:
    """The scores with which a method is tried at a point.

    Attributes:
        values: The scores, none or one. None is the score of the method's options.
        are_known: Whether the trials that they depend on have ended.
    """

    values: tuple[str | None, ...]
    are_known: bool = True


_OWN_SCORE = _Scores((None,))
_NOT_YET_KNOWN = _Scores((), are_known=False)
_NO_CONTROL = _Scores(())


class Plan:
    """The trials that can be named now, in the order in which they should run.

    Args:
        study: The study.
        outcomes: Finished trials by key.
        make: Makes the trials.
        drawn: Points that the sampler tpe has drawn so far, by the key of the trial it drew for.

    Attributes:
        trials: The trials, finished ones too.
        choices: By cell and method, the chosen rates; None if every rate failed; absent before the
            first phase is over.
        sizes: By cell and method, the number of trials of both phases; an upper bound until all are
            known.
    """

    def __init__(
        self,
        study: Study,
        outcomes: Mapping[str, Outcome],
        make: TrialMaker,
        drawn: Mapping[str, Point],
    ) -> None:
        self._study = study
        self._outcomes = outcomes
        self._planned = make
        self._drawn = drawn
        self.trials: list[Planned] = []
        self.choices: dict[tuple[str, str], Choice | None] = {}
        self.sizes: dict[tuple[str, str], int] = {}
        self._first: dict[tuple[str, str], _Trials] = {}
        self._second: dict[tuple[str, str], _Trials] = {}
        for cell in study.cells:
            # Controls follow their methods, so that shares and chosen points are known.
            for method in sorted(study.methods, key=lambda one: one.control_of is not None):
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
        first = self._first[place] = self._first_phase(cell, method)
        self.trials += first.known
        most = self._study.most_trials(cell, method, CHOOSE)
        size = len(first.known) if first.are_all else most
        self.sizes[place] = size + self._study.most_trials(cell, method, REPORT)
        if not self._have_ended(first):
            return
        choice = self.choices[place] = self._choice(cell, first.known)
        if choice is None:
            self.sizes[place] = size
            return
        second = self._second[place] = self._second_phase(cell, method, choice)
        self.trials += second.known
        if second.are_all:
            self.sizes[place] = size + len(second.known)

    def _first_phase(self, cell: Cell, method: Method) -> _Trials:
        points = drawn_points(self._study, cell, method)
        planned: list[Planned] = []
        expected, are_known = 0, True
        for index in range(self._study.points(cell, method)):
            seeds = self._seeds(cell, method, index, points)
            scores = self._scores(cell, method, CHOOSE, index)
            planned += [
                self._planned(cell, method, CHOOSE, index, seed, point, score)
                for score in scores.values
                for seed, point in seeds
            ]
            expected += len(scores.values) * len(self._study.choose.seeds)
            are_known = are_known and scores.are_known
        return _Trials(planned, are_known and len(planned) == expected)

    def _seeds(
        self, cell: Cell, method: Method, index: int, points: Sequence[Point] | None
    ) -> list[tuple[int, Point | None]]:
        """Return the seeds at a point that can be planned, with the rates; None to have them drawn.

        Args:
            cell: The cell.
            method: The method.
            index: Number of the point.
            points: All points; None if the sampler tpe draws them.
        """
        seeds = self._study.choose.seeds
        if points is not None:
            return [(seed, points[index]) for seed in seeds]
        # The sampler draws in the trial of the first seed.
        drawing = seeds[:1] if method.control_of is None else ()
        point = self._drawn_point(cell, method, index)
        others = () if point is None else seeds[len(drawing) :]
        return [*((seed, None) for seed in drawing), *((seed, point) for seed in others)]

    def _drawn_point(self, cell: Cell, method: Method, index: int) -> Point | None:
        """Return a point that the sampler tpe drew for a method, or for that of a control."""
        source = method if method.control_of is None else self._study.method(method.control_of)
        seed = self._study.choose.seeds[0]
        return self._drawn.get(self._planned(cell, source, CHOOSE, index, seed, None, None).key)

    def _second_phase(self, cell: Cell, method: Method, choice: Choice) -> _Trials:
        chosen = [choice]
        are_known = True
        if method.control_of is not None:
            model = (cell.name, method.control_of)
            are_known = model in self.choices
            other = self.choices.get(model)
            if other is not None and other.index != choice.index:
                chosen.append(other)
        planned: list[Planned] = []
        for one in chosen:
            scores = self._scores(cell, method, REPORT, one.index)
            are_known = are_known and scores.are_known
            planned += [
                self._planned(cell, method, REPORT, one.index, seed, one.point, score)
                for seed in self._study.report.seeds
                for score in scores.values
            ]
        return _Trials(planned, are_known)

    def _scores(self, cell: Cell, method: Method, phase: str, index: int) -> _Scores:
        """Return the score of a share-matched control, or that of the options of other methods."""
        if method.share_of is None:
            return _OWN_SCORE
        for trials in self._sources((cell.name, method.share_of), phase, index):
            if not self._have_ended(trials):
                return _NOT_YET_KNOWN
            shares = self._shares(trials)
            if shares:
                return _Scores((control_score(fmean(shares)),))
        return _NO_CONTROL

    def _sources(self, method: tuple[str, str], phase: str, index: int) -> Iterator[_Trials]:
        """Yield the trials of a method, by cell and name, that a control takes its share from.

        The first ones that have a share count: others have failed.
        """
        choice = self.choices.get(method)
        if phase == REPORT and choice is not None and choice.index == index:
            yield self._second[method].at(index, len(self._study.report.seeds))
        yield self._first[method].at(index, len(self._study.choose.seeds))
        # The control has as many rate trials as others, so it gets the mean share of the other
        # points.
        yield self._first[method]

    def _have_ended(self, trials: _Trials) -> bool:
        return trials.are_all and all(trial.key in self._outcomes for trial in trials.known)

    def _shares(self, trials: _Trials) -> list[float]:
        """Return the shares of full updates of ended trials; failed ones have none."""
        shares = (self._outcomes[trial.key].full_share for trial in trials.known)
        return [share for share in shares if share is not None]

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
