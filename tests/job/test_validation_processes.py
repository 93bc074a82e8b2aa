"""Evaluations, the best step and a limit of time with several processes."""

from __future__ import annotations

import json
import math

import pytest
import yaml

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
            *("--learning_rate", "1e-2", "--logging_steps", "1", "--max_steps", "4"),
            *("--lr_scheduler_type", "constant"),
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


def test_two_processes_evaluate_as_one(launch, command, folder, one):
    path = folder / "two"
    given = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    first, _ = launch.to_the_end(command(path, *given, "--eval_steps", "1", "--keep_best"))
    rows = [
        [json.loads(x) for x in (run / "metrics.jsonl").open() if "eval_loss" in x]
        for run in (one, path)
    ]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    for mine, other in zip(*rows, strict=True):
        assert mine["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-4)
        assert math.isfinite(mine["eval_loss"])
    assert recorded(path)["validation"]["saved_step"] == recorded(one)["validation"]["saved_step"]
    assert "validation" in first.errors
    assert (path / "examples.jsonl").read_bytes() == (one / "examples.jsonl").read_bytes()


def test_all_processes_end_after_the_same_step(launch, command, folder):
    path = folder / "short"
    given = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    first, other = launch.to_the_end(command(path, *given, "--max_time", "0.000001"))
    assert "Training ended after step 1 of 4: max_time of 1e-06 s is over." in first.errors
    assert other.errors == ""
    assert recorded(path)["steps"] == 1
