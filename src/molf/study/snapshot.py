"""The state of all trials of a study at one moment, from those of Optuna."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING

from molf.study.definition import CHOOSE, Point
from molf.study.outcome import TrialResult, outcome_of
from molf.study.plan import FAILED, PRUNED, Outcome, Place

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Attributes of a trial of Optuna.
KEY, INDEX, SEED, POINT = "key", "index", "seed", "point"
WORKER, ERROR, DROPPED, INTERRUPTED = "worker", "error", "dropped", "interrupted"
SHARE, SECONDS = "full_share", "seconds"


class Snapshot:
    """The state of all trials at one moment.

    Args:
        trials: Trials of Optuna by place.
        retries: How often a trial starts again whose worker died.
        results: Finished trials on disk by identity; values and shares are those of their rows.
        metrics: The metric of each cell by name.
        patience: Seconds after which a complete trial without a readable file is lost. A file that
            another machine wrote may be seen late.

    Attributes:
        outcomes: Finished trials by identity.
        running: Names of the workers by identity of their trials.
        waiting: Number of queued trials by place.
        running_at: Places with running trials.
        drawn: Points of the first phase by identity, also those that the sampler has drawn.
        known: Identities that are queued, running or finished.
    """

    def __init__(
        self,
        trials: Mapping[Place, list[FrozenTrial]],
        retries: int,
        results: Mapping[str, TrialResult],
        metrics: Mapping[str, str],
        patience: float = 0.0,
    ) -> None:
        self._patience = datetime.timedelta(seconds=patience)
        self._results = results
        self._metrics = metrics
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, str] = {}
        self.waiting: dict[Place, int] = {}
        self.running_at: set[Place] = set()
        self.drawn: dict[str, Point] = {}
        self.known: set[str] = set()
        for place, found in trials.items():
            died: dict[str, int] = {}
            for trial in found:
                self._add(place, trial, died)
            for key, count in died.items():
                if key not in self.known and count > retries:
                    self.outcomes[key] = Outcome(
                        FAILED, None, {}, error=f"its worker died {count} times"
                    )
        self.known |= self.outcomes.keys()

    @property
    def failed(self) -> dict[str, Outcome]:
        """Failed trials by identity."""
        return {key: one for key, one in self.outcomes.items() if one.state == FAILED}

    def _add(self, place: Place, trial: FrozenTrial, died: dict[str, int]) -> None:
        attributes = trial.user_attrs
        key = attributes.get(KEY)
        if key is None:
            return
        state = trial.state.name
        point = _point(trial)
        if point and place[2] == CHOOSE:
            self.drawn[key] = point
        if state == "WAITING":
            self.waiting[place] = self.waiting.get(place, 0) + 1
            self.known.add(key)
            self.outcomes.pop(key, None)  # a failed trial that is queued again
        elif state == "RUNNING":
            self.running[key] = str(attributes.get(WORKER, ""))
            self.running_at.add(place)
            self.known.add(key)
            self.outcomes.pop(key, None)
        elif key in self._results:
            # Also of a worker that died after it wrote the file.
            self.outcomes[key] = outcome_of(self._results[key], self._metrics[place[0]])
        elif state == "COMPLETE":
            if not self._is_lost(trial):
                self.known.add(key)
        elif state == "PRUNED" or ERROR in attributes:
            self.outcomes[key] = Outcome(
                state=PRUNED if state == "PRUNED" else FAILED,
                value=None,
                point=point,
                full_share=attributes.get(SHARE),
                seconds=float(attributes.get(SECONDS, 0.0)),
                error=str(attributes.get(ERROR, "")),
            )
        elif not attributes.get(DROPPED):
            self.outcomes.pop(key, None)
            if not attributes.get(INTERRUPTED):
                died[key] = died.get(key, 0) + 1

    def _is_lost(self, trial: FrozenTrial) -> bool:
        """Return whether a complete trial without a readable file must run again."""
        ended = trial.datetime_complete
        return ended is None or datetime.datetime.now() - ended >= self._patience


def _point(trial: FrozenTrial) -> Point:
    given = trial.user_attrs.get(POINT) or {}
    point = {**{k: float(f"{v:.4g}") for k, v in trial.params.items()}, **given}
    return {name: float(value) for name, value in point.items()}
