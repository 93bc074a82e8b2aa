"""Runs of `molf train` in processes that can be killed, and their comparison."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml

from core_helpers import assert_same_bits
from forked import forking
from killed_run import run
from molf.checkpoint.store import complete_checkpoints, read_values
from molf.checkpoint.tensors import stored_tensors
from molf.job.record.routing_log import read_routing

STEPS = 8
TIMES = (
    "peak_memory_bytes",
    "memory_bytes",
    "tokens_per_second",
    "train_runtime",
    "eval_runtime",
    "train_tokens_per_second",
    "train_samples_per_second",
    "train_steps_per_second",
)
METHODS = {
    "molf": [],
    "molf-fresh": ["--score", "fresh"],
    "molf-dropout": ["--lora_dropout", "0.1"],
    "molf-e": ["--method", "molf-e", "--ranks", "2,4"],
    "hybrid": ["--method", "hybrid", "--lora_dropout", "0.1"],
    "hybrid exact 8-bit": ["--method", "hybrid", "--dtype", "bfloat16", "--state_dtype", "8bit"],
    "fft": ["--method", "fft"],
    "lora": ["--method", "lora", "--lora_dropout", "0.1"],
    "lora+": ["--method", "lora+"],
    "dora": ["--method", "dora"],
    "pissa": ["--method", "pissa"],
    "eva": ["--method", "eva"],
    "adalora": ["--method", "adalora"],
    "exact 8-bit": ["--dtype", "bfloat16", "--state_dtype", "8bit"],
    "stochastic": ["--dtype", "bfloat16", "--weight_rounding", "stochastic"],
    "backward": ["--optimizer_in_backward"],
    "offload": ["--state_offload"],
    "noise": ["--training_args.neftune_noise_alpha", "5"],
    "eager attention": ["--attn_implementation", "eager"],
    "compiled": ["--training_args.torch_compile_backend", "eager"],
    "accumulated": ["--grad_accumulation_dtype", "float32", "--dtype", "bfloat16"],
}
"""Further options of each kind of run, by its name."""


class Runs:
    """Starts commands in processes that have all libraries already.

    Args:
        errors: File for their standard errors.
        base: The model.
        facts: Its data.
        plain: A short plain text to measure forgetting on.
    """

    def __init__(self, errors: Path, base: Path, facts: Path, plain: Path) -> None:
        self._context = forking()
        self._errors, self._base, self._facts, self._plain = errors, base, facts, plain
        self._assignment = errors.with_name("assignment.yaml")
        self._assignment.write_text("full: [down_proj]\ndefault: {r: 4, alpha: 4}\n")

    def command(self, path: Path, *further: str) -> list[str]:
        """A training of 8 steps: epochs of 3, checkpoints each 2, log entries each 3."""
        given = [
            *("train", "--task", "fact", "--model", str(self._base), "--data", str(self._facts)),
            *("--logging_steps", "3", "--save_steps", "2"),
            *("--learning_rate", "1e-2", "--lora_learning_rate", "3e-2"),
            *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
            *("--max_steps", str(STEPS), "--max_eval_samples", "2"),
            *("--forgetting_data", str(self._plain), "--output_dir", str(path), *further),
        ]
        if "--assignment" in further:
            return given
        if "hybrid" in further:
            return [*given, "--assignment", str(self._assignment)]
        return [*given, "--alpha", "4", *(() if "--ranks" in further else ("--ranks", "4"))]

    def __call__(self, arguments: Sequence[str], *moment: Any) -> tuple[int | None, str]:
        """Run a command, possibly to a moment of `killed_run.run`; return exit code and errors."""
        process = self._context.Process(target=run, args=(arguments, self._errors, *moment))
        process.start()
        process.join()
        return process.exitcode, self._errors.read_text(encoding="utf-8")

    def to_the_end(self, arguments: Sequence[str]) -> str:
        """Run a command; return what it printed to standard error."""
        code, errors = self(arguments)
        assert code == 0, errors
        return errors


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
    for name in ("clock", "throughput", "checkpoints"):
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
        for name in ("seconds", "peak_memory_bytes"):
            record["training"].pop(name)
    assert records[0] == records[1]
    tensors, values = zip(state_of(one), state_of(other), strict=True)
    assert_same_bits(*tensors)
    assert_same_bits(*map(flat, values))
