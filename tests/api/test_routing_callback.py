"""`molf.RoutingCallback` in the Trainer of transformers: the log of a run, resumed and refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import molf
from checkpoints import make_model
from molf.errors import InputError
from molf.job.record.routing_log import iter_steps, read_routing

STEPS = 4


def trainer_in(folder, *callbacks, routes=True):
    rows = [{"input_ids": [n, n + 1, n + 2], "labels": [n, n + 1, n + 2]} for n in range(2, 18)]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        warmup_steps=0,
        save_strategy="steps",
        save_steps=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    config = molf.MoLFConfig(ranks=(2,))
    factory = molf.trainer_optimizer(config, lr=1e-2) if routes else None
    return Trainer(
        make_model("qwen2"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=factory,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a training, its callback, and the decisions of each step."""
    folder = tmp_path_factory.mktemp("finished")
    decisions = []

    class Kept(molf.RoutingCallback):
        def on_optimizer_step(self, *given, optimizer=None, **named):
            super().on_optimizer_step(*given, optimizer=optimizer, **named)
            decisions.append(dict(optimizer.optimizer.routing))

    callback = Kept(folder)
    trainer_in(folder, callback).train()
    return folder, callback, decisions


def test_log_has_the_decisions_of_each_step(finished):
    folder, callback, decisions = finished
    logged = list(iter_steps(folder))
    assert [one["step"] for one in logged] == list(range(STEPS))
    for one, routing in zip(logged, decisions, strict=True):
        assert list(one["selections"]) == list(routing)
        for layer, decision in routing.items():
            found = one["selections"][layer]
            assert found == {"winners": list(decision.winners), "scores": dict(decision.scores)}
    winners = [name for routing in decisions for one in routing.values() for name in one.winners]
    assert callback.shares == {
        name: winners.count(name) / len(winners) for name in ("full", "lora0_r2")
    }


def test_resumed_training_continues_the_log(finished, tmp_path, monkeypatch):
    """It fails in its fourth step, with the third in the log, and is resumed from the second."""
    step, calls = Trainer.training_step, []

    def failing(self, *given, **named):
        calls.append(self)
        if len(calls) == STEPS:
            callback.on_save(None, None, None)
            raise RuntimeError("a fault")
        return step(self, *given, **named)

    callback = molf.RoutingCallback(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", failing)
        with pytest.raises(RuntimeError, match="a fault"):
            trainer_in(tmp_path, callback).train()
    assert read_routing(tmp_path)["step"].unique().to_pylist() == [0, 1, 2]
    again = trainer_in(tmp_path, molf.RoutingCallback(tmp_path))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert read_routing(tmp_path).equals(read_routing(finished[0]))


def test_log_of_another_training_is_not_continued(finished):
    folder, _, _ = finished
    before = read_routing(folder)
    with pytest.raises(InputError, match="the routing log of another training"):
        trainer_in(folder, molf.RoutingCallback(folder)).train()
    assert read_routing(folder).equals(before)


def test_optimizer_that_does_not_route_is_refused(tmp_path):
    with pytest.raises(InputError, match="AdamW, which does not route"):
        trainer_in(tmp_path, molf.RoutingCallback(tmp_path), routes=False).train()


def test_step_that_a_gradient_scaler_skips_is_not_logged(tmp_path):
    """The optimizer has the decisions of the step before, which it took."""
    callback = molf.RoutingCallback(tmp_path)
    decision = molf.Decision(winners=("full",), scores={"full": 1.0, "lora0_r2": 0.5})
    for step, was_skipped in enumerate([False, True, False]):
        state = SimpleNamespace(is_world_process_zero=True, global_step=step)
        optimizer = SimpleNamespace(routing={"layer": decision})
        wrapped = SimpleNamespace(optimizer=optimizer, step_was_skipped=was_skipped)
        callback.on_optimizer_step(None, state, None, optimizer=wrapped)
    callback.on_train_end(None, state, None)
    assert [one["step"] for one in iter_steps(tmp_path)] == [0, 2]


def test_other_processes_write_nothing(tmp_path):
    callback = molf.RoutingCallback(tmp_path / "run")
    state = SimpleNamespace(is_world_process_zero=False, global_step=0)
    decision = molf.Decision(winners=("full",), scores={"full": 1.0, "lora0_r2": 0.5})
    optimizer = SimpleNamespace(routing={"layer": decision})
    callback.on_train_begin(None, state, None)
    callback.on_optimizer_step(None, state, None, optimizer=optimizer)
    callback.on_train_end(None, state, None)
    assert not (tmp_path / "run").exists()


def test_parts_are_cut_at_a_step(tmp_path):
    """Whole parts stay as they are, one is shortened, later ones are deleted."""
    from molf.job.record.routing_log import RoutingWriter

    decision = molf.Decision(winners=("full",), scores={"full": 1.0, "lora0_r2": 0.5})
    writer = RoutingWriter(tmp_path / "routing", shapes={"layer": (2, 3)})
    for step in range(6):
        writer.add(step, {"layer": decision})
        if step % 2:
            writer.flush()
    first = tmp_path / "routing" / "part-00000.parquet"
    before = first.stat().st_mtime_ns
    again = RoutingWriter(tmp_path / "routing", shapes={"layer": (2, 3)})
    again.cut(3)
    assert first.stat().st_mtime_ns == before
    assert read_routing(tmp_path)["step"].unique().to_pylist() == [0, 1, 2]
    again.add(3, {"layer": decision})
    again.flush()
    names = sorted(path.name for path in (tmp_path / "routing").iterdir())
    assert names == [f"part-0000{number}.parquet" for number in range(3)]
    assert read_routing(tmp_path)["step"].unique().to_pylist() == [0, 1, 2, 3]
