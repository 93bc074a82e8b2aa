"""Put an assignment into a model: PEFT's adapter on its `lora` layers, and `requires_grad`."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from molf.core.assignment.assigned import FROZEN, FULL, LORA, AssignedLayer
from molf.core.assignment.assignment import Assignment
from molf.core.assignment.layout import Layout
from molf.core.model.adapted_layers import adapter_layers
from molf.core.model.coverage import coverage_of, warn_of_unrouted
from molf.core.model.linear_layers import check_not_tied
from molf.core.model.linear_places import Place, is_conv1d, linear_places
from molf.core.model.module_names import cleaner, is_peft_model
from molf.core.model.peft_model import add_adapter, exactly
from molf.core.model.quantised import is_quantised, keep_differentiable
from molf.core.model.weight_checks import (
    check_adaptable_weight,
    check_real_weight,
    check_whole_weight,
    sides_of,
)
from molf.core.model.wrappers import check_not_flattened, check_not_in_module
from molf.core.warn import warn
from molf.inputs import check_installed, is_number
from molf.shown import counted


def with_assignment(
    model: nn.Module,
    assignment: Assignment,
    *,
    freeze_rest: bool | None = None,
    use_rslora: bool | None = None,
    use_dora: bool = False,
    lora_dropout: float = 0.0,
    adapter_name: str = "default",
) -> Any:
    """Add the adapter of an assignment to a plain model, and set `requires_grad`.

    The weights of `full` layers are trained. `lora` layers get a PEFT adapter, each with its rank
    and alpha (`rank_pattern`, `alpha_pattern`), beside a frozen weight, which may be quantised.
    PEFT draws A from the process's generator, as `get_peft_model` does; B is zero. Other parameters
    keep their `requires_grad`, unless the rest is frozen or `frozen_rest` names them; biases of
    quantised layers are frozen.

    `save_pretrained` writes all trained parameters into the adapter's file: `full` weights and the
    rest too (`WholePeftModel`). So checkpoints of the Trainer are complete, and
    `PeftModel.from_pretrained(base, path)` loads the trained model.

    Args:
        model: A plain model; changed in place. DDP and other wrappers are put around the result.
        assignment: The assignment, for this model.
        freeze_rest: Replaces `assignment.freeze_rest`, if given.
        use_rslora: Replaces `assignment.use_rslora`, if given.
        use_dora: Whether `lora` layers also train a magnitude per output (DoRA).
        lora_dropout: Dropout before the factors, in [0, 1).
        adapter_name: Name of the adapter.

    Returns:
        A `peft.PeftModel`, whose base model is `model`; the plain model if no layer is `lora`.

    Raises:
        TypeError: `assignment` is no `Assignment`.
        ValueError: The model has other layers, or an adapter, or is in an attribute `module`; a
            layer cannot be trained as assigned (quantised and `full`; used without a call and
            `lora`; or it shares its weight with another layer); nothing is trained; or PEFT does
            not support a layer. The model is unchanged then.

    Warns:
        UserWarning: All layers are of one kind.
    """
    Assignment.expect(assignment)
    assignment = assignment.with_options(freeze_rest=freeze_rest, use_rslora=use_rslora)
    trained = assigned_parameters(model, assignment, use_dora=use_dora)
    if not (is_number(lora_dropout) and 0 <= lora_dropout < 1):
        raise ValueError(f"Invalid lora_dropout={lora_dropout!r}. Must be in [0, 1).")
    _warn_of_one_kind(assignment)
    keep_differentiable(model)
    adapted: Any = model
    if assignment.lora:
        adapted = _adapt(
            model, assignment, adapter_name, use_dora=use_dora, lora_dropout=lora_dropout
        )
    tuners = tuple(f"{name}." for name in adapter_layers(adapted))
    for name, parameter in adapted.named_parameters():
        if name.startswith(tuners) and ".base_layer." not in name:
            continue  # PEFT has set that of the adapter
        parameter.requires_grad_(parameter in trained)
    if assignment.lora:
        from molf.core.model.peft_saving import save_whole

        save_whole(adapted)
    return adapted


def assigned_parameters(
    model: nn.Module, assignment: Assignment, *, use_dora: bool = False
) -> set[nn.Parameter]:
    """Return the parameters of a plain model that an assignment trains; nothing is changed.

    Args:
        model: A plain model.
        assignment: The assignment.
        use_dora: As in `with_assignment`.

    Raises:
        ValueError: The model has other layers, or an adapter, or is in an attribute `module`; a
            layer cannot be trained as assigned (quantised and `full`; used without a call and
            `lora`; or it shares its weight with another layer); or nothing is trained.
    """
    if adapter_layers(model) or is_peft_model(model):
        raise ValueError(
            "The model has an adapter already: an assignment is for a plain model. Merge or remove "
            "the adapter first."
        )
    check_not_in_module(model)
    assignment.check(Layout.of(model))
    places = {place.name: place for place in linear_places(model)}
    for layer in assignment.entries:
        _check_layer(model, layer, places[layer.name], use_dora=use_dora)
    _check_ties(model, assignment, places)
    trained = _trained(model, assignment, places)
    if not trained and not assignment.lora:
        raise ValueError(
            "Nothing would be trained: all layers are frozen, and so is the rest. Make a layer "
            "full or lora, or leave freeze_rest out."
        )
    return trained


def rehearse_assignment(
    skeleton: nn.Module, assignment: Assignment, *, use_dora: bool = False
) -> None:
    """Put an assignment into a model without values, which is not usable afterwards.

    Args:
        skeleton: A plain model on the meta device.
        assignment: The assignment.
        use_dora: As in `with_assignment`.

    Raises:
        ValueError: As `with_assignment`.

    Warns:
        UserWarning: All layers are of one kind; or matrices are in no layer, such as fused experts.
    """
    with torch.device("meta"):
        model = with_assignment(skeleton, assignment, use_dora=use_dora)
    weights = {
        place.weight
        for place in linear_places(model)
        if place.name.removesuffix(".base_layer") in assignment.layers
    }
    coverage = coverage_of(
        model,
        [weight for weight in weights if isinstance(weight, Tensor)],
        len(assignment.entries),
        trains_rest=True,  # `requires_grad` is set
        uses_adapter=bool(assignment.lora),
        adapted=assignment.layers,
    )
    warn_of_unrouted(coverage, use="assigned")


def _check_layer(model: nn.Module, layer: AssignedLayer, place: Place, *, use_dora: bool) -> None:
    """Refuse a layer that cannot be trained as assigned.

    Raises:
        ValueError: With the layer's name and a remedy.
    """
    own, weight = f"Layer {layer.name}", place.weight
    if layer.train == FROZEN:
        return
    if not isinstance(weight, nn.Parameter):
        check_not_flattened(layer.name, model)
        raise ValueError(
            f"{own} computes its weight (a parametrization such as weight_norm), so it cannot be "
            f"{layer.train}. Make it frozen."
        )
    if layer.train == LORA:
        if place.is_bypassed:
            raise ValueError(
                f"{own} cannot be lora: the model uses its weight without calling the layer, so an "
                "adapter would have no effect. Make it full or frozen."
            )
        check_adaptable_weight(layer.name, weight, sides_of(place.module))
        if use_dora and is_quantised(weight):
            raise ValueError(
                f"{own} is quantised, and use_dora=True: its magnitudes are the norms of weights, "
                "and cannot be merged into quantised ones. Leave use_dora out."
            )
        return
    if is_quantised(weight):
        raise ValueError(
            f"{own} is quantised and cannot be full: that trains real weights. Make it lora or "
            "frozen, or load it unquantised (llm_int8_skip_modules of BitsAndBytesConfig)."
        )
    check_real_weight(layer.name, weight)
    check_whole_weight(layer.name, weight, sides_of(place.module))


def _check_ties(model: nn.Module, assignment: Assignment, places: dict[str, Place]) -> None:
    """Refuse layers with a common weight that are not trained alike.

    Raises:
        ValueError: For the first such layer.
    """
    weights: list[tuple[str, Tensor]] = []
    owners: dict[Tensor, AssignedLayer] = {}
    for layer in assignment.entries:
        weight = places[layer.name].weight
        if not isinstance(weight, Tensor):
            continue
        if layer.train == LORA:
            weights.append((layer.name, weight))
        other = owners.setdefault(weight, layer)
        if other.train != layer.train:
            raise ValueError(
                f"Layer {layer.name} shares its weight with {other.name}: one cannot be "
                f"{layer.train} and the other {other.train}. Make both full or both frozen."
            )
    check_not_tied(model, weights, use="assigned")
    clean = cleaner(model)
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, parameter in _all_named(model):
        names[parameter].append(clean(name))
    own = {places[layer.name].parameter_names[0] for layer in assignment.entries}
    for layer in assignment.full:
        place = places[layer.name]
        assert isinstance(place.weight, Tensor)
        others = [x for x in names[place.weight] if x not in own]
        if others:
            raise ValueError(
                f"Layer {layer.name} is full and shares its weight with {others[0]}, which belongs "
                "to the rest. Leave the layer out: its weight is trained with the rest."
            )


def _trained(
    model: nn.Module, assignment: Assignment, places: dict[str, Place]
) -> set[nn.Parameter]:
    """Return the parameters of the plain model that are trained.

    Raises:
        ValueError: The weight of a `full` layer, a head, is among `frozen_rest` too.
    """
    by_weight = {places[layer.name].weight: layer for layer in assignment.entries}
    fixed = set(assignment.frozen_rest)
    # A tied parameter is frozen if one of its names is.
    clean = cleaner(model)
    still = {parameter for name, parameter in _all_named(model) if clean(name) in fixed}
    for place in places.values():
        # bitsandbytes rounds the biases of its layers for good when they are used.
        if isinstance(place.weight, Tensor) and is_quantised(place.weight):
            still |= {place.bias} if isinstance(place.bias, nn.Parameter) else set()
    trained = set()
    for parameter in model.parameters():
        if parameter in by_weight:
            layer = by_weight[parameter]
            is_trained = layer.train == FULL
            if is_trained and parameter in still:
                raise ValueError(
                    f"Layer {layer.name} is full, and its weight is frozen by its name as a "
                    "parameter. Leave one of the two out."
                )
        else:
            is_trained = (
                parameter.requires_grad and not assignment.freeze_rest and parameter not in still
            )
        if is_trained:
            trained.add(parameter)
    return trained


def _all_named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter under all its names."""
    return model.named_parameters(remove_duplicate=False)


