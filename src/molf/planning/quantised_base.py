"""Stand-ins for bitsandbytes' linear layers, with the same memory but without data.

bitsandbytes' kernels need quantised weights, and so a device and data. The stand-ins hold tensors
of the same sizes, and allocate the same in the forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from molf.core.model.module_names import cleaner
from molf.core.model.quantised import Quantisation

_BLOCK = 64  # four-bit numbers that share a scale, in `BitsAndBytesConfig`'s default


def planned_as(quantisation: Quantisation | None) -> str | None:
    """Return the option for a base of the same memory, or None if there is none."""
    if quantisation is None or quantisation.method != "bitsandbytes":
        return None
    return f"load_in_{quantisation.bits}bit"


def quantise(
    model: Any,
    quantised: str,
    compute_dtype: torch.dtype | None = None,
    unquantised: Collection[str] = (),
) -> None:
    """Replace a model's frozen linear layers, those that transformers quantises, by stand-ins.

    Args:
        model: A transformers model, or a PEFT model of one, whose adapter stays.
        quantised: `load_in_4bit` or `load_in_8bit`.
        compute_dtype: Type that 4-bit layers compute in; None for float32.
        unquantised: Names of layers that stay.
    """
    head, clean = model.get_output_embeddings(), cleaner(model)
    for parent_name, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            is_adapters = isinstance(parent, nn.ModuleDict)  # PEFT's lora_A and lora_B
            full_name = clean(f"{parent_name}.{name}".removeprefix("."))
            if full_name.removesuffix(".base_layer") in unquantised:
                continue
            if type(layer) is nn.Linear and layer is not head and not is_adapters:
                stand_in = (
                    _FourBit(layer, compute_dtype or torch.float32)
                    if quantised == "load_in_4bit"
                    else _EightBit(layer)
                )
                setattr(parent, name, stand_in)


class _FourBit(nn.Module):
    """`Linear4bit`: unpacks the weight for each product, and saves nothing for the backward pass.

    Args:
        layer: The linear layer.
        compute_dtype: Type of the products.
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
        """Return the output `[..., out]`, as the copy that PEFT makes of it."""
        # The compute type is that of bitsandbytes, which casts input and output.
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
        weight = grad.new_empty(ctx.shape, dtype=torch.float32)  # the type before quantising
        return grad @ weight.to(grad.dtype), None


class _EightBit(nn.Module):
    """`Linear8bitLt` (LLM.int8): quantises its input too, but saves the original for backward.

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
        """Return the output `[..., out]`; the kernel of the product adds the bias."""
        out: Tensor = _EightBitProduct.apply(x, self.codes)
        return out


class _EightBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes)
        # The temporaries of LLM.int8: the input in float16, then quantised.
        x.to(torch.float16).to(torch.int8)
        products = x.new_empty((*x.shape[:-1], len(codes)), dtype=torch.int32)
        return products.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, codes = ctx.saved_tensors
        return grad.to(x.dtype) @ codes.to(x.dtype), None
