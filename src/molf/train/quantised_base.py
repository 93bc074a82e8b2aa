"""A frozen 4-bit or 8-bit base to train an adapter beside (bitsandbytes)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from molf.core.quantised import is_quantised, keep_differentiable
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

    Four bits are NF4 without double quantisation, multiplied in bfloat16 where autocast would do
    so, which it does not reach.
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
    model = AutoModelForCausalLM.from_pretrained(
        str(path) if path.is_dir() else settings.model,
        quantization_config=quantisation,
        dtype=torch.float32,
        device_map={"": device},
        trust_remote_code=False,
        use_safetensors=True,
    )
    keep_differentiable(model)
    return model


class Precision:
    """What the quantised layers lose to computing in bfloat16, kept for the merge.

    bitsandbytes rounds their biases to the type that it computes in, for good.

    Args:
        model: The model as it was loaded.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers: list[Any] = [
            module
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and is_quantised(module.weight)
        ]
        self._biases = [None if x.bias is None else x.bias.data.clone() for x in self._layers]

    def restore(self) -> None:
        """Bring the biases back, and compute in float32 from now on."""
        for layer, bias in zip(self._layers, self._biases, strict=True):
            if bias is not None:
                layer.bias.data = bias.to(layer.bias.device)
            if hasattr(layer, "compute_dtype"):
                layer.compute_dtype = torch.float32
