"""`molf study`: run many trainings from one file, and compare methods fairly."""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from molf.amounts import duration
from molf.cli.lines import one_line, say
from molf.console import PlainConsole
from molf.errors import InputError
from molf.masking import mask_text
from molf.paths import expanded
from molf.shown import counted
from molf.streams import best_effort

if TYPE_CHECKING:
    from molf.study.definition import Study
    from molf.study.plan import Plan, TrialMaker
    from molf.study.snapshot import Snapshot
    from molf.study.status import Status

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
    from molf.study.checks import check_data, differing_scalings
    from molf.study.launch import run_workers
    from molf.study.place import write_record
    from molf.study.storage import check_opens
    from molf.study.warm import WarmInputs

    if workers < 1:
        raise InputError(f"Invalid workers={workers}. Must be at least 1.")
    if workers > 1 and retry_failed:
        raise InputError("retry_failed is for one worker. Run `molf study work` with it first.")
    if workers == 1 and not dry_run:
        return work_on_study(study, accept_changes=accept_changes, retry_failed=retry_failed)
    opened, make = _open(study, accept_changes=accept_changes)
    check_data(opened, make, WarmInputs())
    if dry_run:
        _print_plan(opened, workers)
        for line in differing_scalings(opened, make):
            _print(f"Methods differ in the scaling of LoRA factors, which alpha sets, in {line}.")
        return 0
    check_opens(opened)
    write_record(opened)
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
    from molf.study.checks import check_data
    from molf.study.place import write_record
    from molf.study.storage import check_opens
    from molf.study.trial import TrialRunner
    from molf.study.warm import WarmInputs
    from molf.study.worker import Worker

    opened, make = _open(study, accept_changes=accept_changes)
    inputs = WarmInputs()
    check_data(opened, make, inputs)
    check_opens(opened)
    write_record(opened)
    worker = Worker(opened, make, TrialRunner(opened, inputs), _say, retry_failed=retry_failed)
    work = worker.work()
    failures = f", {work.reused} of them reused" if work.reused else ""
    if work.failed:
        failures += f", {work.failed} of them failed"
    if work.without_rates:
        failures += f"; every rate failed for {', '.join(work.without_rates)}"
    ends = {
        "finished": "no trial is left",
        "stopped": "the study was stopped",
        "changed": "the study file was changed by another worker",
    }
    _say(f"{counted(work.done, 'trial')} run here{failures}; {ends[work.ended]}")
    return 0


def stop_study(study: Path, /) -> None:
    """Let all workers of a study end after their trial.

    Args:
        study: The study file.
    """
    from molf.study.ledger import Ledger

    opened, _ = _open(study, accept_changes=True)
    _check_started(opened)
    ledger = Ledger(opened)
    ledger.stop(time.time())
    running = counted(len(ledger.read().running), "running trial")
    _print(f"{running} will be finished; no other one starts.")


def show_status(study: Path, /) -> None:
    """Print progress, expected end, failures and the best trials of a study.

    Args:
        study: The study file.
    """
    from molf.study.outcome import all_results
    from molf.study.status import status_of

    opened, make = _open(study, accept_changes=True)
    _check_started(opened)
    snapshot, plan = _read_plan(opened, make)
    results = all_results(opened)
    rows = [results[trial.key].row for trial in plan.trials if trial.key in results]
    _print_status(opened, status_of(opened, plan, snapshot, rows))


def restore_study(
    study: Path, folder: Path, /, *, accept_changes: Annotated[bool, _SWITCH] = False
) -> None:
    """Take finished trials from a folder that `molf study report` wrote; none of them runs again.

    Args:
        study: The study file.
        folder: The folder with the CSV files.
        accept_changes: Go on with a study file that changed since its finished trials.
    """
    from molf.study.report.restoring import restore

    given = expanded(folder)
    opened, make = _open(study, accept_changes=accept_changes)
    found = restore(opened, make, given)
    here = f"{opened.output_dir}: " + counted(found.taken, "finished trial") + f" from {given}"
    others = (
        (found.present, "were there already"),
        (found.left_out, "are not part of this study"),
        (found.unfinished, "failed or were ended early, and will run again"),
    )
    more = "".join(f"; {number} {text}" for number, text in others if number)
    _print(f"{here}{more}. `molf study run` runs the rest.")
    if found.other_metrics:
        _warn(
            f"{found.other_metrics} of them have metrics of another version than new trials: "
            "values may differ for equal answers."
        )


def report_study(
    study: Path,
    /,
    *,
    to: Path | None = None,
    figures: bool = True,
) -> None:
    """Write the tables, figures and CSV files of a study.

    Args:
        study: The study file; or a folder that this command wrote, whose report is made again from
            its CSV files alone.
        to: The folder to write to; by default the folder `report` in the study's directory.
        figures: Draw figures (needs matplotlib).
    """
    from molf.study.report.records import read_records
    from molf.study.report.writing import write_report
    from molf.study.status import origin_of

    given = expanded(study)
    if given.is_dir():
        if to is not None:
            raise InputError(f"{given} is a stored study; its report is written there. Leave --to.")
        folder = given
    else:
        folder = _store(given, None if to is None else expanded(to))
    _print(str(write_report(folder, figures=figures)))
    if origin := origin_of(read_records(folder).rows):
        _warn(f"{origin}.")


