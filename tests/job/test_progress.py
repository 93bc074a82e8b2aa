"""Progress on a terminal and in a log."""

import io
import re
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from molf.job.overview import _steps
from molf.job.progress import Reporter, TerminalReporter

LOGS = {"loss": 1.25, "tokens_per_second": 1234.5, "won/full": 0.25, "won/lora0_r4": 0.75}


@pytest.fixture
def output():
    return io.StringIO()


def test_a_log_gets_a_handful_of_lines(output):
    reporter = Reporter(Console(file=output))
    with reporter.training(200) as show:
        for step in range(1, 201):
            show(step, None)
            if step % 2 == 0 or step == 1:
                show(step, LOGS)
    lines = output.getvalue().splitlines()
    assert 8 <= len(lines) <= 13
    assert lines[0] == "Training: 200 steps"
    assert lines[-1] == "  step 200/200  loss 1.250  1,234 tokens/s  won: full 25% lora0_r4 75%"


def test_a_log_shows_the_time_left(output, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("molf.job.progress.time.monotonic", lambda: now[0])
    reporter = Reporter(Console(file=output))
    with reporter.training(8000) as show:
        for step in (3000, 4000, 8000):  # a resumed training: 1,000 steps take an hour
            show(step, LOGS)
            now[0] += 3600
    lines = output.getvalue().splitlines()
    assert "left" not in lines[1]
    assert lines[2].endswith("lora0_r4 75%  4 h 0 min left")
    assert "left" not in lines[3]


@pytest.mark.parametrize("width", [80, 50])
def test_a_narrow_terminal_cuts_the_shares_alone(output, width):
    console = Console(file=output, force_terminal=True, width=width, legacy_windows=False)
    with TerminalReporter(console).training(20_000) as show:
        show(10_000, LOGS)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    line = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("10000/20000")][-1]
    assert re.match(r"10000/20000 ━\S+ (--:--|\d+:\d\d) Training loss 1", line), line
    assert len(line) <= width
    assert line.rstrip().endswith("…")


def test_a_log_gets_a_line_per_evaluation(output):
    reporter = Reporter(Console(file=output))
    with reporter.evaluating("Evaluating the base model") as show:
        show("generation", 1, 2)
    assert output.getvalue() == "Evaluating the base model\n"


def test_a_terminal_shows_where_it_is(output):
    console = Console(file=output, force_terminal=True, width=140)
    reporter = TerminalReporter(console)
    with reporter.evaluating("Evaluating") as show:
        show("generation", 16, 64)
    with reporter.training(20) as show:
        show(1, None)
        show(20, LOGS)
    text = output.getvalue()
    assert "Evaluating: generation" in text
    assert "16/64" in text
    assert "20/20" in text
    assert "lora0_r4 75%" in text


def test_a_log_has_a_line_about_imports_that_take_long():
    class Said(io.StringIO):
        event = threading.Event()

        def flush(self):
            if self.getvalue():
                self.event.set()

    output = Said()
    with Reporter(Console(file=output)).working("Loading torch", after=0.0):
        assert output.event.wait(60)
    assert output.getvalue() == "Loading torch\n"


def test_a_log_shows_the_state_of_long_work(output, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("molf.job.progress.time.monotonic", lambda: now[0])
    with Reporter(Console(file=output)).working("Tokenizing") as show:
        for done in range(0, 50, 5):
            show(f"{done} of 50 tokenized")
            now[0] += 3
    assert output.getvalue().splitlines() == ["  20 of 50 tokenized", "  40 of 50 tokenized"]
    console = Console(file=output, force_terminal=True, width=80, legacy_windows=False)
    with TerminalReporter(console).working("Tokenizing") as show:
        show("20 of 50 tokenized")


@pytest.mark.parametrize(
    ("rows", "steps", "processes", "drop_last", "shown"),
    [
        # 7 batches of 8 are 2 steps of at most 4.
        (54, 4, 1, False, "4 of 32 examples (8 x 4), 2 epochs"),
        (54, 4, 1, True, "4 of 32 examples (8 x 4), 2 epochs"),
        (22, 3, 1, False, "3 of 32 examples (8 x 4), 3 epochs"),
        (54, 3, 2, False, "3 of 64 examples (8 x 4 x 2 processes), 3 epochs"),
        (64_000, 1_000, 1, False, "1,000 of 32 examples (8 x 4), 0.5 epochs"),
        (54, 3_000, 1, False, "3,000 of 32 examples (8 x 4), 1,500 epochs"),
    ],
)
def test_epochs_are_those_of_the_trainer(rows, steps, processes, drop_last, shown):
    opening = SimpleNamespace(
        settings=SimpleNamespace(
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            max_time=None,
            padding_free=False,
            train_sampling_strategy="random",
        ),
        data=SimpleNamespace(steps=steps, rows=rows, packed=None),
        arguments=SimpleNamespace(dataloader_drop_last=drop_last),
    )
    assert _steps(opening, processes) == shown
