"""The state of all trials in Optuna's storage, shared by all workers.

Each cell, method and phase is a study of Optuna, named `STUDY/CELL/METHOD/PHASE`. A trial there
carries the identity of a planned trial. Two trials of one identity may be queued, when workers
queue it at the same moment; the one of the lower number runs.
"""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from molf.errors import InputError
from molf.study.definition import CHOOSE, HYPERBAND, MEDIAN, TPE, Cell, Method, Point, Study
from molf.study.plan import PRUNED, Outcome, Planned
from molf.study.rates import limits, number_of
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
    Place,
    Snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna import Study as OptunaStudy
    from optuna.trial import FrozenTrial, Trial

STORAGE = "optuna.sqlite"
_ATTEMPTS = 5
Direction = Literal["minimize", "maximize"]
_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_LOCKED_SECONDS = 60  # that SQLite waits for another process's transaction
_STOP = "stop"


class StorageError(RuntimeError):
    """The storage failed while the study ran; one line."""


class Dropped(Exception):  # noqa: N818 (no error: the trial is another's, or was never planned)
    """A queued trial that must not run."""


def storage_address(study: Study) -> str:
    """Return the address of the study's storage."""
    if study.storage is None:
        return f"sqlite:///{(study.output_dir / STORAGE).absolute()}"
    scheme, separator, rest = study.storage.partition("://")
    # SQLAlchemy's default driver is psycopg2; the extra installs its successor.
    return f"{_DRIVERS.get(scheme, scheme)}{separator}{rest}"


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
        self._storage = self._open()
        self._studies: dict[Place, OptunaStudy] = {}
        self._over: dict[Place, list[FrozenTrial]] = {}
        with self.failing():
            self._control = self._create(study.name, "minimize")

    def _open(self) -> Any:
        optuna = _optuna()
        address = storage_address(self._study)
        options: dict[str, Any] = {"pool_pre_ping": True}
        if address.startswith("sqlite"):
            options["connect_args"] = {"timeout": _LOCKED_SECONDS}
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=self._study.retries)

        def connect() -> Any:
            with self._creating():
                return optuna.storages.RDBStorage(
                    address,
                    engine_kwargs=options,
                    heartbeat_interval=self._study.heartbeat,
                    grace_period=3 * self._study.heartbeat,
                    heartbeat_stale_trial_callback=retry,
                )

        try:
            return _again_if_made_elsewhere(connect)
        except ImportError as error:
            raise InputError(
                f"The storage {_shown(address)} needs a driver that is not installed: {error}. "
                "Run: pip install 'molf[study]'."
            ) from error
        except Exception as error:
            raise InputError(
                f"The storage {_shown(address)} cannot be opened: {_cause(error)}."
            ) from error

    @contextmanager
    def _creating(self) -> Iterator[None]:
        """Let one process at a time make the tables of a SQLite file."""
        if not self._is_file:
            yield
            return
        with FileLock(self._study.output_dir / f".{STORAGE}.lock", timeout=_LOCKED_SECONDS):
            yield

    def check_present(self) -> None:
        """Check that a storage file is still there.

        Raises:
            StorageError: It was deleted.
        """
        if self._is_file and not (self._study.output_dir / STORAGE).is_file():
            raise StorageError(
                f"The storage {self._study.output_dir / STORAGE} is gone. Finished trials are in "
                f"{self._study.output_dir / 'results'}: start again, and none of them is repeated."
            )

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Turn errors of the storage in the block into one line.

        Raises:
            StorageError: The storage failed.
        """
        import optuna
        import sqlalchemy.exc

        try:
            yield
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
            address = _shown(storage_address(self._study))
            raise StorageError(
                f"The storage {address} failed: {_cause(error)}. Finished trials are kept; start "
                "again when it is reachable."
            ) from error

    def _create(self, name: str, direction: Direction) -> OptunaStudy:
        import optuna

        return optuna.create_study(
            study_name=name, storage=self._storage, direction=direction, load_if_exists=True
        )

    def _at(self, cell: Cell, method: Method, phase: str) -> OptunaStudy:
        place = (cell.name, method.name, phase)
        if place not in self._studies:
            name = "/".join((self._study.name, *place))
            self._studies[place] = self._create(name, "minimize" if cell.minimize else "maximize")
        return self._studies[place]

    def _places(self) -> Iterable[tuple[Cell, Method, str]]:
        for cell in self._study.cells:
            for method in self._study.methods:
                for phase in self._study.seeds:
                    yield cell, method, phase

    @property
    def stopped_at(self) -> float:
        """The time of the last request to stop, in seconds since 1970; 0 without one."""
        return float(self._attributes().get(_STOP, 0.0))

    def stop(self, now: float) -> None:
        """Ask all workers that started before this time to end after their trial."""
        self._control.set_user_attr(_STOP, now)

    def _attributes(self) -> Mapping[str, Any]:
        return self._storage.get_study_user_attrs(self._control._study_id)

    def read(self) -> Snapshot:
        """Return the state of all trials."""
        found: dict[Place, list[FrozenTrial]] = {}
        with self.failing():
            for cell, method, phase in self._places():
                place = (cell.name, method.name, phase)
                if place not in self._over:
                    found[place] = self._at(cell, method, phase).get_trials(deepcopy=False)
                    if self._is_over(cell, method, phase, found[place]):
                        self._over[place] = found[place]
                else:
                    found[place] = self._over[place]
        return Snapshot(found, self._study.retries)

    def _is_over(
        self, cell: Cell, method: Method, phase: str, trials: Iterable[FrozenTrial]
    ) -> bool:
        """Return whether all trials of a place have succeeded: it is not read again."""
        tried = self._study.points(cell, method) if phase == CHOOSE else 1
        complete = {t.user_attrs.get(KEY) for t in trials if t.state.name == "COMPLETE"}
        waiting = any(trial.state.name in ("WAITING", "RUNNING") for trial in trials)
        return not waiting and len(complete) >= tried * len(self._study.seeds[phase])

    def enqueue(
        self,
        planned: Iterable[Planned],
        snapshot: Snapshot,
        drawn: Mapping[str, Point] | None = None,
    ) -> int:
        """Queue the planned trials that the storage lacks; return their number.

        Args:
            planned: The trials.
            snapshot: The state of the storage.
            drawn: Points by identity of trials that are finished on disk, so that the sampler draws
                no others for them.
        """
        count = 0
        with self.failing():
            for trial in planned:
                if trial.key in snapshot.known:
                    continue
                self._queue(trial, trial.point or (drawn or {}).get(trial.key))
                count += 1
        return count

    def requeue_failed(self, snapshot: Snapshot, planned: Mapping[str, Planned]) -> int:
        """Queue failed trials again; return their number."""
        failed = [planned[key] for key in snapshot.failed if key in planned]
        for trial in failed:
            self._queue(trial, trial.point)
        return len(failed)

    def _queue(self, trial: Planned, point: Point | None) -> None:
        given = point or {}
        attributes = {KEY: trial.key, INDEX: trial.index, SEED: trial.seed, POINT: given}
        one = self._at(trial.cell, trial.method, trial.phase)
        self._over.pop((trial.cell.name, trial.method.name, trial.phase), None)
        one.enqueue_trial(given, user_attrs=attributes)

    def fail_stale(self, places: Iterable[Place]) -> None:
        """Fail running trials whose worker died; Optuna queues them again."""
        import optuna

        with warnings.catch_warnings(), self.failing():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            for cell, method, phase in places:
                one = self._at(self._study.cell(cell), self._study.method(method), phase)
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

        cell, method = self._study.cell(place[0]), self._study.method(place[1])
        one = self._at(cell, method, place[2])
        outcomes: list[Outcome] = []

        def objective(trial: Trial) -> float:
            attributes = trial.user_attrs
            entry = planned.get(attributes.get(KEY, ""))
            if entry is None or self._is_taken(one, trial.number, entry.key):
                trial.set_user_attr(DROPPED, True)
                raise Dropped
            # Optuna's own first heart-beat comes from a thread. A trial whose worker dies before it
            # has none, is never stale, and would run for ever.
            self._storage.record_heartbeat(trial._trial_id)
            trial.set_user_attr(WORKER, worker)
            point = self._suggest(trial, cell, method)
            try:
                outcome = run(entry, point, trial)
            except KeyboardInterrupt:
                trial.set_user_attr(INTERRUPTED, True)
                raise
            for name, value in (
                (SHARE, outcome.full_share),
                (SECONDS, outcome.seconds),
                (ERROR, outcome.error or None),
            ):
                if value is not None:
                    trial.set_user_attr(name, value)
            outcomes.append(outcome)
            if outcome.state == PRUNED:
                raise optuna.TrialPruned
            if outcome.value is None:
                raise Dropped
            return outcome.value

        one.sampler, one.pruner = self._sampler(one, place), self._pruner()
        with self.failing():
            try:
                one.optimize(objective, n_trials=1, catch=(Dropped,))
            except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
                # The trial was failed as stale while its worker slept. Its result is on disk, and
                # the worker that takes it next reads it there.
                if not outcomes:
                    raise
        return outcomes[0] if outcomes else None

    def _is_taken(self, one: OptunaStudy, number: int, key: str) -> bool:
        """Return whether another trial of this identity runs, is finished, or comes first."""
        for other in one.get_trials(deepcopy=False):
            if other.number == number or other.user_attrs.get(KEY) != key:
                continue
            state = other.state.name
            if state in ("COMPLETE", "PRUNED"):
                return True
            if state in ("RUNNING", "WAITING") and other.number < number:
                return True
        return False

    def _suggest(self, trial: Trial, cell: Cell, method: Method) -> Point:
        """Return the trial's rates: those it was queued with, else the sampler's."""
        given = trial.user_attrs.get(POINT) or {}
        point = {}
        for name, (low, high) in limits(self._study.rates(cell, method)).items():
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


def _again_if_made_elsewhere(connect: Callable[[], Any]) -> Any:
    """Connect; again after a moment if another worker was making the tables of a new database."""
    import sqlalchemy.exc

    for attempt in range(_ATTEMPTS):
        try:
            return connect()
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(1 + attempt)
    raise AssertionError(attempt)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "Studies need optuna, which is not installed. Run: pip install 'molf[study]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _shown(address: str) -> str:
    """Return an address without its password."""
    from sqlalchemy.engine import make_url

    try:
        return make_url(address).render_as_string(hide_password=True)
    except Exception:  # not an address
        return address.split("@")[-1]


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().split("\n")
    return lines[0].rstrip(".") or type(error).__name__
