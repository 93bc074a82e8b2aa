"""Quantised weights (bitsandbytes, torchao): recognised without importing either library."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

_BITSANDBYTES = {"Params4bit": "4-bit", "Int8Params": "8-bit"}


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight holds a quantised matrix and not its numbers.

    By class where there is one: bitsandbytes may store four-bit numbers in a floating-point dtype,
    and torchao's tensors show the dtype that they stand for.
    """
    return (
        type(weight).__name__ in _BITSANDBYTES
        or _is_torchao(weight)
        or not weight.is_floating_point()
    )


def kind_of(weight: Tensor) -> str:
    """What a quantised weight is, for messages: "bitsandbytes 4-bit", "torchao ...", a dtype."""
    if type(weight).__name__ in _BITSANDBYTES:
        return f"bitsandbytes {_BITSANDBYTES[type(weight).__name__]}"
    return f"torchao {type(weight).__name__}" if _is_torchao(weight) else str(weight.dtype)


def is_repacked(weight: Any) -> bool:
    """Whether bitsandbytes keeps a 4-bit weight in the layout of its inference on CPUs.

    A forward pass in eval mode brings it into that layout, where `dequantize_4bit` reads other
    numbers and products have no gradient.
    """
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers out of that layout, so that evaluation may come between training steps."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _is_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def require(library: str, purpose: str) -> None:
    """Make sure that an optional library is installed.

    Args:
        library: `"bitsandbytes"` or `"torchao"`; molf has an extra of the same name.
        purpose: What needs it, the subject of the message.

    Raises:
        ValueError: It is not; the message names the extra.
    """
    if find_spec(library) is None:
        raise ValueError(
            f"{purpose} needs {library}, which is not installed: pip install 'molf[{library}]'."
        )


def dequantised(module: Any) -> Tensor:
    """Return the numbers that a quantised linear layer stands for, [out, in], float32 or better.

    Raises:
        ValueError: The library that can tell is not installed, or cannot.
    """
    weight = module.weight
    for library, applies in (
        ("bitsandbytes", type(weight).__name__ in _BITSANDBYTES),
        ("torchao", _is_torchao(weight)),
    ):
        if applies:
            require(library, f"A base quantised by {library}")
    from peft.utils.integrations import dequantize_module_weight

    if is_repacked(weight):
        module.state_dict()  # bitsandbytes undoes the layout of inference when it saves
    try:
        numbers = dequantize_module_weight(module).detach()
    except (NotImplementedError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Cannot dequantise {kind_of(weight)} weights: {reason[:200]}") from error
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def real_layer(module: Any, source: Any | None, dtype: torch.dtype) -> Any:
    """Make a layer that can take the place of a quantised one in an unquantised model.

    Args:
        module: The quantised linear layer. Its bias is kept, in the dtype of the weight:
            bitsandbytes may have brought it to the one that it computes in.
        source: The layer of the unquantised model, whose weight is copied; or None.
        dtype: Of the weight where there is no `source`.

    Returns:
        An `nn.Linear`, or a transposed `Conv1D` where the unquantised model has one.
    """
    device = module.weight.device
    kind = type(source) if source is not None else getattr(module, "source_cls", None)
    with torch.device("meta"):
        if kind is not None and kind.__name__ == "Conv1D":
            layer: Any = kind(module.out_features, module.in_features)
        else:
            layer = nn.Linear(module.in_features, module.out_features, bias=False)
    if source is not None:
        weight = source.weight.detach().to(device, copy=True)
    else:
        weight = torch.empty(layer.weight.shape, dtype=dtype, device=device)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = module.bias
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(weight.dtype)
    return layer.train(module.training)


def drop_quantisation(model: Any) -> None:
    """Make a transformers model forget that it was quantised, once its weights are real."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    if hasattr(model, "is_quantized"):
        model.is_quantized = False
