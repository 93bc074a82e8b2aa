"""The methods and their default hyper-parameters, from the paper and each method's publication.

A value of the user has precedence over the task's, and the task's over the method's. Learning rate,
batch and schedule are the same for all methods, so that results can be compared.
"""

from __future__ import annotations

import math
from typing import Any

from molf.core.options import OPTIONS

SUMMARIES = {
    "fft": "full fine-tuning (AdamW on all weights)",
    "lora": "LoRA (arXiv 2106.09685), merged into the weights",
    "lora+": "LoRA+ (arXiv 2402.12354: B learns faster than A), merged into the weights",
    "dora": "DoRA (arXiv 2402.09353: magnitude and direction apart), merged into the weights",
    "pissa": "PiSSA (arXiv 2404.02948: principal singular vectors), merged into the weights",
    "eva": "EVA (arXiv 2410.07170: directions and ranks from the data), merged into the weights",
    "adalora": "AdaLoRA (arXiv 2303.10512: ranks moved between layers), merged into the weights",
    "molf": "MoLF (arXiv 2605.07111): per layer and step, full or LoRA takes the update",
    "molf-e": "MoLF-Efficient (arXiv 2605.07111): LoRA experts routed, base frozen, then merged",
    "hybrid": "an assignment: each layer trained in full, by LoRA or not at all, then merged",
}
METHODS = tuple(SUMMARIES)

# Methods whose optimizer chooses between experts.
ROUTED = ("molf", "molf-e")

# Methods that train one PEFT adapter on a frozen base.
ADAPTERS = ("lora", "lora+", "dora", "pissa", "eva", "adalora")

# Methods that support a 4-bit or 8-bit base, and merging into its weights.
QUANTISABLE = ("molf-e", "lora", "lora+", "eva", "hybrid")

# Weights that an adapter trained beside a quantised base can be merged into.
MERGE_BASES = ("dequantised", "original")

# Options of the optimizers of fft, molf, molf-e and hybrid. Adapters use torch's AdamW.
STORAGE = tuple(name for name in OPTIONS if name != "nonfinite")

# Meaning of `--ranks` for an adapter: its rank, or the rank of a LoRA with as many parameters.
MATCHES = ("rank", "parameters")

# The paper's runs: effective batch 32 as 8 x 4, two epochs.
COMMON: dict[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
}

# Rank 32 is that of the paper's LoRA baseline; the rest are the values of each method's authors.
# Alpha is given here if `default_alpha` does not compute it.
_LORA: dict[str, Any] = {"ranks": (32,), "use_rslora": True, "lora_dropout": 0.05}
METHOD: dict[str, dict[str, Any]] = {
    "fft": {},
    "lora": _LORA,
    # Hayou et al. 2024: the rate of B is lambda = 2^4 times that of A.
    "lora+": {**_LORA, "loraplus_lr_ratio": 16.0},
    # Liu et al. 2024, commonsense reasoning: rank 32, alpha 64, dropout 0.05.
    "dora": {"ranks": (32,), "use_rslora": False, "lora_dropout": 0.05},
    # Meng et al. 2024: alpha equals the rank, no dropout.
    "pissa": {"ranks": (32,), "use_rslora": False, "lora_dropout": 0.0},
    # Paischer et al. 2024: alpha 1, no dropout; rho and tau are in methods/eva.py.
    "eva": {"ranks": (32,), "alpha": 1.0, "use_rslora": False, "lora_dropout": 0.0},
    # Zhang et al. 2023; their schedule is in methods/adalora.py. They use alpha 16 at every rank;
    # here alpha is that of LoRA, so that the two can be compared.
    "adalora": {"ranks": (32,), "use_rslora": False, "lora_dropout": 0.0},
    # The paper trains MoLF with dropout 0.05. The folded form supports only 0.
    "molf": {"ranks": (128,), "alpha": 32.0, "use_rslora": True, "lora_dropout": 0.0},
    "molf-e": {"ranks": (32, 128), "alpha": 32.0, "use_rslora": True, "lora_dropout": 0.05},
    # Ranks and scalings are those of the assignment.
    "hybrid": {"lora_dropout": 0.05},
}


# The shipped base and its tasks are tiny: high rates and many epochs suffice, in under a minute.
def _demo(learning_rate: float, epochs: float, batch_size: int) -> dict[str, Any]:
    return {
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
    }


_DEMO = {
    "demo-fact": _demo(1e-3, 10.0, 32),
    "demo-sql": _demo(2e-3, 5.0, 16),
    "demo-forms": _demo(2e-3, 3.0, 4),
    "demo-med": _demo(1e-3, 5.0, 16),
}
# Learning rate of the LoRA factors, as a multiple of the task's rate. With MoLF's value, its
# experts win about equally often; hybrid has the rates of the probe that chose its layers. The
# others are the best of three on demo-fact (README); DoRA uses LoRA's.
_DEMO_RATIO = {
    "molf": 2,
    "hybrid": 2,
    "molf-e": 3,
    "lora": 3,
    "lora+": 0.3,
    "dora": 3,
    "pissa": 3,
    "eva": 30,
    "adalora": 10,
}
_DEMO_METHOD: dict[str, dict[str, Any]] = {
    "fft": {},
    "hybrid": {},
    "molf": {"ranks": (16,), "alpha": 8.0},
    # With the paper's single alpha, the expert of the lowest rank has the largest scaling and wins
    # every update of such a short training. With None, each expert has LoRA's alpha for its rank.
    "molf-e": {"ranks": (4, 16), "alpha": None},
    **{name: {"ranks": (16,)} for name in ADAPTERS},
}


def defaults_for(method: str, task: str) -> dict[str, Any]:
    """Return the default of every option that depends on the method or the task."""
    defaults = {**COMMON, **METHOD[method]}
    if task in _DEMO:
        defaults |= {**_DEMO[task], **_DEMO_METHOD[method]}
        if method in _DEMO_RATIO:
            rate = _DEMO[task]["learning_rate"] * _DEMO_RATIO[method]
            defaults["lora_learning_rate"] = float(f"{rate:.6g}")  # 3e-4, not 3.0000000000000003e-4
    return defaults


def default_alpha(method: str, rank: int, *, use_rslora: bool) -> float:
    """Return the default alpha of an adapter.

    PiSSA: scaling 1 (Meng et al. 2024). Others: the scaling of the paper's LoRA baseline, about 2,
    so alpha is `2 sqrt(r)` rounded, or `2 r` without rsLoRA.
    """
    root = math.sqrt(max(rank, 0))
    if method == "pissa":
        return root if use_rslora else float(rank)
    return float(round(2 * root) if use_rslora else 2 * rank)
