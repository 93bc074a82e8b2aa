"""The same `molf train` in several processes (DDP): one result, one writer, resume."""

from __future__ import annotations

import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from checkpoints import write_checkpoint, write_facts
from launched import Launcher
from molf.checkpoint.store import complete_checkpoints
from molf.job.record.routing_log import read_routing
from resumed_runs import assert_same_runs, row_of

KILLED = -signal.SIGKILL
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, 12 requests to train it on, and a plain text."""
    folder = tmp_path_factory.mktemp("processes")
    write_checkpoint(folder / "base")
    write_facts(folder / "facts.jsonl")
    (folder / "plain.txt").write_text("Anna walks to the river and sits down by the water. " * 10)
    return folder


@pytest.fixture(scope="module")
def launch(folder):
    return Launcher(folder)


@pytest.fixture(scope="module")
def command(folder):
    """A training with steps of 10 examples: epochs of 2 steps, the second with 2 examples."""

    def make(path, size, passes, *further):
        return [
            *("train", "--task", "fact", "--model", str(folder / "base")),
            *("--data", str(folder / "facts.jsonl"), "--alpha", "4", "--ranks", "4"),
            *("--learning_rate", "1e-3", "--lora_learning_rate", "3e-3", "--logging_steps", "1"),
            *("--per_device_train_batch_size", str(size), "--max_steps", str(STEPS)),
            *("--gradient_accumulation_steps", str(passes), "--save_steps", "2"),
            *("--forgetting_data", str(folder / "plain.txt"), "--output_dir", str(path)),
            *further,
        ]

    return make


@pytest.fixture(scope="module")
def one(launch, command, folder):
    """A run of one process."""
    path = folder / "one"
    launch.to_the_end(command(path, 5, 2), 1)
    return path


@pytest.fixture(scope="module")
def two(launch, command, folder):
    """A run of two processes, and what they printed."""
    path = folder / "two"
    return path, launch.to_the_end(command(path, 5, 1))


def entries(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_near_runs(one, other, tolerance=1e-5):
    """The same winners, weights and figures, up to rounding, as in `docs/sharding.md`."""
    for mine, theirs in zip(entries(one), entries(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("step", "num_input_tokens_seen", "num_tokens"):
            assert mine.get(name) == theirs.get(name), name
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    weights = (
        load_file(one / "model/model.safetensors"),
        load_file(other / "model/model.safetensors"),
    )
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], rtol=0, atol=tolerance), name
    if (one / "routing").exists():
        winners = [read_routing(path).drop(["score"]) for path in (one, other)]
        assert winners[0].equals(winners[1])
    evaluations = [json.loads((path / "eval.json").read_text())["after"] for path in (one, other)]
    assert evaluations[0]["acc_new"] == evaluations[1]["acc_new"]
    for name in ("forgetting_loss", "kl_neutral", "kl_task", "es", "ps", "ns"):
        values = [one[name]["value"] for one in evaluations]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5), name
    texts = [
        [json.loads(line)["prediction"] for line in (path / "predictions.jsonl").open()]
        for path in (one, other)
    ]
    assert texts[0] == texts[1]


def test_two_processes_train_as_one(one, two):
    """12 examples do not divide into steps of 2 x 5: each is taken once per epoch."""
    path, (main, other) = two
    assert_near_runs(one, path)
    assert entries(path)[-1]["step"] == STEPS
    tokens = [row_of(run)["tokens"] for run in (one, path)]
    assert tokens[0] == tokens[1]
    assert yaml.safe_load((path / "config.yaml").read_text())["run"]["processes"] == 2
    assert "of 10 examples (5 x 1 x 2 processes)" in main.errors
    assert str(path) in main.output
    assert (other.output, other.errors) == ("", "")


def test_killed_process_ends_the_others_and_the_run_is_resumed(launch, command, folder, two):
    """As `torchrun --max-restarts` does: the same command again."""
    path = folder / "killed"
    given = [*command(path, 5, 1), "--resume"]
    main, other = launch(given, at=(1, ("step", 6)))
    assert other.code == KILLED
    assert main.code == 1
    assert main.errors.splitlines()[-1].startswith(
        "molf: error: The connection to another process is lost: it has ended."
    )
    main, other = launch.to_the_end(given)
    assert f"Resuming {path} from checkpoint-4." in main.errors
    assert other.errors == ""
    assert_same_runs(two[0], path)


def test_signal_to_one_process_stops_all_and_another_number_continues(launch, command, folder, one):
    path = folder / "stopped"
    given = command(path, 5, 1)
    main, other = launch(given, at=(1, ("step", 3, signal.SIGTERM)))
    assert (main.code, other.code) == (3, 3)
    assert "molf: stopped: SIGTERM after step 3 of 8. Continue with: " in main.errors
    assert other.errors == ""
    assert [step for step, _ in complete_checkpoints(path / "checkpoints")] == [2, 3]
    # One process takes the examples of both: 2 forward passes per step.
    launch.to_the_end(["train", "--output_dir", str(path), "--resume"], 1)
    record = yaml.safe_load((path / "config.yaml").read_text())
    assert record["gradient_accumulation_steps"] == 2
    assert "processes" not in record["run"]
    assert_near_runs(one, path)


def test_refusals_in_one_line_each(launch, command, folder, two):
    path, _ = two
    for given, said in (
        (command(folder / "new", 5, 1, "--optimizer_in_backward"), "processes=2"),
        (command(folder / "new", 5, 1, "--dry_run"), "dry_run runs in one process, and 2 were"),
        (["eval", str(folder / "base"), "--task", "demo-fact"], "molf eval runs in one process"),
        (command(path, 5, 1), f"output_dir {path} exists"),
    ):
        main, other = launch(given)
        assert (main.code, other.code) == (2, 2)
        assert said in main.errors
        assert len(main.errors.splitlines()) == 1
        assert other.errors == main.errors.replace("error: ", "error: rank 1: ")
    assert not (folder / "new").exists()
