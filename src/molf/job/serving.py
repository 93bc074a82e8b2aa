"""Check whether engines that load adapters beside a base take one of molf's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molf.job.record.ownership import read_json
from molf.shown import listed

_MOST_RANK = 512  # the largest value of vLLM's --max-lora-rank
_MOST_NAMES = 3


def warn_of_vllm(adapter: Path) -> None:
    """Warn, in one line, where vLLM refuses an adapter or would scale it wrongly.

    Args:
        adapter: A directory with `adapter_config.json`.
    """
    config = read_json(adapter / "adapter_config.json")
    faults = list(vllm_faults(config)) if isinstance(config, dict) else []
    if faults:
        warnings.warn(
            f"vLLM cannot serve this adapter beside its base: {'; '.join(faults)}. It serves the "
            "merged model (molf export --what model).",
            stacklevel=3,
        )


def vllm_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reasons why vLLM cannot serve an adapter; none if it can.

    Source: `PEFTHelper` and `LoRAConfig` of vLLM 0.26, which read `r`, `lora_alpha`, `bias`,
    `modules_to_save`, `use_rslora` and `use_dora`, and no other field of PEFT.

    Args:
        config: The content of `adapter_config.json`.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"its peft_type is {kind}, not LORA"
        return
    if config.get("use_dora"):
        yield "it refuses DoRA"
    if modules := config.get("modules_to_save"):
        yield f"it refuses modules_to_save ({listed(modules, _MOST_NAMES)})"
    if (bias := config.get("bias") or "none") != "none":
        yield f"it refuses bias={bias}"
    ranks = config.get("rank_pattern") or {}
    alphas = config.get("alpha_pattern") or {}
    r, alpha = config["r"], config["lora_alpha"]
    if (most := max(r, *ranks.values(), 0)) > _MOST_RANK:
        yield f"its rank {most} exceeds {_MOST_RANK}"
    power = 0.5 if config.get("use_rslora") else 1.0
    for name in {**ranks, **alphas}:
        scale = alphas.get(name, alpha) / ranks.get(name, r) ** power
        if not math.isclose(scale, alpha / r**power, rel_tol=1e-6):
            yield "it ignores rank_pattern and alpha_pattern, which scale layers differently"
            return
