"""The storage of a study fails while a trial runs: one line, and the study goes on later."""

import sqlite3
import time
from contextlib import ExitStack, closing

import pytest
from optuna.exceptions import StorageInternalError

from molf.cli import main
from molf.study.ledger import Ledger
from molf.study.storage import signs_of_life
from study_helpers import FFT, Pretended, study_of, work

GONE = "gone. 2 finished trials in "
LOCKED = "failed: database is locked. Finished trials are kept; start again when it is reachable."


class Failing(Pretended):
    """Deletes or locks the storage within the second trial, after its result."""

    def __init__(self, study, kind, stack):
        super().__init__(study)
        self.kind, self.stack = kind, stack
        self.storage = study.output_dir / "optuna.sqlite"

    def __call__(self, planned, point, trial=None):
        outcome = super().__call__(planned, point, trial)
        if len(self.ran) == 2:
            self.fail()
        return outcome

    def fail(self):
        if self.kind == "deleted":
            self.storage.unlink()
        else:
            other = self.stack.enter_context(closing(sqlite3.connect(self.storage)))
            other.execute("BEGIN EXCLUSIVE")


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr("molf.study.storage._LOCKED_SECONDS", 0.1)
    return study_of(tmp_path, methods=[FFT], heartbeat=1)


@pytest.mark.parametrize(("kind", "message"), [("deleted", GONE), ("locked", LOCKED)])
def test_a_storage_that_fails_within_a_trial_is_one_line(
    study, tmp_path, monkeypatch, capfd, kind, message
):
    opened, make = study
    with ExitStack() as stack:
        runner = Failing(opened, kind, stack)
        monkeypatch.setattr("molf.study.trial.TrialRunner", lambda *_: runner)
        assert main(["study", "work", str(tmp_path / "study.yaml")]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3  # of two trials, and of the error
    assert lines[2].startswith("molf: error: The storage ")
    assert message in lines[2]

    again = Pretended(opened)
    done, _ = work(opened, make, again)
    assert len(again.ran) == opened.size - 2
    assert done.failed == 0


def test_an_interrupt_while_the_storage_is_locked_is_an_interrupt(study):
    opened, make = study
    with ExitStack() as stack:
        runner = Failing(opened, "locked", stack)

        def run(planned, point, trial):
            runner.fail()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work(opened, make, run)


def test_signs_of_life_go_on_after_the_storage_failed_for_a_moment(study):
    """Else another worker takes the trial."""
    opened, _ = study
    signs = []

    class Storage:
        def record_heartbeat(self, trial):
            signs.append(trial)
            if len(signs) == 2:
                raise StorageInternalError("for a moment")

    with signs_of_life(opened, Storage(), 7):
        deadline = time.monotonic() + 60
        while len(signs) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert signs == [7, 7, 7]


def test_an_error_of_the_program_within_a_trial_fails_it_at_once(study):
    opened, make = study

    def run(planned, point, trial):
        raise AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        work(opened, make, run)
    assert not Ledger(opened).read().running
