"""Shares, margins and the picture of the routing in trackers; memory in the log."""

import json
import math
from types import SimpleNamespace

import pytest

from checkpoints import write_checkpoint, write_facts
from molf.cli import main
from molf.colors import COLORS
from molf.core.step.decision import Decision
from molf.job.record.wins import Wins
from molf.job.trainer.routing_image import routing_image
from molf.job.trainer.trackers import KINDS
from molf.job.trainer.tracking import TAG, Tracking, TrackingCallback, tracking_of
from molf.measure import Evaluation, Metric
from run_files import LAYERS, write_run

FULL, LORA = (tuple(bytes.fromhex(color[1:])) for color in COLORS[:2])


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_picture_has_a_cell_per_layer_and_step(run):
    pixels, experts = routing_image(run)
    assert experts == ["full", "lora0_r4"]
    tall, wide = 400 // len(LAYERS), 400 // 60
    assert pixels.shape == (tall * len(LAYERS), wide * 60, 3)
    cells = pixels[::tall, ::wide]
    assert (cells[:, 0] == (0xEB, 0xED, 0xF0)).all()  # step 1 is at rate 0
    assert (cells[1, 1:] == FULL).all()  # k_proj
    assert (cells[0, 1:] == LORA).all()
    assert (cells[-1, 10:20] == LORA).all()  # the layer that flips
    assert (cells[-1, 20:30] == FULL).all()


def test_margin_is_that_of_full_over_the_best_lora():
    wins = Wins(["full", "lora0_r4", "lora1_r8"])
    wins.add({"a": Decision(("full",), {"full": 3.0, "lora0_r4": 0.5, "lora1_r8": 1.0})}, 1)
    wins.add({"a": Decision(("full",), {"full": 0.0, "lora0_r4": 0.0, "lora1_r8": 0.0})}, 2)
    wins.add({"a": Decision(("lora0_r4",), {"full": 1.0, "lora0_r4": 1.0})}, 3)
    stored = wins.state_dict()
    assert wins.take_margin() == pytest.approx((0.5 + 0) / 2)
    assert wins.take_margin() is None
    wins.load_state_dict(stored)
    assert wins.take_margin() == pytest.approx(0.25)
    wins.load_state_dict({name: value for name, value in stored.items() if name != "margins"})
    assert wins.take_margin() is None
    efficient = Wins(["lora0_r4", "lora1_r8"])
    efficient.add({"a": Decision(("lora0_r4",), {"lora0_r4": 2.0, "lora1_r8": 1.0})}, 1)
    assert efficient.take_margin() is None


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self):
        self.images, self.metrics, self.options, self.closed = [], [], [], []

    def open(self, stored):
        return stored or "new"

    def add_options(self, options):
        self.options.append(options)

    def add_metrics(self, metrics, step):
        self.metrics.append((metrics, step))

    def add_image(self, name, pixels, caption, step):
        self.images.append((name, pixels, caption, step))

    def close(self, *, failed):
        self.closed.append(failed)


class Writer:
    def __init__(self, run):
        self.directory = run / "routing"

    def flush(self):
        """All decisions are written."""


def send(run, step, *trackers):
    from transformers import TrainerControl, TrainerState

    state = TrainerState(global_step=step, max_steps=60, is_world_process_zero=True)
    tracking = Tracking({f"tracker {i}": one for i, one in enumerate(trackers)})
    callback = TrackingCallback(tracking, {}, None, Writer(run))
    callback.on_step_end(None, state, TrainerControl())


def test_trackers_get_the_picture_after_the_last_step(run):
    one, other = Kept(), Kept()
    send(run, 59, one, other)
    assert one.images == other.images == []
    send(run, 60, one, other)
    ((name, pixels, caption, step),) = one.images
    assert (name, step) == (TAG, 60)
    assert (pixels == routing_image(run)[0]).all()
    assert caption == "layers x steps; full, lora0_r4 in the order of the colours"
    assert len(other.images) == 1


def test_failing_tracker_is_a_warning(run):
    failing, other = Kept(), Kept()
    failing.add_image = lambda *_, **__: 1 / 0
    with pytest.warns(UserWarning, match="was not sent to tracker 0: division by zero"):
        send(run, 60, failing, other)
    assert len(other.images) == 1


