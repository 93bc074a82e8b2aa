"""Directories of runs, written without a training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from molf.core.step.decision import Decision
from molf.job.record.routing_log import RoutingWriter

EXPERTS = ("full", "lora0_r4")
SHAPES = {"q_proj": (8, 8), "k_proj": (4, 8), "up_proj": (16, 8)}
LAYERS = tuple(f"model.layers.{depth}.{kind}" for depth in range(3) for kind in SHAPES)


def interval(value: float) -> dict[str, Any]:
    """A metric of `eval.json`."""
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "count": 20}


def scores(layer: str, step: int) -> tuple[float, float]:
    """Scores of full and LoRA: k_proj goes to full, up_proj of the last layer flips."""
    if layer.endswith("k_proj"):
        return 3.0, 1.0
    if layer == LAYERS[-1]:
        return (2.0, 1.0) if step % 20 < 10 else (1.0, 2.0)
    return 1.0, 2.0 + 0.1 * (step % 3)


def write_routing(
    run: Path,
    steps: int,
    score_of: Callable[[str, int], tuple[float, float]] = scores,
    layers: tuple[str, ...] = LAYERS,
    rows_per_part: int = 200,
) -> None:
    """Write a routing log; the first step is at rate 0."""
    shapes = {layer: SHAPES[layer.rpartition(".")[2]] for layer in layers}
    with RoutingWriter(run / "routing", rows_per_part=rows_per_part, shapes=shapes) as writer:
        for step in range(steps):
            routing = {}
            for layer in layers:
                full, lora = score_of(layer, step) if step else (0.0, 0.0)
                winner = EXPERTS[0] if full >= lora else EXPERTS[1]
                routing[layer] = Decision((winner,), dict(zip(EXPERTS, (full, lora), strict=True)))
            writer.add(step, routing)


def write_run(
    run: Path, *, method: str = "molf", steps: int = 60, complete: bool = True, **options: Any
) -> Path:
    """Write the directory of a run of `steps` steps.

    Args:
        run: The directory; its parents are created.
        method: The method.
        steps: Steps of the training, all logged and routed.
        complete: Whether it has an evaluation.
        options: Further values of `config.yaml`.
    """
    run.mkdir(parents=True)
    config = {
        "task": "demo-med",
        "model": "/models/tiny",
        "method": method,
        "seed": 1,
        "ranks": [4],
        "alpha": [8.0],
        "use_rslora": True,
        "score": "epd",
        "top_k": 1,
        "learning_rate": 1e-3,
        "lora_learning_rate": 2e-3,
        **options,
        "run": {
            "training": {"steps": steps, "skipped_steps": 0},
            "model": {"parameters": 1000, "trained_parameters": 1200},
        },
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {
        "started": "2026-11-01T10:00:00+00:00",
        "command": ["/usr/bin/molf", "train", "--method", method],
        "packages": {"molf": version("molf"), "torch": "2.13"},
        "device": {"type": "cpu", "name": "x86_64"},
    }
    (run / "environment.json").write_text(json.dumps(environment))
    lines = [
        {
            "step": step,
            "loss": 1 / step,
            "grad_norm": 1 + math.sin(step),
            "learning_rate": 1e-3 * step / steps,
            "lora_learning_rate": 2e-3 * step / steps,
            "tokens_per_second": 100.0 + step,
            "peak_memory_bytes": 2**30 * (1 + min(step, 20) / 20),
            "memory_bytes": 2**30,
            "train_runtime": 2.0 * step,
        }
        for step in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if method in ("molf", "molf-e"):
        write_routing(run, steps)
    if complete:
        write_evaluation(run)
    return run


def write_examples(run: Path) -> None:
    """Write twelve training examples, chats of two answers."""
    examples = [
        {
            "index": 3 * number,
            "tokens": 20,
            "loss_tokens": 8,
            "segments": [
                [f"user: question {number}? <script>alert(2)</script>\n", False],
                ["bot: first answer\n", True],
                ["user: and?\n", False],
                ["bot: second answer", True],
            ],
            **({"faults": ["a turn carries no loss"]} if number == 1 else {}),
        }
        for number in range(12)
    ]
    (run / "examples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in examples))


def write_evaluation(run: Path) -> None:
    """Write metrics before and after, and ten predictions, half of them right."""
    after = {
        "accuracy": interval(0.7),
        "forgetting_loss": interval(1.5),
        "by_subject": {"Anatomy": {"accuracy": interval(0.8)}, "Bio": {"accuracy": interval(0.6)}},
    }
    record = {
        "task": "demo-med",
        "before": {"accuracy": interval(0.5), "forgetting_loss": interval(1.25)},
        "after": after,
        "notes": {"before": {}, "after": {"ties_logprob": 2, "empty": 0}},
    }
    (run / "eval.json").write_text(json.dumps(record))
    predictions = [
        {
            "index": index,
            "prediction": "A" if index % 2 else "B",
            "answer": "A" if index % 2 else "B",
            "right": bool(index % 2),
            "prompt": f"Question {index}: </script><script>alert(1)</script>?",
            "expected": "A",
            "log_probs": {"A": -0.123456, "B": -2.5},
        }
        for index in range(10)
    ]
    (run / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in predictions))
