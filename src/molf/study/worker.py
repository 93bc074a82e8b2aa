"""A worker: take queued trials and run them until the study is over or stopped."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from molf.amounts import duration
from molf.shown import counted
from molf.study.definition import Study
from molf.study.ledger import Ledger, Place, Snapshot
from molf.study.place import definition_of, read_record
from molf.study.plan import COMPLETE, FAILED, Outcome, Plan, Planned, TrialMaker
from molf.study.storage import check_present
from molf.study.trial import TrialRunner

if TYPE_CHECKING:
    from optuna.trial import Trial

_LONGEST_POLL = 10.0  # seconds


@dataclass
class Work:
    """The result of a worker.

    Attributes:
        done: Finished trials of this worker.
        failed: Failed ones among them.
        reused: Those among them whose result was on disk.
        ended: Why it ended: `finished`, `stopped` or `changed`.
        without_rates: Methods, each as `CELL/METHOD`, of which every rate trial failed.
    """

    done: int = 0
    failed: int = 0
    reused: int = 0
    ended: str = "finished"
    without_rates: tuple[str, ...] = ()


class Worker:
    """Runs trials of a study, one at a time.

    Args:
        study: The study.
        make: Makes the planned trials.
        run: Runs one trial.
        say: Prints one line.
        retry_failed: Whether failed trials are queued again at the start.
    """

    def __init__(
        self,
        study: Study,
        make: TrialMaker,
        run: TrialRunner,
        say: Callable[[str], None],
        *,
        retry_failed: bool = False,
    ) -> None:
        self._study = study
        self._make = make
        self._run = run
        self._say = say
        self._started = time.time()
        self._name = f"{platform.node()}:{os.getpid()}"
        self._definition = definition_of(study)
        self._ledger = Ledger(study)
        self._cell = ""  # of the last trial: its task and base model are in memory
        if retry_failed:
            snapshot = self._ledger.read()
            count = self._ledger.requeue_failed(snapshot, self._plan(snapshot).by_key)
            self._say(f"{counted(count, 'failed trial')} queued again")

    def work(self) -> Work:
        """Run trials until none is left, a stop is asked for, or the study file changes.

        Raises:
            StorageError: The storage failed.
        """
        work = Work()
        while True:
            check_present(self._study)
            if self._ledger.stopped_at > self._started:
                work.ended = "stopped"
                return work
            record = read_record(self._study.output_dir)
            if record is not None and record.get("definition") != self._definition:
                work.ended = "changed"
                return work
            snapshot = self._ledger.read()
            if snapshot.running_at:
                # First: the second phase of a method waits for the trial of a dead worker.
                self._ledger.fail_stale(snapshot.running_at)
                snapshot = self._ledger.read()
            plan = self._plan(snapshot)
            if self._ledger.enqueue(plan.unfinished, snapshot):
                snapshot = self._ledger.read()
            place = self._next_place(plan, snapshot)
            if place is not None:
                outcome = self._ledger.run(place, plan.by_key, self._name, self._run_one)
                if outcome is not None:
                    work.done += 1
                    work.failed += outcome.state == FAILED
                    work.reused += outcome.is_reused
            elif snapshot.running_at or plan.unfinished:
                time.sleep(min(_LONGEST_POLL, self._study.heartbeat / 2))
            else:
                work.without_rates = tuple(
                    "/".join(place) for place, choice in plan.choices.items() if choice is None
                )
                return work

    def _plan(self, snapshot: Snapshot) -> Plan:
        return Plan(self._study, snapshot.outcomes, self._make, snapshot.drawn)

    def _next_place(self, plan: Plan, snapshot: Snapshot) -> Place | None:
        """Return a place with queued trials, in the last trial's cell if it has some."""
        order = dict.fromkeys(t.place for t in plan.trials)
        places = [place for place in order if snapshot.waiting.get(place)]
        own = [place for place in places if place[0] == self._cell]
        return next(iter(own or places), None)

    def _run_one(self, planned: Planned, point: dict[str, float], trial: Trial) -> Outcome:
        self._cell = planned.cell.name
        outcome = self._run(planned, point, trial)
        name = f"{planned.cell.name}/{planned.method.name}/{planned.label(point)}"
        if outcome.state == COMPLETE:
            result = f"{planned.cell.metric} {outcome.value:.4g}"
        else:
            result = f"{outcome.state} {outcome.error}".strip()
        took = "reused" if outcome.is_reused else duration(outcome.seconds)
        self._say(f"{name}: {result} ({took})")
        return outcome
