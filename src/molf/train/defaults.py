"""Default hyper-parameters: the paper's by method, and a set of their own for the demo tasks.

A value that the user gave wins over the task's, the task's over the method's.
"""

from __future__ import annotations

import math
from typing import Any

METHODS = ("fft", "lora", "molf")

# The paper's runs: effective batch 32 as 8 x 4, two epochs.
COMMON: dict[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
}

METHOD: dict[str, dict[str, Any]] = {
    "fft": {},
    "lora": {"ranks": (32,), "lora_dropout": 0.05},
    # The paper trains MoLF with dropout 0.05; the folded form needs 0.
    "molf": {"ranks": (128,), "alpha": 32.0, "lora_dropout": 0.0},
}

# The shipped base is tiny and its facts few: high rates and many epochs edit it within a minute.
_DEMO: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 10.0,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "ranks": (16,),
    "alpha": 8.0,
}
# MoLF's experts win about as often as each other at this ratio of rates; LoRA alone needs more.
_DEMO_LORA_RATE = {"molf": 2e-3, "lora": 3e-3}


def defaults_for(method: str, task: str) -> dict[str, Any]:
    """Return the default of every option that depends on the method or the task."""
    defaults = {**COMMON, **METHOD[method]}
    if task.startswith("demo-"):
        defaults |= _DEMO
        if method in _DEMO_LORA_RATE:
            defaults["lora_learning_rate"] = _DEMO_LORA_RATE[method]
    return defaults


def lora_alpha(rank: int, *, use_rslora: bool) -> float:
    """Return the LoRA baseline's alpha: `2 sqrt(r)` rounded, or `2 r` without rsLoRA."""
    return float(round(2 * math.sqrt(max(rank, 0))) if use_rslora else 2 * rank)
