"""--max_time ends a training with a complete model, and --lr_scheduler_type has every schedule."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerControl

from core_helpers import assert_same_bits
from molf.cli import main
from molf.job.settings.declared_fields import scheduler_names
from molf.job.trainer import ending as module
from molf.job.trainer.callbacks import Clock
from molf.job.trainer.ending import Ending, TimeLimit

SHORT = ["--max_time", "0.000001"]


def steps_in(path):
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def recorded(path):
    return yaml.safe_load((path / "config.yaml").read_text())["run"]["training"]


@pytest.fixture(scope="module")
def whole(options, workplace):
    """A run of three steps, with the model at each step."""
    path = workplace / "without a limit"
    assert main([*options, "--save_steps", "1", "--output_dir", str(path)]) == 0
    return path


def weights(path):
    return load_file(path / "model.safetensors")


def test_training_ends_with_a_complete_model(options, whole, tmp_path, capsys):
    """The one step is that of the longer training: the schedule has not changed."""
    path = tmp_path / "run"
    assert main([*options, *SHORT, "--output_dir", str(path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "Training ended after step 1 of 3: max_time of 1e-06 s is over." in lines
    assert steps_in(path) == [1]
    assert (path / "eval.json").is_file()
    found = recorded(path)
    assert (found["steps"], found["planned_steps"], found["ended_by"]) == (1, 3, "max_time")
    assert "ended_by" not in recorded(whole)
    assert_same_bits(weights(path / "model"), weights(whole / "checkpoints" / "checkpoint-1"))


def test_resumed_run_has_ended_or_continues_with_a_later_limit(
    options, whole, tmp_path, monkeypatch, capsys
):
    from molf.job import trained_model

    def fail(*given, **named):
        raise RuntimeError("a fault")

    paths = [tmp_path / "the same", tmp_path / "later"]
    for path, further, steps in zip(paths, ([], ["--max_time", "2h"]), (1, 3), strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(trained_model, "save_model", fail)
            assert main([*options, *SHORT, "--output_dir", str(path)]) == 1
        assert main(["train", "--output_dir", str(path), "--resume", *further]) == 0
        assert f"Resuming {path} from checkpoint-1." in capsys.readouterr().err
        assert steps_in(path) == list(range(1, steps + 1))
        assert recorded(path)["steps"] == steps
    assert_same_bits(weights(paths[1] / "model"), weights(whole / "model"))
    assert "ended_by" not in recorded(paths[1])


def over(clock, seconds, ranks=None, monkeypatch=None):
    found, control = Ending(), TrainerControl()
    if ranks is not None:
        monkeypatch.setattr(module, "ranks", lambda: ranks)
    state = SimpleNamespace(global_step=1, max_steps=9)
    TimeLimit(seconds, clock, found).on_step_end(None, state, control)
    assert control.should_training_stop == bool(found.option) == found.is_at(state)
    return bool(found.option)


def test_time_is_counted_over_the_parts():
    clock = Clock(0.0)
    assert not over(clock, 3600)
    assert not over(clock, None)
    clock.load_state_dict({"seconds": 3600.0, "preparation": 0.0})
    assert over(clock, 3600)


@pytest.mark.parametrize("decision", [0, 1])
def test_one_process_decides_for_all(decision, monkeypatch):
    """The clock of this process is over in one case, that of rank 0 in the other."""
    asked = []

    def largest(numbers):
        asked.append(numbers)
        return [decision]

    ranks = SimpleNamespace(is_main=False, largest=largest)
    clock = Clock(0.0)
    clock.load_state_dict({"seconds": 0.0 if decision else 9000.0, "preparation": 0.0})
    assert over(clock, 3600, ranks, monkeypatch) == bool(decision)
    assert asked == [[0]]


def test_every_schedule_of_transformers_has_its_name():
    from transformers.trainer_utils import SchedulerType

    assert scheduler_names() == tuple(one.value for one in SchedulerType)


def test_another_schedule_with_its_options(options, tmp_path):
    path = tmp_path / "run"
    further = ["--lr_scheduler_type", "warmup_stable_decay", "--warmup_ratio", "0"]
    further += ["--training_args.lr_scheduler_kwargs", '{"num_decay_steps": 2}']
    assert main([*options, *further, "--output_dir", str(path)]) == 0
    rates = [json.loads(x)["learning_rate"] for x in (path / "metrics.jsonl").open()]
    assert rates[0] == pytest.approx(1e-2)
    assert rates[-1] < rates[0]
    assert torch.isfinite(torch.tensor(rates)).all()
