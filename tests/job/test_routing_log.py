"""The routing log: parts of whole steps, at full precision, written as training goes."""

import math

import pyarrow.parquet as pq
import pytest

from molf.core.step.decision import Decision
from molf.errors import InputError
from molf.job.record import routing_log
from molf.job.record.routing_log import RoutingWriter, iter_steps, read_routing, routing_parts
from molf.job.record.wins import Wins


def decisions(step):
    """Two layers; scores that need every digit of a float64."""
    scores = {"full": math.pi * 1e-7 / (step + 1), "lora0_r4": math.e * 1e-9}
    return {"b.q_proj": Decision(("full",), scores), "a.k_proj": Decision(("lora0_r4",), scores)}


def test_rows_in_the_optimizers_order(tmp_path):
    with RoutingWriter(tmp_path / "routing") as writer:
        writer.add(0, decisions(0))
    rows = read_routing(tmp_path).to_pylist()
    assert [(row["layer"], row["expert"]) for row in rows] == [
        ("b.q_proj", "full"),
        ("b.q_proj", "lora0_r4"),
        ("a.k_proj", "full"),
        ("a.k_proj", "lora0_r4"),
    ]
    assert [row["winner"] for row in rows] == [True, False, False, True]
    assert rows[0]["score"] == math.pi * 1e-7


def test_parts_hold_whole_steps(tmp_path):
    with RoutingWriter(tmp_path / "routing", rows_per_part=6) as writer:
        for step in range(5):
            writer.add(step, decisions(step))
    parts = routing_parts(tmp_path)
    assert [pq.read_table(part)["step"].unique().to_pylist() for part in parts] == [
        [0, 1],
        [2, 3],
        [4],
    ]
    steps = list(iter_steps(tmp_path))
    assert [step["step"] for step in steps] == [0, 1, 2, 3, 4]
    assert steps[3]["selections"]["a.k_proj"] == {
        "winners": ["lora0_r4"],
        "scores": decisions(3)["a.k_proj"].scores,
    }


def test_part_is_due_after_a_while(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(routing_log.time, "monotonic", lambda: now)
    with RoutingWriter(tmp_path / "routing", seconds_per_part=60) as writer:
        writer.add(0, decisions(0))
        assert not (tmp_path / "routing").exists()
        now = 61.0
        writer.add(1, decisions(1))
        assert len(routing_parts(tmp_path)) == 1


def test_failing_training_keeps_its_log(tmp_path):
    def train():
        with RoutingWriter(tmp_path / "routing") as writer:
            writer.add(0, decisions(0))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train()
    assert len(list(iter_steps(tmp_path))) == 1


def test_nothing_routed_nothing_written(tmp_path):
    with RoutingWriter(tmp_path / "routing"):
        pass
    assert not (tmp_path / "routing").exists()
    with pytest.raises(InputError, match="not a run"):
        routing_parts(tmp_path)


def test_wins():
    wins = Wins(["full", "lora0_r4", "lora1_r8"])
    assert wins.take_recent() == {}
    wins.add(decisions(0), 1)
    assert wins.take_recent() == {"full": 0.5, "lora0_r4": 0.5, "lora1_r8": 0.0}
    wins.add({"a": Decision(("full",), {"full": 2.0, "lora0_r4": 1.0})}, 2)
    assert wins.take_recent()["full"] == 1.0
    assert wins.shares() == pytest.approx({"full": 2 / 3, "lora0_r4": 1 / 3, "lora1_r8": 0.0})


def test_a_tie_at_rate_zero_is_no_win():
    wins = Wins(["full", "lora0_r4"])
    wins.add({"a": Decision(("full",), {"full": 0.0, "lora0_r4": 0.0})}, 1)
    assert wins.shares() == {}
    wins.add({"a": Decision(("lora0_r4",), {"full": 1.0, "lora0_r4": 2.0})}, 2)
    assert wins.shares() == {"full": 0.0, "lora0_r4": 1.0}