def test_metrics_arrive_with_the_ends_of_their_intervals():
    one = Kept()
    metrics = {"es": Metric(0.5, 0.25, 0.75, 12), "s": Metric(0.5, math.nan, math.nan, 3)}
    Tracking({"kept": one}).add_evaluation("after", Evaluation(metrics, [], {}), 7)
    sent = {"es": 0.5, "es_low": 0.25, "es_high": 0.75, "es_count": 12.0, "s": 0.5, "s_count": 3.0}
    assert one.metrics == [({f"after/{name}": value for name, value in sent.items()}, 7)]


def test_options_arrive_without_secrets():
    one = Kept()
    Tracking({"kept": one}).add_options({"data": "https://host/a?token=5ecret", "seed": 1})
    assert one.options == [{"data": "https://host/a", "seed": 1}]


def test_trackers_are_closed_also_after_an_error(tmp_path, monkeypatch):
    one = Kept()
    monkeypatch.setitem(KINDS, "wandb", lambda arguments, folder: one)
    arguments = SimpleNamespace(report_to=["wandb", "comet_ml"])
    with tracking_of(arguments, tmp_path, is_main=True) as tracking:
        assert tracking.open({}) == {"wandb": "new"}
        assert tracking.open({"wandb": "old", "mlflow": "x"}) == {"wandb": "old"}
    with pytest.raises(KeyError), tracking_of(arguments, tmp_path, is_main=True):
        raise KeyError
    with tracking_of(arguments, tmp_path, is_main=False) as tracking:
        assert tracking.open({}) == {}
    assert one.closed == [False, True]


def test_a_tracker_that_cannot_be_opened_ends_the_run(run_command, monkeypatch, capsys):
    one = Kept()
    one.open = lambda stored: 1 / 0
    monkeypatch.setitem(KINDS, "tensorboard", lambda arguments, folder: one)
    path, arguments = run_command
    assert main(arguments) == 2
    assert "report_to=tensorboard: division by zero" in capsys.readouterr().err
    assert not path.exists()
    assert one.closed == [True]


@pytest.fixture
def run_command(tmp_path):
    """A training with TensorBoard, and its directory."""
    return tmp_path / "run", [
        *("train", "--task", "fact", "--model", str(write_checkpoint(tmp_path / "base"))),
        *("--data", str(write_facts(tmp_path / "facts.jsonl")), "--ranks", "4", "--max_steps", "4"),
        *("--logging_steps", "2", "--report_to", "tensorboard", "--no-report", "--no-spectra"),
        *("--output_dir", str(tmp_path / "run")),
    ]


def test_training_with_tensorboard(tmp_path, run_command):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, arguments = run_command
    assert main(arguments) == 0
    folder = tmp_path / "run" / "checkpoints" / "runs"
    assert {path.parent for path in (tmp_path / "run").rglob("events.out.*")} == {folder}
    events = accumulator.EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    assert tags["images"] == [TAG]
    (image,) = events.Images(TAG)
    pixels, _ = routing_image(tmp_path / "run")
    assert (image.step, image.height, image.width) == (4, *pixels.shape[:2])
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    for when, step in (("before", 0), ("after", 4)):
        for name, metric in found[when].items():
            (sent,) = events.Scalars(f"{when}/{name}")
            assert (sent.step, sent.value) == (step, pytest.approx(metric["value"], abs=1e-6))
    (options,) = events.Tensors("molf/options/text_summary")
    assert b"| method | molf |" in options.tensor_proto.string_val[0]
    for name in ("won/full", "won/lora0_r4", "score_margin", "peak_memory_bytes", "memory_bytes"):
        sent = {one.step: one.value for one in events.Scalars(f"train/{name}")}
        logged = {line["step"]: line[name] for line in lines if name in line}
        assert sent == pytest.approx(logged, rel=1e-6)
        assert set(sent) >= {2, 4}
    assert -1 <= lines[-1]["score_margin"] <= 1
    assert all(0 < line["memory_bytes"] <= line["peak_memory_bytes"] for line in lines)
