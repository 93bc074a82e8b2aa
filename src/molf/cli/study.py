"""`molf study`: run many trainings from one file, and compare methods fairly."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from molf.errors import InputError
from molf.streams import best_effort

if TYPE_CHECKING:
    from molf.study.definition import Study
    from molf.study.plan import TrialMaker

_SWITCH = Parameter(negative=())


def run_study(
    study: Path,
    /,
    *,
    workers: int = 1,
    accept_changes: Annotated[bool, _SWITCH] = False,
    retry_failed: Annotated[bool, _SWITCH] = False,
    dry_run: Annotated[bool, _SWITCH] = False,
) -> int:
    """Run the trials of a study with workers on this machine, and wait for their end.

    Args:
        study: The study file.
        workers: Number of processes that run trials.
        accept_changes: Go on with a study file that changed since its finished trials.
        retry_failed: Run failed trials again.
        dry_run: Check everything, and print the number of trials and the expected time.
    """
    from molf.study.launch import run_workers

    if workers < 1:
        raise InputError(f"Invalid workers={workers}. Must be at least 1.")
    opened, make = _open(study, accept_changes=accept_changes, write=not dry_run)
    if dry_run:
        _print_plan(opened, make, workers)
        return 0
    if workers == 1:
        return _work(opened, make, retry_failed=retry_failed)
    if retry_failed:
        raise InputError("retry_failed is for one worker. Run `molf study work` with it first.")
    failed = run_workers(["study", "work", str(study)], workers, opened.retries, _say)
    return 1 if failed else 0


def work_on_study(
    study: Path,
    /,
    *,
    accept_changes: Annotated[bool, _SWITCH] = False,
    retry_failed: Annotated[bool, _SWITCH] = False,
) -> int:
    """Take trials of a study and run them until none is left: one worker of many.

    Args:
        study: The study file.
        accept_changes: Go on with a study file that changed since its finished trials.
        retry_failed: Run failed trials again.
    """
    opened, make = _open(study, accept_changes=accept_changes, write=True)
    return _work(opened, make, retry_failed=retry_failed)


def stop_study(study: Path, /) -> None:
    """Let all workers of a study end after their trial.

    Args:
        study: The study file.
    """
    from molf.study.ledger import Ledger

    opened, _ = _open(study, accept_changes=True, write=False)
    _check_started(opened)
    ledger = Ledger(opened)
    ledger.stop(time.time())
    running = ledger.read().running
    _print(f"{len(running)} running trials will be finished; no other one starts.")


def _open(study: Path, *, accept_changes: bool, write: bool) -> tuple[Study, TrialMaker]:
    from molf.cli.study_options import open_study
    from molf.study.place import check_directory, check_unchanged, find_change, write_record
    from molf.study.worker import check_trials

    opened, make = open_study(study)
    check_trials(opened, make)
    check_directory(opened)
    check_unchanged(find_change(opened, make), accepted=accept_changes)
    if write:
        write_record(opened)
    return opened, make


def _work(study: Study, make: TrialMaker, *, retry_failed: bool) -> int:
    from molf.study.trial import TrialRunner
    from molf.study.warm import WarmInputs
    from molf.study.worker import Worker

    runner = TrialRunner(study, WarmInputs())
    worker = Worker(study, make, runner, _say, retry_failed=retry_failed)
    work = worker.work()
    failures = f", {work.failed} of them failed" if work.failed else ""
    ends = {
        "finished": "no trial is left",
        "stopped": "the study was stopped",
        "changed": "the study file was changed by another worker",
    }
    _say(f"{work.done} trials run here{failures}; {ends[work.ended]}")
    return 0


def _check_started(study: Study) -> None:
    from molf.study.ledger import STORAGE

    if study.storage is None and not (study.output_dir / STORAGE).is_file():
        raise InputError(f"The study {study.name} has not started: {study.output_dir} is missing.")


def _print_plan(study: Study, make: TrialMaker, workers: int) -> None:
    from molf.study.reading import duration

    pairs = len(study.cells) * len(study.methods)
    seconds = study.size * study.seconds / workers
    _print(
        f"{study.name}: {len(study.cells)} cells, {len(study.methods)} methods, {study.size} trials"
    )
    for cell in study.cells:
        points = study.points(cell, study.methods[0])
        _print(
            f"  {cell.name}: {points} rates x {len(study.choose.seeds)} seeds per method by "
            f"{cell.metric} on the validation part"
        )
    _print(f"  {pairs} x {len(study.report.seeds)} seeds at the chosen rates on the test part")
    _print(
        f"  about {duration(seconds)} with {workers} workers at {study.seconds:g} s a trial "
        "(the file's `seconds`)"
    )


def _say(text: str) -> None:
    from molf.cli.lines import one_line
    from molf.masking import mask_text

    stream = best_effort(sys.stderr)
    stream.write(f"{time.strftime('%H:%M:%S')} {one_line(mask_text(text))}\n")
    stream.flush()


def _print(text: str) -> None:
    from molf.console import PlainConsole

    PlainConsole().lines(text)
