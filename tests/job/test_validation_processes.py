"""Evaluations, the best step and a limit of time with several processes."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from launched import Launcher

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    write_checkpoint(folder / "base")
    (folder / "plain.txt").write_text("Anna walks to the river and sits down by the water. " * 10)
    lines = [{"prompt": f"{n} and {n} are", "completion": f" {2 * n}"} for n in range(30)]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def launch(folder):
    return Launcher(folder)


@pytest.fixture(scope="module")
def command(folder):
    def make(path, *further):
        return [
            *("train", "--task", "custom", "--model", str(folder / "base")),
            *("--data", str(folder / "records.jsonl"), "--ranks", "4", "--alpha", "4"),
            *("--forgetting_data", str(folder / "plain.txt"), "--max_eval_samples", "5"),
            *("--learning_rate", "2e-2", "--logging_steps", "1", "--max_steps", "6"),
            *("--lr_scheduler_type", "constant", "--warmup_ratio", "0"),
            *("--output_dir", str(path), *further),
        ]

    return make


def recorded(path):
    return yaml.safe_load((path / "config.yaml").read_text())["run"]["training"]


@pytest.fixture(scope="module")
def one(launch, command, folder):
    path = folder / "one"
    given = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    launch.to_the_end(command(path, *given, "--eval_steps", "1", "--keep_best"), 1)
    return path


def losses(path):
    rows = [json.loads(x) for x in (path / "metrics.jsonl").open() if "eval_loss" in x]
    return {row["step"]: row["eval_loss"] for row in rows}


@pytest.mark.parametrize("further", [[], ["--fsdp", "all"]], ids=["ddp", "fsdp"])
def test_two_processes_evaluate_as_one(launch, command, folder, one, further):
    """Also answers of different lengths, for which the processes take different passes."""
    path = folder / f"two {len(further)}"
    given = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", *further]
    first, _ = launch.to_the_end(command(path, *given, "--eval_steps", "1", "--keep_best"))
    assert [*losses(path)] == [1, 2, 3, 4, 5, 6]
    assert losses(path) == pytest.approx(losses(one), rel=1e-4)
    assert all(map(math.isfinite, losses(path).values()))
    assert recorded(path)["validation"]["saved_step"] == recorded(one)["validation"]["saved_step"]
    assert "validation" in first.errors
    assert (path / "examples.jsonl").read_bytes() == (one / "examples.jsonl").read_bytes()


def test_shards_stop_early_and_keep_the_best(launch, command, folder):
    """All processes end after the same step, and load their shards of an earlier one."""
    paths = [folder / "early one", folder / "early shards"]
    given = ["--method", "lora", "--lora_dropout", "0", "--lora_learning_rate", "1"]
    given += ["--eval_steps", "1", "--keep_best", "--early_stopping_patience", "1"]
    given += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps"]
    (alone,) = launch.to_the_end(command(paths[0], *given, "2"), 1)
    first, other = launch.to_the_end(command(paths[1], *given, "1", "--fsdp", "all"))
    # The step depends on the processor, because this rate makes large what rounding differs in.
    ended = re.search(r"Training ended after step (\d) of 6: 1 evaluations without", alone.errors)
    best = int(ended[1]) - 1
    assert ended[0] in first.errors
    assert f"The model is that of step {best}, with the lowest loss" in first.errors
    assert other.errors == ""
    found = [recorded(path)["validation"] for path in paths]
    assert found[0]["saved_step"] == found[1]["saved_step"] == best
    assert losses(paths[1]) == pytest.approx(losses(paths[0]), rel=1e-4)
    weights = [load_file(path / "adapter/adapter_model.safetensors") for path in paths]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], rtol=0, atol=1e-4), name


def test_all_processes_end_after_the_same_step(launch, command, folder):
    path = folder / "short"
    given = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    first, other = launch.to_the_end(command(path, *given, "--max_time", "0.000001"))
    assert "Training ended after step 1 of 6: max_time of 1e-06 s is over." in first.errors
    assert other.errors == ""
    assert recorded(path)["steps"] == 1
