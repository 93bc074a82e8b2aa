"""A run that was killed and resumed ends in the bits of one that was left alone."""

from __future__ import annotations

import csv
import json
import multiprocessing
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from core_helpers import assert_same_bits
from killed_run import run
from molf.checkpoint.store import complete_checkpoints, read_values
from molf.checkpoint.tensors import stored_tensors
from molf.job.record.routing_log import read_routing

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed:UserWarning")

STEPS = 8
TIMES = (
    "tokens_per_second",
    "train_runtime",
    "train_tokens_per_second",
    "train_samples_per_second",
    "train_steps_per_second",
)
METHODS = {
    "molf": [],
    "molf-fresh": ["--score", "fresh"],
    "molf-dropout": ["--lora_dropout", "0.1"],
    "molf-e": ["--method", "molf-e", "--ranks", "2,4"],
    "fft": ["--method", "fft"],
    "lora": ["--method", "lora", "--lora_dropout", "0.1"],
    "adalora": ["--method", "adalora"],
    "exact-8bit": ["--dtype", "bfloat16", "--state_dtype", "8bit"],
    "stochastic": ["--dtype", "bfloat16", "--weight_rounding", "stochastic"],
    "backward": ["--optimizer_in_backward"],
}


@pytest.fixture(scope="module")
def start(workplace):
    """Run a command in a process that has all libraries; return its exit code and errors."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_run"])
    errors = workplace / "errors.txt"

    def started(arguments, *moment) -> tuple[int, str]:
        process = context.Process(target=run, args=(arguments, errors, *moment))
        process.start()
        process.join()
        return process.exitcode, errors.read_text(encoding="utf-8")

    return started


@pytest.fixture(scope="module")
def command(base, facts):
    """A training of 8 steps: epochs of 3, checkpoints each 2, log entries each 3."""

    def made(path: Path, *further: str) -> list[str]:
        given = [
            *("train", "--task", "fact", "--model", str(base), "--data", str(facts)),
            *("--alpha", "4", "--logging_steps", "3", "--save_steps", "2"),
            *("--learning_rate", "1e-2", "--lora_learning_rate", "3e-2"),
            *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
            *("--max_steps", str(STEPS), "--output_dir", str(path), *further),
        ]
        return given if "--ranks" in further else [*given, "--ranks", "4"]

    return made


def logged(path: Path) -> list[dict]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def row_of(path: Path) -> dict[str, str]:
    with (path.parent / "results.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["run"] == path.name)
    without = ("run", "started", "peak_memory_bytes")
    return {k: v for k, v in row.items() if not k.endswith("_seconds") and k not in without}


def state_of(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """All tensors and values of the last checkpoint."""
    step, checkpoint = complete_checkpoints(path / "checkpoints")[-1]
    assert step == STEPS
    tensors = {
        n: torch.empty(size, dtype=dtype) for n, (size, dtype) in stored_tensors(checkpoint).items()
    }
    dcp.load(tensors, checkpoint_id=checkpoint / "tensors", no_dist=True)
    values = read_values(checkpoint)
    for name in ("clock", "throughput"):
        del values["trainer"][name]
    for name in ("metrics", "routing"):  # bytes and parts: times have other lengths
        del values[name]
    return tensors, values


def flat(value, name=""):
    """Numbers, texts and tensors in a nested value, by place."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    else:
        return {name: value}
    return {key: one for k, v in pairs for key, one in flat(v, f"{name}.{k}").items()}


def assert_same_runs(one: Path, other: Path) -> None:
    assert logged(one) == logged(other)
    assert row_of(one) == row_of(other)
    for name in ("eval.json", "predictions.jsonl"):
        assert (one / name).read_text() == (other / name).read_text(), name
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    if (one / "routing").exists():
        assert read_routing(one).equals(read_routing(other))
    records = [yaml.safe_load((path / "config.yaml").read_text())["run"] for path in (one, other)]
    for record in records:
        record.pop("checkpoints")
        record.pop("merge", None) or {}
    assert records[0] == records[1]
    tensors, values = zip(state_of(one), state_of(other), strict=True)
    assert_same_bits(*tensors)
    assert_same_bits(*map(flat, values))


@pytest.mark.parametrize("name", METHODS)
def test_killed_run_ends_in_the_same_bits(start, command, workplace, name):
    alone, path = workplace / f"alone-{name}", workplace / f"killed-{name}"
    code, errors = start(command(alone, *METHODS[name]))
    assert code == 0, errors
    assert start(command(path, *METHODS[name]), "step", 6)[0] == -signal.SIGKILL
    code, errors = start(["train", "--output_dir", str(path), "--resume"])
    assert code == 0, errors
    assert f"Resuming {path} from checkpoint-4." in errors
    assert_same_runs(alone, path)
