"""A run ends well where nobody can read of it: closed terminals, full disks, closed streams."""

import os
import sys
import threading

import pytest
from rich.console import Console

from molf.cli import main
from molf.job.progress import Reporter, TerminalReporter


def mend(file):
    """Lead a file to nowhere: to close it is to flush it once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


@pytest.fixture
def full():
    with open("/dev/full", "w", buffering=1) as file:
        yield file
        mend(file)


@pytest.fixture
def stepping(monkeypatch):
    """Have something done before each step of the optimizer."""
    from molf.core.optimizer import MoLFAdamW

    def do(act):
        step = MoLFAdamW.step

        def acting(self, closure=None):
            act()
            return step(self, closure)

        monkeypatch.setattr(MoLFAdamW, "step", acting)

    return do


def is_complete(path):
    return (path / "eval.json").is_file() and (path / "model").is_dir()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk(options, tmp_path, monkeypatch, capsys, full, stepping, stream):
    import logging
    import warnings

    def talk():  # as libraries do
        print("to standard output", flush=True)  # noqa: T201
        warnings.warn(f"a warning {os.urandom(4).hex()}", stacklevel=1)
        logging.getLogger("transformers").warning("a log entry")

    stepping(talk)
    path = tmp_path / "run"
    monkeypatch.setattr(sys, stream, full)
    assert main([*options, "--output_dir", str(path)]) == 0
    captured = capsys.readouterr()
    assert is_complete(path)
    if stream == "stdout":
        assert f"The run in {path} is complete, but standard output cannot be" in captured.err
        assert "No space left on device" in captured.err
    else:
        assert "failed; progress was not shown from then on" in captured.out
        assert f"run      {path}" in captured.out


def test_both_streams_on_a_full_disk(options, tmp_path, monkeypatch, full):
    path = tmp_path / "run"
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", full)
    assert main([*options, "--output_dir", str(path)]) == 0
    assert is_complete(path)


def test_a_terminal_that_is_closed(options, tmp_path, monkeypatch, stepping):
    """Bars move in a thread; a closed terminal gives EIO to whoever writes."""
    master, slave = os.openpty()
    reader = os.fdopen(master, "rb", buffering=0)
    shown = []
    terminal = os.fdopen(slave, "w", buffering=1)

    def close():
        if not reader.closed:
            terminal.write("still there\n")
            shown.append(os.read(master, 100_000))
            reader.close()
        with pytest.raises(OSError, match="Input/output"):
            terminal.write("x\n")

    stepping(close)
    path = tmp_path / "run"
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    hooks = []
    monkeypatch.setattr(threading, "excepthook", hooks.append)
    assert main([*options, "--output_dir", str(path)]) == 0
    assert is_complete(path)
    assert b"Evaluating the base model" in shown[0]
    assert not hooks
    mend(terminal)
    terminal.close()


def test_closed_streams(options, tmp_path, monkeypatch):
    path = tmp_path / "run"
    for name in ("stdout", "stderr"):
        with open(os.devnull, "w") as closed:
            monkeypatch.setattr(sys, name, closed)
    assert main([*options, "--output_dir", str(path)]) == 0
    assert is_complete(path)


@pytest.mark.parametrize("kind", [Reporter, TerminalReporter])
def test_a_reporter_of_ones_own(kind, full):
    reporter = kind(Console(file=full, force_terminal=kind is TerminalReporter))
    reporter.say("one")
    with reporter.evaluating("Evaluating") as show:
        show("generation", 1, 2)
    with reporter.training(2) as show:
        show(2, {"loss": 1.0, "tokens_per_second": 1.0})


def test_an_evaluation_that_cannot_be_printed(tmp_path, monkeypatch, capsys, full):
    texts = tmp_path / "texts.jsonl"
    monkeypatch.setattr(sys, "stdout", full)
    arguments = ["eval", "--task", "demo-sql", "--predictions", str(texts)]
    texts.write_text("".join(f'{{"index": {i}, "prediction": "x"}}\n' for i in range(168)))
    code = main([*arguments, "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 0, error
    assert "is complete, but standard output cannot be written: No space left" in error
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "execution_accuracy" in error
    assert "molf: error: standard output cannot be written: No space left on device." in error
