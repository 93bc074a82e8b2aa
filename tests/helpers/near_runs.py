"""Runs of `molf train` in several processes, and their comparison with that of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molf.job.record.routing_log import read_routing

STEPS = 8


def facts_command(folder: Path, base: Path | None = None) -> Callable[..., list[str]]:
    """A training with steps of 10 examples: epochs of 2 steps, the second with 2 examples.

    Args:
        folder: Has `base`, `facts.jsonl` and `plain.txt`.
        base: Another model.
    """

    def make(path: Path, size: int, passes: int, *further: str) -> list[str]:
        return [
            *("train", "--task", "fact", "--model", str(base or folder / "base")),
            *("--data", str(folder / "facts.jsonl")),
            *(() if {"fft", "hybrid"} & set(further) else ("--alpha", "4", "--ranks", "4")),
            *("--learning_rate", "1e-3", "--lora_learning_rate", "3e-3", "--logging_steps", "1"),
            *("--per_device_train_batch_size", str(size), "--max_steps", str(STEPS)),
            *("--gradient_accumulation_steps", str(passes), "--save_steps", "2"),
            *("--forgetting_data", str(folder / "plain.txt"), "--output_dir", str(path)),
            *further,
        ]

    return make


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
    assert evaluations[0].keys() == evaluations[1].keys()
    assert evaluations[0].get("acc_new") == evaluations[1].get("acc_new")
    for name in evaluations[0]:
        values = [one[name]["value"] for one in evaluations]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5), name
    texts = [
        [json.loads(line)["prediction"] for line in (path / "predictions.jsonl").open()]
        for path in (one, other)
    ]
    assert texts[0] == texts[1]
