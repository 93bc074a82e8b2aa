"""Merge of a PEFT model into a plain model, with the error of the merge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from molf.core.arithmetic.precision import full_precision
from molf.core.model.adapted_layers import adapter_layers
from molf.core.model.linear_layers import check_not_tied
from molf.core.model.module_names import is_peft_model, unwrapped
from molf.core.model.quantised import (
    dequantised,
    drop_quantisation,
    is_quantised,
    kind_of,
    real_layer,
)
from molf.shown import counted

_BASES = ("dequantised", "original")


@dataclass
class MergeReport:
    """Errors of a merge.

    Attributes:
        layers: Number of merged layers.
        base: Base that replaced a quantised one: `"dequantised"` or `"original"`; else None.
        weight_error: Distance of the merged weights from `W + s B A` of the trained model, computed
            in float32, relative in Frobenius norm: the rounding of the stored weights and, for
            `"original"`, the error of the quantisation. By base; `"base"` if it is not quantised.
        logit_difference: Largest difference between the logits of the merged and the unmerged
            model on the sample, by base; empty without a sample.
        largest_logit: Largest absolute logit of the unmerged model, as a scale.
    """

    layers: int
    base: str | None
    weight_error: dict[str, float] = field(default_factory=dict)
    logit_difference: dict[str, float] = field(default_factory=dict)
    largest_logit: float | None = None

    def __str__(self) -> str:
        """Return one line for people."""
        into = f" into the {self.base} base" if self.base else ""
        text = f"Merged {counted(self.layers, 'layer')}{into}."
        if self.logit_difference:
            difference = self._shown("logit_difference")
            text += f" Largest logit difference from the unmerged model: {difference}"
            text += f" (largest logit: {self.largest_logit:.3g})."
        return text + f" Relative error of the weights: {self._shown('weight_error')}."

    def _shown(self, name: str) -> str:
        found: dict[str, float] = getattr(self, name)
        if self.base is None:
            return f"{found['base']:.2g}"
        return ", ".join(f"{value:.2g} ({base} base)" for base, value in found.items())


def merge(
    model: nn.Module,
    *,
    base: str | None = None,
    original: nn.Module | None = None,
    sample: Tensor | Mapping[str, Any] | None = None,
    report: Callable[[MergeReport], object] = print,
) -> Any:
    """Merge a PEFT model's active adapters into its base and return the plain model.

    Sums are computed in float32 (float64 for float64 weights) and rounded once to the dtype of the
    weight. Tied weights stay tied. The base model is changed in place and returned; a model without
    an adapter is returned unchanged. Frozen parameters stay frozen.

    A quantised base gets real weights: the dequantised numbers, beside which the adapter was
    trained, or the weights of `original`, the unquantised model. With `original` the report has the
    error of both.

    Args:
        model: A `PeftModel`, a transformers model with native adapters, or a plain model; wrappers
            (DDP, compile) are removed.
        base: `"dequantised"` or `"original"` for a quantised base, else None.
        original: The plain model before quantisation; it is not changed.
        sample: `input_ids` [batch, length], or a mapping of the model's inputs, for a comparison of
            the logits before and after.
        report: Called with a `MergeReport` if there is a sample or the base is quantised.

    Raises:
        ValueError: `base` is missing or does not apply; the adapter cannot be merged (not finite,
            on a tied weight, or not plain LoRA on a quantised layer); or `original` does not fit.
            The model is unchanged then. Or a merged weight overflows float16; earlier layers are
            merged then.
    """
    tuners = adapter_layers(model)
    if not tuners and not is_peft_model(model):
        return model
    inner = unwrapped(model)
    # Inside of `PeftModel`; a transformers model with native adapters has no such wrapper.
    plain = inner.get_submodule("base_model.model") if is_peft_model(inner) else inner
    tuners = adapter_layers(plain)
    quantised = {
        name.removesuffix(".base_layer"): module
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and is_quantised(module.weight)
    }
    _check(plain, tuners, quantised, base, original)
    made = MergeReport(sum(map(_has_active, tuners.values())), base)

    device = next(plain.parameters()).device.type
    # Full precision, so that TF32 does not add to the measured difference of the logits.
    with torch.no_grad(), full_precision([device]):
        before = _logits(model, sample)
        if before is not None:
            made.largest_logit = before.abs().max().item()
        # Before the quantised layers, which are replaced without PEFT.
        error = _merge_real([t for name, t in tuners.items() if name not in quantised])
        _unload(plain)
        if not quantised:
            made.weight_error["base"] = error.relative
            _measure(made, "base", plain, sample, before)
        # The chosen base last: its layers stay in the model.
        kinds = [base] if original is None else sorted(_BASES, key=lambda kind: kind == base)
        for kind in kinds if quantised else ():
            assert kind is not None
            error = _Error()
            for name, module in quantised.items():
                source = original.get_submodule(name) if original and kind == "original" else None
                _install(plain, name, module, source, tuners.get(name), error)
            made.weight_error[kind] = error.relative
            _measure(made, kind, plain, sample, before)
        if quantised:
            drop_quantisation(plain)
    if sample is not None or quantised:
        report(made)
    return plain


def _check(
    plain: nn.Module,
    tuners: dict[str, Any],
    quantised: dict[str, Any],
    base: str | None,
    original: nn.Module | None,
) -> None:
    """Refuse a merge that is not possible, before the model is changed.

    Raises:
        ValueError: With the first reason.
    """
    if not tuners:
        raise ValueError(
            "The model's PEFT adapter wraps no layer (prompt or prefix tuning): there is nothing "
            "to merge."
        )
    _check_options(quantised, base, original)
    for name, tuner in tuners.items():
        _check_adapter(name, tuner, on_quantised=name in quantised)
    if quantised:
        _check_others(plain, quantised)
    weights = [(name, _weight(name, tuner)) for name, tuner in tuners.items()]
    check_not_tied(plain, weights, use="merged")
    if original is not None:
        for name, module in quantised.items():
            _check_original(name, module, original)


def _check_options(quantised: dict[str, Any], base: str | None, original: nn.Module | None) -> None:
    if base not in (None, *_BASES):
        raise ValueError(f"Invalid base={base!r}. Must be one of {', '.join(_BASES)}, or None.")
    if quantised and base is None:
        kind = kind_of(next(iter(quantised.values())).weight)
        raise ValueError(
            f"The base is quantised ({kind}). Choose the weights to merge into: base='dequantised' "
            "(the numbers that the adapter was trained beside), or base='original' with "
            "original=the unquantised model."
        )
    for name, value in (("base", base), ("original", original)):
        if value is not None and not quantised:
            raise ValueError(f"Invalid {name}: the base is not quantised. Leave it out.")
    if base == "original" and original is None:
        raise ValueError("base='original' needs original=the plain model that was quantised.")


def _check_adapter(name: str, tuner: Any, *, on_quantised: bool) -> None:
    """Refuse a layer whose adapter cannot be merged."""
    if tuner.disable_adapters:
        raise ValueError(f"Layer {name}: its adapter is disabled. Enable it before merging.")
    values = [p for n, p in tuner.named_parameters() if not n.startswith("base_layer.")]
    # PEFT checks this while it merges, when other layers are changed already.
    if not all(bool(value.isfinite().all()) for value in values):
        raise ValueError(f"Layer {name}: its adapter is not finite; nothing was merged.")
    if on_quantised and not _is_plain_lora(tuner):
        raise ValueError(
            f"Layer {name}: only plain LoRA can be merged into a quantised layer, and its "
            f"adapter is {type(tuner).__name__} with a variant, a bias, or already merged."
        )


def _weight(name: str, tuner: Any) -> Tensor:
    """Return the weight of the layer below an adapter; refuse a layer without one."""
    layer = tuner.get_base_layer()
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    raise ValueError(
        f"Layer {name}: its base layer ({type(layer).__name__}) has no weight to merge into. "
        "PEFT's own merge_and_unload may support it."
    )


def _check_others(plain: nn.Module, quantised: dict[str, Any]) -> None:
    """Refuse a model with quantised weights outside linear layers.

    Raises:
        ValueError: For the first such weight.
    """
    known = {parameter for module in quantised.values() for parameter in module.parameters()}
    for name, parameter in plain.named_parameters():
        if parameter not in known and is_quantised(parameter):
            raise ValueError(
                f"{name} is quantised ({kind_of(parameter)}) and belongs to no linear layer: it "
                "cannot be given real weights."
            )


def _has_active(tuner: Any) -> bool:
    """Return whether this layer has an active adapter."""
    parts = [getattr(tuner, part, ()) for part in tuner.adapter_layer_names]
    return any(adapter in part for part in parts for adapter in tuner.active_adapters)


def _is_plain_lora(tuner: Any) -> bool:
    return (
        hasattr(tuner, "lora_A")
        and not tuner.merged_adapters
        and not any(name in tuner.lora_variant for name in tuner.active_adapters)
        and not any(tuner.lora_bias.get(name) for name in tuner.active_adapters)
    )


def _check_original(name: str, module: Any, original: nn.Module) -> None:
    try:
        source: Any = original.get_submodule(name)
    except AttributeError:
        raise ValueError(f"Invalid original: it has no layer {name}.") from None
    weight = getattr(source, "weight", None)
    if not isinstance(weight, Tensor) or is_quantised(weight):
        raise ValueError(f"Invalid original: its layer {name} is no linear layer of real weights.")
    sides = (module.out_features, module.in_features)
    if tuple(weight.shape) not in (sides, sides[::-1]):
        raise ValueError(
            f"Invalid original: layer {name} is {tuple(weight.shape)} there, {sides} in the model."
        )


class _Error:
    """Relative Frobenius distance, summed over layers."""

    def __init__(self) -> None:
        self.distance = self.size = 0.0

    def add(self, stored: Tensor, exact: Tensor) -> None:
        """Add one layer's weight.

        Raises:
            ValueError: The weight overflows its dtype.
        """
        if not bool(stored.isfinite().all()):
            raise ValueError(
                f"The merged weights overflow {stored.dtype}: load the base in float32."
            )
        self.distance += (stored.to(exact.dtype) - exact).square().sum().item()
        self.size += exact.square().sum().item()

    @property
    def relative(self) -> float:
        """Distance divided by size."""
        return (self.distance / self.size) ** 0.5 if self.size else 0.0


def _merge_real(tuners: list[Any]) -> _Error:
    """Merge layers with real weights by PEFT, each temporarily in float32."""
    error = _Error()
    for tuner in tuners:
        parameters = [p for p in tuner.parameters() if p.is_floating_point()]
        dtypes = {p: p.dtype for p in parameters if p.dtype.itemsize < 4}
        for parameter in dtypes:
            parameter.data = parameter.data.float()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already following adapters were merged")
            tuner.merge(safe_merge=True)
        exact = tuner.get_base_layer().weight.data
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
        error.add(tuner.get_base_layer().weight.data, exact)
    return error


def _unload(plain: Any) -> None:
    """Replace PEFT's layers by the base layers."""
    while tuners := adapter_layers(plain):  # an adapter may be inside a module that is saved whole
        for name, tuner in tuners.items():
            plain.set_submodule(name, tuner.get_base_layer())
    wrappers = {
        name: module
        for name, module in plain.named_modules()
        if hasattr(module, "unload_and_optionally_merge_module")
    }
    for name, wrapper in wrappers.items():  # trained copies of embeddings, norms, heads
        unloaded = wrapper.unload_and_optionally_merge_module(
            merge=True, safe_merge=True, adapter_names=None
        )
        plain.set_submodule(name, unloaded)
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    if getattr(plain, "_hf_peft_config_loaded", False):
        plain._hf_peft_config_loaded = False
    _untie_different_embeddings(plain)


