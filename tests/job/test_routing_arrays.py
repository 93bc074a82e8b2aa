"""The routing log as arrays: the same counts as decision by decision; damaged parts."""

import random

import pytest

from molf.core.assignment.history import LayerHistory
from molf.core.step.decision import Decision
from molf.errors import InputError
from molf.job.record.routing_arrays import margins, read_arrays, read_evidence
from molf.job.record.routing_log import RoutingWriter, iter_steps, routing_parts, routing_shapes


def write_log(run, experts, winners_per_step, *, steps=40, rows_per_part=50, shapes=None):
    """A log with steps at rate 0, ties, and a layer that is missing in some steps."""
    generator = random.Random(7)
    run.mkdir(exist_ok=True)
    with RoutingWriter(run / "routing", rows_per_part=rows_per_part, shapes=shapes) as writer:
        for step in range(steps):
            routing = {}
            for layer in ("b.q_proj", "a.k_proj", "c.late"):
                if layer == "c.late" and step % 7 in (0, 3):
                    continue
                scores = {name: generator.choice([0.5, 1.0, 2.0, -1.0]) for name in experts}
                if step in (0, 9):
                    scores = dict.fromkeys(experts, 0.0)
                won = sorted(generator.sample(range(len(experts)), winners_per_step))
                routing[layer] = Decision(tuple(experts[one] for one in won), scores)
            writer.add(step, routing)


@pytest.mark.parametrize(
    ("experts", "winners"),
    [
        (("full", "lora0_r4"), 1),
        (("full", "lora0_r4", "lora1_r8"), 2),
        (("lora0_r4", "lora1_r8"), 1),
        (("full",), 1),
    ],
)
def test_counts_are_those_of_single_decisions(tmp_path, experts, winners):
    write_log(tmp_path, experts, winners)
    histories = {}
    for step in iter_steps(tmp_path):
        for layer, one in step["selections"].items():
            history = histories.setdefault(layer, LayerHistory(one["scores"]))
            history.add(step["step"] + 1, one["winners"], one["scores"])
    assert len(routing_parts(tmp_path)) > 2
    assert read_evidence(tmp_path) == {name: one.evidence() for name, one in histories.items()}
    assert [*read_evidence(tmp_path)] == ["b.q_proj", "a.k_proj", "c.late"]


def test_arrays_hold_every_score(tmp_path):
    write_log(tmp_path, ("full", "lora0_r4"), 1, steps=3)
    arrays = read_arrays(tmp_path)
    assert (arrays.last_step, arrays.experts) == (3, ["full", "lora0_r4"])
    (part,) = arrays
    assert part.steps.tolist() == [1, 2, 3]
    assert part.decided.tolist() == [[False] * 3, [True] * 3, [True] * 3]
    late = arrays.layers.index("c.late")
    for step, found in zip(iter_steps(tmp_path), part.scores, strict=True):
        for layer, one in step["selections"].items():
            assert found[arrays.layers.index(layer)].tolist() == [*one["scores"].values()]
    full, lora = part.scores[1, late]
    assert margins(part, arrays.experts)[1, late] == (full - lora) / (abs(full) + abs(lora))


def test_damaged_parts_are_an_error_or_left_out(tmp_path):
    write_log(tmp_path, ("full", "lora0_r4"), 1)
    whole, parts = read_arrays(tmp_path), routing_parts(tmp_path)
    parts[1].write_bytes(parts[1].read_bytes()[:-20])
    with pytest.raises(InputError, match=r"part-00001\.parquet is not a readable Parquet file"):
        read_arrays(tmp_path)
    left = read_arrays(tmp_path, skip_damaged=True)
    assert left.parts == (parts[0], *parts[2:])
    assert left.last_step == whole.last_step
    (line,) = left.damaged
    assert line.startswith(f"{parts[1]} is not a readable Parquet file")


def test_parts_hold_the_shapes(tmp_path):
    shapes = {"b.q_proj": (8, 4), "a.k_proj": (2, 4)}
    write_log(tmp_path / "with", ("full", "lora0_r4"), 1, shapes=shapes)
    write_log(tmp_path / "without", ("full", "lora0_r4"), 1)
    assert routing_shapes(routing_parts(tmp_path / "with")[-1]) == shapes
    assert routing_shapes(routing_parts(tmp_path / "without")[0]) == {}
    (tmp_path / "damaged").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="damaged is not a readable Parquet file"):
        routing_shapes(tmp_path / "damaged")
