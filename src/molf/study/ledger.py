"""The state of all trials in Optuna's storage, shared by all workers.

Each cell, method and phase is a study of Optuna, named `STUDY/CELL/METHOD/PHASE/DIRECTION-METRIC`.
STUDY is the study's name in the storage (`storage.stored_name`). A trial there carries the identity
of a planned trial. Two trials of one identity may be queued, when workers queue it at the same
moment; the one of the lower number runs.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from molf.study.definition import HYPERBAND, MEDIAN, TPE, Point, Study
from molf.study.outcome import Results, TrialResult, point_of
from molf.study.plan import PRUNED, Outcome, Place, Planned
from molf.study.rates import limits, number_of
from molf.study.running import FullDiskError
from molf.study.snapshot import (
    DROPPED,
    ERROR,
    INDEX,
    INTERRUPTED,
    KEY,
    POINT,
    SECONDS,
    SEED,
    SHARE,
    WORKER,
    Snapshot,
)
from molf.study.storage import (
    failing,
    open_storage,
    signs_of_life,
    storage_errors,
    stored_name,
)

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.trial import FrozenTrial, Trial

Direction = Literal["minimize", "maximize"]
_STOP = "stop"


class Ledger:
    """The trials of a study in Optuna's storage.

    Args:
        study: The study.

    Raises:
        InputError: optuna is not installed, or the storage cannot be opened.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._is_file = study.storage is None
        self._storage = open_storage(study)
        self._name = stored_name(study)
        self._studies: dict[Place, OptunaStudy] = {}
        self._over: dict[Place, list[FrozenTrial]] = {}
        self._results = Results(study)
        with failing(self._study):
            self._control = self._create(self._name, "minimize")

    def _create(self, name: str, direction: Direction) -> OptunaStudy:
        import optuna

        return optuna.create_study(
            study_name=name, storage=self._storage, direction=direction, load_if_exists=True
        )

    def _at(self, place: Place) -> OptunaStudy:
        if place not in self._studies:
            cell = self._study.cell(place[0])
            direction: Direction = "minimize" if cell.minimize else "maximize"
            # Values of another metric would mislead a sampler.
            name = "/".join((self._name, *place, f"{direction}-{cell.metric}"))
            self._studies[place] = self._create(name, direction)
        return self._studies[place]

    def _places(self) -> Iterable[Place]:
        for cell in self._study.cells:
            for method in self._study.methods:
                for phase in self._study.seeds:
                    yield cell.name, method.name, phase

    @property
    def stopped_at(self) -> float:
        """The time of the last request to stop, in seconds since 1970; 0 without one."""
        with failing(self._study):
            found = self._storage.get_study_user_attrs(self._control._study_id)
        return float(found.get(_STOP, 0.0))

    def stop(self, now: float) -> None:
        """Ask all workers that started before this time to end after their trial."""
        with failing(self._study):
            self._control.set_user_attr(_STOP, now)

    def read(self) -> Snapshot:
        """Return the state of all trials."""
        with failing(self._study):
            found = {
                place: self._over.get(place) or self._at(place).get_trials(deepcopy=False)
                for place in self._places()
            }
        # After the trials, because a trial's file is written before it is complete.
        results = self._results.refresh().by_key
        self._over = {
            place: trials
            for place, trials in found.items()
            if self._is_over(place, trials, results)
        }
        return Snapshot(
            found,
            self._study.retries,
            results,
            {cell.name: cell.metric for cell in self._study.cells},
            patience=0 if self._is_file else 3 * self._study.heartbeat,
        )

    def _is_over(
        self, place: Place, trials: Iterable[FrozenTrial], results: Mapping[str, TrialResult]
    ) -> bool:
        """Return whether all trials of a place have succeeded: it is not read again."""
        complete = {t.user_attrs.get(KEY) for t in trials if t.state.name == "COMPLETE"}
        waiting = any(trial.state.name in ("WAITING", "RUNNING") for trial in trials)
        cell, method = self._study.cell(place[0]), self._study.method(place[1])
        most = self._study.most_trials(cell, method, place[2])
        return not waiting and len(complete & results.keys()) >= most

    def enqueue(self, planned: Iterable[Planned], snapshot: Snapshot) -> int:
        """Queue the planned trials that the storage lacks; return their number.

        A trial that is finished on disk, or has lost its file, keeps the point drawn for it.

        Args:
            planned: The trials.
            snapshot: The state of the storage.
        """
        count = 0
        with failing(self._study):
            for trial in planned:
                if trial.key in snapshot.known:
                    continue
                point = trial.point or snapshot.drawn.get(trial.key)
                if point is None and trial.key in self._results.by_key:
                    point = point_of(self._results.by_key[trial.key].row)
                self._queue(trial, point)
                count += 1
        return count

    def requeue_failed(self, snapshot: Snapshot, planned: Mapping[str, Planned]) -> int:
        """Queue failed trials again; return their number."""
        failed = [planned[key] for key in snapshot.failed if key in planned]
        with failing(self._study):
            for trial in failed:
                self._results.delete(trial.key)  # of a training that ended, without a finite metric
                self._queue(trial, trial.point or snapshot.drawn.get(trial.key))
        return len(failed)

    def _queue(self, trial: Planned, point: Point | None) -> None:
        given = point or {}
        attributes = {KEY: trial.key, INDEX: trial.index, SEED: trial.seed, POINT: given}
        self._over.pop(trial.place, None)
        self._at(trial.place).enqueue_trial(given, user_attrs=attributes)

    def fail_stale(self, places: Iterable[Place]) -> None:
        """Fail running trials whose worker died, so that they are queued again."""
        import optuna

        with warnings.catch_warnings(), failing(self._study):
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            for place in places:
                one = self._at(place)
                optuna.storages.fail_stale_trials(one)
                self._fail_unborn(one)

    def _fail_unborn(self, one: OptunaStudy) -> None:
        """Fail trials whose worker died between taking them and its first sign of life."""
        import optuna

        running = one.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        limit = datetime.timedelta(seconds=10 * self._study.heartbeat)
        for trial in running:
            started = trial.datetime_start
            if WORKER in trial.user_attrs or started is None:
                continue
            if datetime.datetime.now() - started > limit:
                with suppress(ValueError, RuntimeError):  # another worker was faster
                    one.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def run(
        self,
        place: Place,
        planned: Mapping[str, Planned],
        worker: str,
        run: Callable[[Planned, Point, Trial], Outcome],
    ) -> Outcome | None:
        """Take a queued trial and run it, with heart-beats; return its outcome.

        Args:
            place: The cell, method and phase.
            planned: The planned trials by key.
            worker: The name of this worker.
            run: Runs a trial at a point; returns its outcome, also of a failure.

        Returns:
            None if no trial was left, or if the taken one must not run.
        """
        import optuna

        outcome: Outcome | None = None
        # The trial may have been failed as stale while its worker slept, so that Optuna cannot end
        # it. Its result is on disk, or it is queued again.
        with failing(self._study), suppress(optuna.exceptions.UpdateFinishedTrialError):
            one = self._at(place)
            trial = self._ask(one, place)
            with (
                _failed_by_errors(one, trial),
                signs_of_life(self._study, self._storage, trial._trial_id),
            ):
                entry = planned.get(trial.user_attrs.get(KEY, ""))
                if entry is None or self._is_taken(one, trial.number, entry.key):
                    trial.set_user_attr(DROPPED, True)
                else:
                    trial.set_user_attr(WORKER, worker)
                    outcome = run(entry, self._suggest(trial, entry), trial)
                _end(one, trial, outcome)
        return outcome

    def _ask(self, one: OptunaStudy, place: Place) -> Trial:
        """Take the next queued trial; a new one without a key if none is queued."""
        one.sampler, one.pruner = self._sampler(one, place), self._pruner()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # heart-beats come from `signs_of_life`
            return one.ask()

    def _is_taken(self, one: OptunaStudy, number: int, key: str) -> bool:
        """Return whether another trial of this identity runs, is finished, or comes first."""
        results = self._results.refresh().by_key
        for other in one.get_trials(deepcopy=False):
            if other.number == number or other.user_attrs.get(KEY) != key:
                continue
            state = other.state.name
            if state == "PRUNED" or (state == "COMPLETE" and key in results):
                return True
            if state in ("RUNNING", "WAITING") and other.number < number:
                return True
        return False

    def _suggest(self, trial: Trial, planned: Planned) -> Point:
        """Return the trial's rates: those it was queued with, else the sampler's."""
        given = trial.user_attrs.get(POINT) or {}
        rates = self._study.rates(planned.cell, planned.method)
        point = {}
        for name, (low, high) in limits(rates).items():
            if given and name not in given:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = trial.suggest_float(name, low, high, log=True)
            point[name] = float(given.get(name, f"{value:.4g}"))
        return point

    def _sampler(self, one: OptunaStudy, place: Place) -> Any:
        import optuna

        number = len(one.get_trials(deepcopy=False))
        seed = number_of(self._study.name, *place, str(number))
        if self._study.choose.sampler != TPE:
            return optuna.samplers.RandomSampler(seed=seed)
        startup = max(1, (self._study.choose.trials or 0) // 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=startup, constant_liar=True
            )

    def _pruner(self) -> Any:
        import optuna

        kind = self._study.choose.prune
        if kind == MEDIAN:
            return optuna.pruners.MedianPruner(n_startup_trials=2)
        if kind == HYPERBAND:
            return optuna.pruners.HyperbandPruner()
        return optuna.pruners.NopPruner()


