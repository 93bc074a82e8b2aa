"""Studies in files, and workers as processes whose trials take a moment and train nothing.

As a program: `python study_helpers.py STUDY.yaml LOG SECONDS` works on a study like `molf study
work`, and appends a line to LOG at the start and at the end of each trial.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import yaml

from molf.cli.study_options import open_study
from molf.study.outcome import Results, TrialResult, outcome_of, result_file, write_result
from molf.study.place import write_record
from molf.study.worker import Worker

FFT = {"name": "fft", "method": "fft", "rates": {"learning_rate": [1e-4, 1e-3, 1e-2]}}
LORA = {"name": "lora", "method": "lora", "rates": {"lora_learning_rate": [1e-3, 3e-3, 1e-2]}}
MOLF = {
    "name": "molf",
    "method": "molf",
    "rates": {"learning_rate": [1e-4, 1e-3, 1e-2], "lora_lr_ratio": [3]},
}


def content(folder, **changes):
    """The content of a study file with one cell and two methods."""
    return {
        "study": "tried",
        "output_dir": str(Path(folder) / "out"),
        "cells": [{"name": "facts", "task": "demo-fact", "metric": "es"}],
        "methods": [FFT, LORA],
        **changes,
    }


def write_study(folder, **changes):
    path = Path(folder) / "study.yaml"
    path.write_text(yaml.safe_dump(content(folder, **changes), sort_keys=False))
    return path


def study_of(folder, **changes):
    return open_study(write_study(folder, **changes))


def result_of(planned, point, value, **row):
    """A finished trial with this value of the cell's metric."""
    columns = {
        "cell": planned.cell.name,
        "method": planned.method.name,
        "phase": planned.phase,
        "point": planned.index,
        "seed": planned.seed,
        **point,
        f"after/{planned.cell.metric}": value,
        "seconds": 1.0,
        **row,
    }
    return TrialResult(planned.key, columns, {}, planned.settings_key(point))


class Pretended:
    """Runs trials that train nothing: their value is highest at the middle rate.

    Attributes:
        ran: The label of each trial that ran.
    """

    def __init__(self, study, seconds=0.0, log=None, fails=(), full_share=None):
        self.study, self.seconds, self.log, self.fails = study, seconds, log, fails
        self.full_share = full_share
        self.results = Results(study)
        self.ran = []

    def __call__(self, planned, point, trial=None):
        place = (planned.cell.name, planned.method.name, planned.label(point))
        file = result_file(self.study, *place)
        found = self.results.refresh().of(planned, point)
        if found is not None:
            write_result(file, found)
            return replace(outcome_of(found, planned.cell.metric), is_reused=True)
        label = "/".join(place)
        self._note("start", label)
        self.ran.append(label)
        time.sleep(self.seconds)
        result = result_of(planned, point, self.value(planned, point, label))
        if self.full_share is not None:
            result.row["won/full"] = self.full_share
        write_result(file, result)
        self._note("end", label)
        return outcome_of(result, planned.cell.metric)

    def value(self, planned, point, label):
        if any(part in label for part in self.fails):
            return None
        return 1.0 - abs(planned.index - 1) / 4

    def _note(self, event, label):
        if self.log is not None:
            line = f"{event} {os.getpid()} {label}\n".encode()
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(file, line)
            os.close(file)


def work(study, make, runner, **options):
    """Work on a study in this process; return what the worker did and the lines it printed."""
    write_record(study)
    lines = []
    return Worker(study, make, runner, lines.append, **options).work(), lines


def start_worker(path, log, seconds):
    return subprocess.Popen([sys.executable, __file__, str(path), str(log), str(seconds)])


if __name__ == "__main__":
    opened, maker = open_study(Path(sys.argv[1]))
    work(opened, maker, Pretended(opened, float(sys.argv[3]), sys.argv[2]))
