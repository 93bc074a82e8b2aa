"""The expected end of a study, computed by hand from the seconds of its trials."""

import datetime
import warnings

import pytest

from molf.cli import main
from molf.study.ledger import Ledger
from molf.study.outcome import outcome_of, result_file, write_result
from molf.study.place import write_record
from molf.study.plan import Plan
from study_helpers import result_of, study_of

# Seconds of the rate trials that end; each method has 3 of them, and 5 trials of the second phase.
SECONDS = {"fft": [10.0, 20.0, 60.0], "lora": [100.0, 7.0]}


class LateEvening(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 23, 58)


class Progress:
    """A study of one cell and two methods whose trials are run one by one."""

    def __init__(self, study, make, path):
        self.study, self.make, self.path = study, make, path
        self.ledger = Ledger(study)

    def run(self, method, seconds, value):
        place, planned = ("facts", method, "choose"), self.queue().by_key
        self.ledger.run(place, planned, "first", self.trial(seconds, value))

    def trial(self, seconds, value):
        def run(planned, point, trial):
            result = result_of(planned, point, value, seconds=seconds)
            label = planned.label(point)
            write_result(result_file(self.study, "facts", planned.method.name, label), result)
            return outcome_of(result, planned.cell.metric)

        return run

    def take(self, method, phase):
        """Take a trial, as a worker does that has not ended it."""
        self.queue()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.ledger._at(("facts", method, phase)).ask()

    def queue(self):
        snapshot = self.ledger.read()
        plan = Plan(self.study, snapshot.outcomes, self.make, snapshot.drawn)
        self.ledger.enqueue(plan.unfinished, snapshot)
        return plan

    def end(self, capsys):
        """The line about the end that `molf study status` prints."""
        assert main(["study", "status", str(self.path)]) == 0
        (line,) = [one for one in capsys.readouterr().out.splitlines() if "  end: " in one]
        return line.strip()


@pytest.fixture
def progress(tmp_path):
    study, make = study_of(tmp_path)
    write_record(study)
    return Progress(study, make, tmp_path / "study.yaml")


def test_the_expected_end_is_that_of_the_mean_seconds_per_method(progress, capsys, monkeypatch):
    # 16 trials of 30 s.
    alone = "end: no worker is running; one takes about "
    assert progress.end(capsys) == f"{alone}8 min (seconds per trial from the study file)"

    for seconds in SECONDS["fft"]:
        progress.run("fft", seconds, 0.5)
    # fft: 5 are left, of 30 s on average. lora: 8, of the cell's 30 s.
    assert progress.end(capsys) == f"{alone}6 min 30 s (seconds per trial measured)"

    progress.run("lora", SECONDS["lora"][0], 0.5)
    progress.run("lora", SECONDS["lora"][1], None)  # fails: it has ended, its seconds do not count
    # fft: 5 of 30 s. lora: 6 of 100 s.
    assert progress.end(capsys) == f"{alone}12 min (seconds per trial measured)"

    progress.take("fft", "report")
    progress.take("lora", "choose")
    monkeypatch.setattr("datetime.datetime", LateEvening)
    # The same 750 s by two workers, from two minutes before midnight.
    assert progress.end(capsys) == (
        "end: about 2026-01-03 00:04, in 6 min 15 s with 2 workers (seconds per trial measured)"
    )
