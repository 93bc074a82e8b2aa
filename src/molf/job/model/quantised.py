"""Check and load a frozen quantised base: stored quantised, or quantised when it is loaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from molf.core.model.linear_layers import head_name
from molf.core.model.quantised import (
    Quantisation,
    is_quantised,
    keep_differentiable,
    quantisation_of,
)
from molf.errors import InputError, reason_of
from molf.inputs import check_installed
from molf.job.model.config import place_of, read_config
from molf.job.settings.quantised_base import check_beside_quantised
from molf.job.settings.resolved import ResolvedSettings
from molf.planning.model_class import auto_class, make_skeleton

_QUANTISED_WHEN_LOADED = {
    "load_in_4bit": Quantisation("bitsandbytes", "4-bit", is_adaptable=True),
    "load_in_8bit": Quantisation("bitsandbytes", "8-bit", is_adaptable=True),
}


def check_quantisation(config: Any, settings: ResolvedSettings) -> Quantisation | None:
    """Return the quantisation of the base in training, after checking that it is supported.

    Args:
        config: The base's configuration.
        settings: The run's settings.

    Raises:
        InputError: The method or an option excludes it.

    Warns:
        UserWarning: An option has no effect on it.
    """
    stored, option = quantisation_of(config), settings.quantised
    if stored is None:
        if option is None and settings.merge_base is not None:
            warnings.warn(
                f"Without effect: merge_base={settings.merge_base}. {settings.model} is not "
                "quantised.",
                stacklevel=2,
            )
        return None if option is None else _QUANTISED_WHEN_LOADED[option]
    model = f"model {settings.model} (stored quantised: {stored})"
    check_beside_quantised(settings, model, "give the unquantised model")
    if not stored.is_adaptable:
        raise InputError(
            f"Invalid {model}: molf trains no adapter beside such weights. Give the unquantised "
            "model, or one quantised by bitsandbytes (4-bit, 8-bit) or torchao "
            "(Int8WeightOnlyConfig)."
        )
    check_library(stored, settings.model)
    if option is not None and _QUANTISED_WHEN_LOADED[option] != stored:
        raise InputError(
            f"Invalid {option} with {model}. Leave {option} out, or give the unquantised model."
        )
    if option is not None:
        warnings.warn(
            f"Without effect: {option}. {settings.model} is stored in {stored.bits} bits already.",
            stacklevel=2,
        )
    if settings.merge_base == "original":
        raise InputError(
            f"Invalid merge_base=original with {model}: it has no original weights. Leave "
            "merge_base out, or give the unquantised model with --load_in_4bit or --load_in_8bit."
        )
    return stored


def check_library(stored: Quantisation, model: str) -> None:
    """Check that the library that reads a stored quantised model is installed.

    Raises:
        InputError: It is not installed; the message names the extra.
    """
    # Only adaptable methods have an extra; transformers names the library of others.
    if stored.is_adaptable:
        check_installed(stored.method, f"model {model} (stored quantised: {stored})")


def check_stored(stored: Quantisation, tensors: Collection[str], model: str) -> None:
    """Check that a checkpoint with a bitsandbytes configuration has quantised tensors.

    Args:
        stored: The quantisation in its configuration.
        tensors: Names of the tensors in its files.
        model: The checkpoint, for messages.

    Raises:
        InputError: None of its weights is quantised.
    """
    # Parts of the names of tensors that bitsandbytes stores beside a quantised weight.
    marks = {"4-bit": ".quant_state.", "8-bit": ".SCB"}
    if stored.method != "bitsandbytes" or any(marks[stored.kind] in name for name in tensors):
        return
    option = "load_in_4bit" if stored.bits == 4 else "load_in_8bit"
    raise InputError(
        f"model {model}: its config.json declares quantised weights ({stored}), but its files "
        "have none. Remove quantization_config from config.json; to quantise the base for a "
        f"training, give --{option}."
    )


def check_device(quantisation: Quantisation | None, device: torch.device) -> None:
    """Try a small layer quantised by bitsandbytes on the device of the training.

    Raises:
        InputError: It does not work there.
    """
    if quantisation is None or quantisation.method != "bitsandbytes":
        return
    import bitsandbytes

    try:
        if quantisation.bits == 4:
            layer: torch.nn.Module = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
        else:
            layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        # `.item()` waits for the device, which reports errors of kernels late.
        layer.to(device)(torch.ones(2, 64, device=device)).sum().item()
    except Exception as error:  # a missing or broken backend raises errors of many types
        raise InputError(
            f"{quantisation} layers do not work on {device} with this bitsandbytes: "
            f"{reason_of(error)}"
        ) from error


def load_quantised(
    name: str,
    option: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    unquantised: Sequence[str] = (),
) -> Any:
    """Load a model with quantised linear layers; its head is not quantised.

    Args:
        name: A directory or a Hub id.
        option: `load_in_4bit` (NF4 without double quantisation) or `load_in_8bit`.
        device: The device to load it on.
        dtype: Type of all parameters that are not quantised.
        unquantised: Names of linear layers that are not quantised.
    """
    config = read_config(name)
    skipped: list[str] | None = None
    if unquantised:
        # With a list of its own, transformers does not add the head.
        with torch.device("meta"):
            head = head_name(make_skeleton(config))
        skipped = [f"^{re.escape(layer)}$" for layer in (*unquantised, *filter(None, [head]))]
    quantisation = BitsAndBytesConfig(
        **{option: True},
        bnb_4bit_quant_type="nf4",  # has no effect on 8-bit weights
        llm_int8_skip_modules=skipped,
    )
    model = auto_class(config).from_pretrained(
        place_of(name),
        quantization_config=quantisation,
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=False,
        use_safetensors=True,
    )
    prepare_quantised(model, torch.float32)
    return model


def prepare_stored(model: Any, dtype: torch.dtype) -> None:
    """Convert the parameters that are not quantised to a type."""
    # transformers leaves some of them in their stored type.
    for parameter in model.parameters():
        if not is_quantised(parameter):
            parameter.data = parameter.data.to(dtype)
    prepare_quantised(model, dtype)


def prepare_quantised(model: Any, dtype: torch.dtype) -> None:
    """Set the type that 4-bit layers compute in, and keep the model differentiable."""
    keep_differentiable(model)
    # A checkpoint may request float16, in which training overflows.
    for layer in model.modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = dtype


class Precision:
    """The type that quantised layers compute in during training; autocast does not affect them.

    Args:
        model: The loaded model.
        bf16: Whether to compute in bfloat16.
    """

    def __init__(self, model: torch.nn.Module, *, bf16: bool) -> None:
        self._model = model
        # bitsandbytes rounds biases to that type permanently, so they are copied for the merge.
        self._layers: list[Any] = [
            module
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and is_quantised(module.weight)
        ]
        self._biases = [None if x.bias is None else x.bias.data.clone() for x in self._layers]
        if bf16:
            prepare_quantised(model, torch.bfloat16)

    def restore(self) -> None:
        """Restore the biases, and compute in float32 from now on."""
        for layer, bias in zip(self._layers, self._biases, strict=True):
            if bias is not None:
                layer.bias.data = bias.to(layer.bias.device)
        prepare_quantised(self._model, torch.float32)
