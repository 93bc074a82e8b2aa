"""A frozen 4-bit or 8-bit base to train an adapter beside (bitsandbytes)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from molf.errors import InputError
from molf.train.resolved import ResolvedSettings


def check_device(settings: ResolvedSettings, device: torch.device) -> None:
    """Try a small quantised layer where the training will be.

    Raises:
        InputError: It does not work there.
    """
    if settings.quantised is None:
        return
    import bitsandbytes

    try:
        if settings.load_in_4bit:
            layer: torch.nn.Module = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
        else:
            layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        layer.to(device)(torch.ones(2, 64, device=device)).sum().item()
    except Exception as error:  # whatever a backend that is missing or broken raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"{settings.quantised} does not work on {device} with this bitsandbytes: {reason}"
        ) from error


def load_quantised(settings: ResolvedSettings, bf16: bool, device: torch.device) -> Any:
    """Load `settings.model` again, linear layers quantised, all the rest in float32.

    Four bits are NF4 without double quantisation. Products are in bfloat16 under autocast and
    else in float32.
    """
    if settings.load_in_4bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        )
    else:
        quantisation = BitsAndBytesConfig(load_in_8bit=True)
    path = Path(settings.model).expanduser()
    return AutoModelForCausalLM.from_pretrained(
        str(path) if path.is_dir() else settings.model,
        quantization_config=quantisation,
        dtype=torch.float32,
        device_map={"": device},
        trust_remote_code=False,
        use_safetensors=True,
    )