def _store(study: Path, to: Path | None) -> Path:
    """Write the records of a study to a folder; return it."""
    from molf.study.outcome import all_results
    from molf.study.report.records import check_folder, write_records

    opened, make = _open(study, accept_changes=True)
    _check_started(opened)
    folder = opened.output_dir / "report" if to is None else to
    check_folder(folder, opened.name)
    snapshot, plan = _read_plan(opened, make)
    write_records(folder, opened, plan, snapshot.outcomes, all_results(opened))
    return folder


def _read_plan(study: Study, make: TrialMaker) -> tuple[Snapshot, Plan]:
    """Return the state of a study's trials, and the trials that are known by it."""
    from molf.study.ledger import Ledger
    from molf.study.plan import Plan

    snapshot = Ledger(study).read()
    return snapshot, Plan(study, snapshot.outcomes, make, snapshot.drawn)


def _open(study: Path, *, accept_changes: bool) -> tuple[Study, TrialMaker]:
    from molf.cli.study_options import open_study
    from molf.study.checks import check_options
    from molf.study.place import check_directory, check_unchanged, find_change

    opened, make = open_study(study)
    check_options(opened, make)
    check_directory(opened)
    change = find_change(opened, make)
    check_unchanged(change, accepted=accept_changes)
    if change is not None and change.left_out:
        _warn(str(change))
    return opened, make


def _check_started(study: Study) -> None:
    from molf.study.place import RECORD
    from molf.study.storage import gone, storage_file

    if not (study.output_dir / RECORD).is_file():
        raise InputError(
            f"The study {study.name} has not started: {study.output_dir} has no {RECORD}. `molf "
            "study run` starts it."
        )
    if study.storage is None and not storage_file(study).is_file():
        raise InputError(gone(study))


def _print_plan(study: Study, workers: int) -> None:

    pairs = len(study.cells) * len(study.methods)
    seconds = study.size * study.seconds / workers
    controls = sum(method.control_of is not None for method in study.methods)
    most = "at most " if controls else ""
    _print(
        f"{study.name}: {counted(len(study.cells), 'cell')}, "
        f"{counted(len(study.methods), 'method')}, {most}{counted(study.size, 'trial')}"
    )
    for cell in study.cells:
        points = study.points(cell, study.methods[0])
        _print(
            f"  {cell.name}: {counted(points, 'rate')} x "
            f"{counted(len(study.choose.seeds), 'seed')} per method by {cell.metric} on the "
            "validation part"
        )
    seeds = counted(len(study.report.seeds), "seed")
    _print(f"  {pairs} x {seeds} at the chosen rates on the test part")
    if controls:
        again = len(study.cells) * controls
        _print(f"  {again} x {seeds} of controls at the chosen rates of their methods")
    _print(
        f"  {most or 'about '}{duration(seconds)} with {counted(workers, 'worker')} at "
        f"{study.seconds:g} s a trial (the file's `seconds`)"
    )


def _print_status(study: Study, status: Status) -> None:

    _print(
        f"{study.name}: {status.complete} of {status.size} trials complete, {len(status.failed)} "
        f"failed, {status.pruned} pruned, {len(status.running)} running, {status.left} left; rates "
        f"are chosen for {status.chosen} of {len(study.cells) * len(study.methods)} methods in "
        "cells"
    )
    if status.left:
        source = "measured" if status.measured else "from the study file"
        if status.running:
            end = datetime.datetime.now() + datetime.timedelta(seconds=status.seconds)
            _print(
                f"  end: about {end:%Y-%m-%d %H:%M}, in {duration(status.seconds)} with "
                f"{counted(len(status.running), 'worker')} (seconds per trial {source})"
            )
        else:
            _print(
                f"  end: no worker is running; one takes about {duration(status.seconds)} "
                f"(seconds per trial {source})"
            )
    for trial, worker in status.running.items():
        _print(f"  running: {trial} ({worker})")
    for best in status.best:
        _print(
            f"  best rate trial in {best.cell.name}: {best.cell.metric} {best.value:.4g}, "
            f"{best.method}, {best.label}"
        )
    for failure in status.failed:
        _print(f"  failed: {failure}")
    if status.origin:
        _print(f"  {status.origin}")


def _say(text: str) -> None:
    stream = best_effort(sys.stderr)
    stream.write(f"{time.strftime('%H:%M:%S')} {one_line(mask_text(text))}\n")
    stream.flush()


def _warn(text: str) -> None:
    say("warning", text)


def _print(text: str) -> None:
    PlainConsole().lines(text)