@contextmanager
def _failed_by_errors(one: OptunaStudy, trial: Trial) -> Iterator[None]:
    """Record a trial of Optuna as failed if the block raises; as interrupted if it can run again.

    An error of the storage only passes through.
    """
    import optuna

    try:
        yield
    except storage_errors():
        raise
    except BaseException as error:
        with suppress(*storage_errors(), optuna.exceptions.UpdateFinishedTrialError):
            if isinstance(error, (KeyboardInterrupt, FullDiskError)):
                trial.set_user_attr(INTERRUPTED, True)
            _end(one, trial, None)
        raise


def _end(one: OptunaStudy, trial: Trial, outcome: Outcome | None) -> None:
    """Record the end of a trial of Optuna; without an outcome as failed."""
    from optuna.trial import TrialState

    if outcome is None:
        one.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        return
    attributes = {
        SHARE: outcome.full_share,
        SECONDS: outcome.seconds,
        ERROR: outcome.error or None,
    }
    for name, value in attributes.items():
        if value is not None:
            trial.set_user_attr(name, value)
    if outcome.state == PRUNED:
        state = TrialState.PRUNED
    else:
        state = TrialState.FAIL if outcome.value is None else TrialState.COMPLETE
    one.tell(trial, outcome.value, state, skip_if_finished=True)