def _untie_different_embeddings(plain: Any) -> None:
    """Set `tie_word_embeddings=False` if training made tied embeddings differ."""
    config: Any = getattr(plain, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    if not hasattr(plain, "get_output_embeddings"):
        return
    ends = [plain.get_input_embeddings(), plain.get_output_embeddings()]
    weights = [getattr(end, "weight", None) for end in ends]
    if all(isinstance(w, Tensor) for w in weights) and weights[0] is not weights[1]:
        config.tie_word_embeddings = False
        warnings.warn(
            "The adapter trained one of two tied embeddings, so they are no longer equal: the "
            "merged model has tie_word_embeddings=False.",
            stacklevel=4,
        )


def _install(
    plain: nn.Module,
    name: str,
    module: Any,
    source: Any | None,
    tuner: Any | None,
    error: _Error,
) -> None:
    """Replace a quantised layer by one with real weights and the merged adapter.

    Args:
        plain: The model.
        name: Name of the layer.
        module: The quantised layer.
        source: The layer with the original weight; None: dequantise.
        tuner: PEFT's layer with the adapter, if there is one.
        error: Sums the difference between stored and trained weights.
    """
    trained = dequantised(module)
    update = _update(tuner, trained) if tuner is not None else torch.zeros_like(trained)
    layer = real_layer(module, source, getattr(plain, "dtype", trained.dtype))
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()  # Conv1D
    start = trained if source is None else weight.to(trained.dtype)
    weight.copy_(start + update)
    error.add(weight, trained + update)
    plain.set_submodule(name, layer)


def _update(tuner: Any, like: Tensor) -> Tensor:
    """Return `s B A` of the active adapters of a plain LoRA layer, [out, in], as `like`."""
    total = torch.zeros_like(like)
    for adapter in tuner.active_adapters:
        if adapter in tuner.lora_A:
            A, B = (getattr(tuner, part)[adapter].weight.to(like) for part in ("lora_A", "lora_B"))
            total.addmm_(B, A, alpha=tuner.scaling[adapter])
    return total


def _logits(model: nn.Module, sample: Tensor | Mapping[str, Any] | None) -> Tensor | None:
    """Return the logits on the sample, in float32 or float64, on the CPU; without dropout."""
    # 4-bit layers stay in training mode: on CPUs, their product in eval mode is less precise.
    if sample is None:
        return None
    device = next(model.parameters()).device
    inputs = {"input_ids": sample} if isinstance(sample, Tensor) else dict(sample)
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    training = [module for module in model.modules() if module.training]
    model.eval()
    for module in model.modules():
        if type(getattr(module, "weight", None)).__name__ == "Params4bit":
            module.training = True
    try:
        with torch.no_grad():
            output = model(**inputs)
    finally:
        model.eval()
        for module in training:
            module.training = True
    logits = getattr(output, "logits", output)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()


def _measure(
    report: MergeReport,
    kind: str,
    plain: nn.Module,
    sample: Tensor | Mapping[str, Any] | None,
    before: Tensor | None,
) -> None:
    after = _logits(plain, sample)
    if after is not None and before is not None:
        report.logit_difference[kind] = (after - before).abs().max().item()