def _warn_of_one_kind(assignment: Assignment) -> None:
    """Warn of an assignment that is another method."""
    kinds = {layer.train for layer in assignment.entries}
    if len(kinds) > 1:
        return
    freezes = assignment.freeze_rest
    meaning = {
        FULL: f"this is full fine-tuning {'with the rest frozen' if freezes else '(method fft)'}",
        LORA: f"this is LoRA {'(method lora)' if freezes else 'with the rest trained'}",
        FROZEN: "only norms, embeddings, biases and other parameters are trained",
    }
    (kind,) = kinds
    warn(f"All {counted(len(assignment.entries), 'layer')} are {kind}: {meaning[kind]}.")


def _adapt(
    model: nn.Module,
    assignment: Assignment,
    adapter_name: str,
    *,
    use_dora: bool,
    lora_dropout: float,
) -> Any:
    """Add the adapter; on an error the layers are as before."""
    check_installed("peft", "An assignment with LoRA layers")
    from peft import LoraConfig

    layers = assignment.lora
    (rank, alpha), _ = Counter((layer.r, layer.alpha) for layer in layers).most_common(1)[0]
    places = {place.name: place.module for place in linear_places(model)}
    clean = cleaner(model)
    raw = {clean(name): name for name, _ in model.named_modules()}
    ranks = {exactly(x.name, raw[x.name]): x.r for x in layers if x.r != rank}
    alphas = {exactly(x.name, raw[x.name]): x.alpha for x in layers if x.alpha != alpha}

    def make_config(**chosen: Any) -> LoraConfig:
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_rslora=assignment.use_rslora,
            use_dora=use_dora,
            lora_dropout=lora_dropout,
            fan_in_fan_out=all(is_conv1d(places[layer.name]) for layer in layers),
            **chosen,
        )

    names = [layer.name for layer in layers]
    with warnings.catch_warnings():
        # PEFT detects GPT-2's weights, stored as [in, out], per layer and warns of each change.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        remedy = "make unsupported ones full or frozen"
        adapted = add_adapter(model, names, make_config, adapter_name, remedy=remedy)
    clean = cleaner(adapted)
    found = {clean(name) for name in adapter_layers(adapted)}
    if found != set(names):
        # PEFT applies names of the experts of some mixtures in transformers 4 to fused ones.
        lost = [name for name in names if name not in found]
        raise ValueError(
            f"PEFT would adapt the fused experts of the model in the place of {len(lost)} layers "
            f"with names of theirs (first: {lost[0]}), and they cannot be merged. Make these "
            "layers full or frozen, and load the model again: its layers have changed."
        )
    return adapted
