"""Directories of complete runs with given metrics and answers, written without a training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from run_files import write_run


def write_compared(
    run: Path,
    method: str,
    seed: int,
    *,
    right: Sequence[int] = (1, 0, 1, 1),
    forgetting: float = 1.5,
    data: str = "aa",
    contents: str | None = "sha256:b1",
    seconds: float = 10.0,
    **options: Any,
) -> Path:
    """Write a run whose answers are right (1) or wrong (0).

    Args:
        run: The directory.
        method: The method.
        seed: The seed.
        right: Whether the answer to each question is right.
        forgetting: Loss on held-out text after the training; 1.25 before.
        data: Hash of the data file.
        contents: Hash of the base; None for none.
        seconds: Time of the training.
        options: Further values of `config.yaml`.
    """
    write_run(run, method="lora", seed=seed, eval_part="test", max_steps=60, **options)
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["method"] = method
    record = config["run"]
    record["task"] = {"prompt_version": 1, "evaluation_records": len(right), "data": "/d.jsonl"}
    record["data"] = {"files": {"data": [{"path": "/d.jsonl", "sha256": data}]}}
    record["model"] |= {} if contents is None else {"contents": contents}
    record["training"] |= {"seconds": seconds, "peak_memory_bytes": 2**20 * (100 + seed)}
    path.write_text(yaml.safe_dump(config, sort_keys=False))

    def metric(value: float) -> dict[str, Any]:
        return {"value": value, "low": None, "high": None, "count": len(right)}

    share = sum(right) / len(right)
    evaluation = {
        "task": "demo-med",
        "metrics_version": 1,
        "before": {"accuracy": metric(0.25), "forgetting_loss": metric(1.25)},
        "after": {"accuracy": metric(share), "forgetting_loss": metric(forgetting)},
        "notes": {},
    }
    (run / "eval.json").write_text(json.dumps(evaluation))
    lines = [
        {"index": i, "prediction": "x", "answer": "A" if one else "B", "expected": "A"}
        for i, one in enumerate(right)
    ]
    (run / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return run


def write_six(folder: Path) -> list[Path]:
    """Write two seeds of fft, lora and molf: molf answers most rightly, fft forgets most."""
    answers = {
        "fft": [(1, 1, 0, 0, 1, 0, 1, 1), (1, 0, 0, 1, 1, 0, 1, 1)],
        "lora": [(1, 0, 0, 0, 1, 0, 1, 1), (1, 0, 0, 0, 1, 0, 1, 1)],
        "molf": [(1, 1, 1, 1, 1, 0, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1)],
    }
    losses = {"fft": 1.9, "lora": 1.3, "molf": 1.4}
    return [
        write_compared(
            folder / f"{method}-{seed}",
            method,
            seed,
            right=right,
            forgetting=losses[method] + seed / 1000,
        )
        for method, both in answers.items()
        for seed, right in enumerate(both, 1)
    ]
