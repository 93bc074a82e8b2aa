"""Stand-ins for bitsandbytes' linear layers, which take the memory that those take.

bitsandbytes' own kernels need weights that were quantised, and so a device and data. What is here
holds tensors of the same sizes, and allocates in forward and backward pass what bitsandbytes does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from molf.core.quantised import Quantisation

_BLOCK = 64  # four-bit numbers that share a scale, in `BitsAndBytesConfig`'s default


def planned_as(quantisation: Quantisation | None) -> str | None:
    """The option that makes a base of the same memory; None where there is none."""
    if quantisation is None or quantisation.method != "bitsandbytes":
        return None
    return f"load_in_{quantisation.bits}bit"


def quantise(model: Any, quantised: str, compute_dtype: torch.dtype | None = None) -> None:
    """Put stand-ins in the place of a model's frozen linear layers, as transformers does.

    Args:
        model: A transformers model, or a PEFT model of one, whose adapter stays.
        quantised: `load_in_4bit` or `load_in_8bit`.
        compute_dtype: What four-bit layers compute in; None for float32.
    """
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            is_adapters = isinstance(parent, nn.ModuleDict)  # PEFT keeps lora_A and lora_B in them
            if type(layer) is nn.Linear and layer is not head and not is_adapters:
                stand_in = (
                    _FourBit(layer, compute_dtype or torch.float32)
                    if quantised == "load_in_4bit"
                    else _EightBit(layer)
                )
                setattr(parent, name, stand_in)


class _FourBit(nn.Module):
    """`Linear4bit`: numbers are unpacked for every product, and nothing is kept for the backward.

    Args:
        layer: The linear layer.
        compute_dtype: Of the products.
    """

    def __init__(self, layer: nn.Linear, compute_dtype: torch.dtype) -> None:
        super().__init__()
        count, device = layer.weight.numel(), layer.weight.device
        self.compute_dtype = compute_dtype
        self.shape = layer.weight.shape
        self.bias = layer.bias
        self.register_buffer("codes", torch.empty(-(-count // 2), dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(-(-count // _BLOCK), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """PEFT makes a copy of the result."""
        out: Tensor = _FourBitProduct.apply(x.to(self.compute_dtype), self.shape)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).clone()


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = shape
        return nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight = grad.new_empty(ctx.shape, dtype=torch.float32)  # the type that was quantised
        return grad @ weight.to(grad.dtype), None


class _EightBit(nn.Module):
    """`Linear8bitLt` (LLM.int8): inputs are quantised too, and kept as they came.

    Args:
        layer: The linear layer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight
        self.bias = layer.bias
        self.register_buffer("codes", torch.empty_like(weight, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(len(weight), device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """With the bias inside the product's kernel."""
        out: Tensor = _EightBitProduct.apply(x, self.codes)
        return out


class _EightBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes)
        x.to(torch.float16).to(torch.int8)
        products = x.new_empty((*x.shape[:-1], len(codes)), dtype=torch.int32)
        return products.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, codes = ctx.saved_tensors
        return grad.to(x.dtype) @ codes.to(x.dtype), None
