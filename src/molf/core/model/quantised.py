"""Quantised weights (bitsandbytes, torchao): recognised without importing either library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molf.inputs import check_installed

_BITSANDBYTES = {"Params4bit": "4-bit", "Int8Params": "8-bit"}
_CONFIG_NAMES = ("quantization_config", "compression_config")  # the second: compressed-tensors
_TORCHAO = {"Int8WeightOnlyConfig": "int8"}  # float8 takes no input of another type than its own


@dataclass(frozen=True)
class Quantisation:
    """Quantisation of a transformers model.

    Attributes:
        method: `quant_method` of its configuration: "bitsandbytes", "gptq", "fp8", ...
        kind: Variant of the method: "4-bit", "8-bit", "int8"; empty without variants.
        is_adaptable: Whether PEFT trains an adapter beside such weights and `merge` merges it.
    """

    method: str
    kind: str = ""
    is_adaptable: bool = False

    def __str__(self) -> str:
        """Return a name for messages: "bitsandbytes 4-bit", "gptq"."""
        return f"{self.method} {self.kind}".strip()

    @property
    def bits(self) -> int | None:
        """Bits of a weight, for adaptable kinds."""
        known = {"4-bit": 4, "8-bit": 8, **dict.fromkeys(_TORCHAO.values(), 8)}
        return known.get(self.kind)


def quantisation_of(config: Any) -> Quantisation | None:
    """Return the quantisation in a model's configuration; None if it is not quantised."""
    parts = (getattr(part, name, None) for part in _parts(config) for name in _CONFIG_NAMES)
    found = next(filter(None, parts), None)
    if found is None:
        return None
    given: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        kind = "4-bit" if given.get("load_in_4bit") else "8-bit"
        return Quantisation("bitsandbytes", kind, is_adaptable=True)
    method = given.get("quant_method")
    method = str(getattr(method, "value", method) or "an unnamed method")
    if method == "torchao":
        kind = _torchao_type(given.get("quant_type"))
        return Quantisation(method, _TORCHAO.get(kind, kind), is_adaptable=kind in _TORCHAO)
    return Quantisation(method)


def _torchao_type(quant_type: Any) -> str:
    """Return the name of torchao's configuration in a transformers configuration."""
    if isinstance(quant_type, Mapping):
        quant_type = quant_type.get("default", quant_type)
    if isinstance(quant_type, Mapping):
        return str(quant_type.get("_type", ""))
    return quant_type if isinstance(quant_type, str) else type(quant_type).__name__


def is_quantised(weight: Tensor) -> bool:
    """Return whether a weight is quantised."""
    # By class first: bitsandbytes may store 4-bit codes in a floating-point dtype, and torchao's
    # tensors report the dequantised dtype. Floating-point dtypes of 8 bits or fewer need scales.
    return (
        type(weight).__name__ in _BITSANDBYTES
        or _is_torchao(weight)
        or not (weight.is_floating_point() or weight.is_complex())
        or weight.dtype.itemsize < 2
    )


def kind_of(weight: Tensor) -> str:
    """Return the kind of a quantised weight, for messages: "bitsandbytes 4-bit", a dtype."""
    if type(weight).__name__ in _BITSANDBYTES:
        return f"bitsandbytes {_BITSANDBYTES[type(weight).__name__]}"
    return f"torchao {type(weight).__name__}" if _is_torchao(weight) else str(weight.dtype)


def is_repacked(weight: Any) -> bool:
    """Return whether bitsandbytes has re-packed a 4-bit weight for inference on CPUs.

    On CPUs with AVX512-BF16 the first forward pass in eval mode does this. It rounds scales to
    bf16; afterwards `dequantize_4bit` returns wrong numbers and products have no gradient.
    """
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def keep_differentiable(model: nn.Module) -> None:
    """Disable the re-packing of 4-bit layers, so that training can go on after an evaluation."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _is_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def dequantised(module: Any) -> Tensor:
    """Return the dequantised weight of a linear layer, [out, in], float32 or float64.

    Raises:
        ValueError: The library is not installed, or does not support the weight.
    """
    weight = module.weight
    if type(weight).__name__ in _BITSANDBYTES:
        check_installed("bitsandbytes", "A base quantised by bitsandbytes")
    elif _is_torchao(weight):
        check_installed("torchao", "A base quantised by torchao")
    else:  # PEFT would return the stored codes as weights
        raise ValueError(
            f"Cannot dequantise {kind_of(weight)} weights: only those of bitsandbytes and torchao."
        )
    if is_repacked(weight):
        module.state_dict()  # bitsandbytes undoes the re-packing on save
    try:
        numbers = _numbers(module).detach()
    except (NotImplementedError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Cannot dequantise {kind_of(weight)} weights: {reason[:200]}") from error
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def _numbers(module: Any) -> Tensor:
    """Return the dequantised weight in float32."""
    # float32 is set explicitly: by default both libraries round to the dtype before quantisation.
    weight = module.weight
    if _is_torchao(weight):
        numbers: Tensor = weight.dequantize(output_dtype=torch.float32)
        return numbers
    from peft.utils.integrations import dequantize_module_weight

    state = getattr(weight, "quant_state", None)
    if state is None:
        return dequantize_module_weight(module)
    before, state.dtype = state.dtype, torch.float32
    try:
        return dequantize_module_weight(module)
    finally:
        state.dtype = before


def real_layer(module: Any, source: Any | None, dtype: torch.dtype) -> Any:
    """Return an unquantised layer that replaces a quantised one.

    Args:
        module: The quantised linear layer. Its bias is kept, in the dtype of the weight
            (bitsandbytes may have converted it to its compute dtype).
        source: Layer of the unquantised model whose weight is copied, or None.
        dtype: Dtype of the weight without `source`.

    Returns:
        An `nn.Linear`, or a transposed `Conv1D` if the unquantised model has one.
    """
    device = module.weight.device
    kind = type(source) if source is not None else getattr(module, "source_cls", None)
    with torch.device("meta"):
        if kind is not None and kind.__name__ == "Conv1D":
            # On the meta device: the weight is replaced below.
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
    """Remove the quantisation from a transformers model whose weights are real."""
    config: Any = getattr(model, "config", None)
    if config is not None:
        drop_from_config(config)
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    if hasattr(model, "is_quantized"):
        model.is_quantized = False
    # transformers reverses these conversions when it saves; unpacking cannot be reversed.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [entry for entry in conversions if _is_reversible(entry)]


def drop_from_config(config: Any) -> None:
    """Remove the quantisation from a model's configuration, in place."""
    for part in _parts(config):
        for name in _CONFIG_NAMES:
            part.__dict__.pop(name, None)


def _parts(config: Any) -> list[Any]:
    """Return a configuration and, of a multimodal model, that of its text model."""
    has_text = callable(getattr(config, "get_text_config", None))
    return [config, config.get_text_config()] if has_text else [config]


def _is_reversible(conversion: Any) -> bool:
    """Return whether a conversion of loading can be reversed."""
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True
