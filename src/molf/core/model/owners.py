"""Check, in every step, that the model still has the optimizer's parameters."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from molf.core.model.module_names import unwrapped
from molf.core.storage.sharding import is_sharded

States = Mapping[Tensor, Mapping[str, Any]]

# Index of an expert within a numbered decoder layer.
_EXPERT = re.compile(r"(\.\d+\..*\.)\d+(\.|$)")


@dataclass(slots=True)
class _Place:
    """Module (weak reference) and attribute of a parameter.

    Attributes:
        module: Module.
        key: Attribute.
        parameter: Parameter at the time the optimizer was built; None once the group has another.
        shape: Its shape, as of the last change before the first step.
        is_watched: Whether it is checked; False after a harmless change.
        is_found: Whether a search of the model for the parameter, which had no gradient, found it.
    """

    # `parameter` is a strong reference: with a weak one `torch.utils.swap_tensors` would fail.

    module: weakref.ref[nn.Module]
    key: str
    parameter: Tensor | None
    shape: torch.Size
    is_watched: bool = True
    is_found: bool = False


class Owners:
    """Modules of the optimizer's parameters, by group and position.

    Args:
        model: The model; only weak references are kept.
        groups: Groups that were built for the model.
    """

    def __init__(self, model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
        # A wrapper (torch.compile) may be deleted before the model.
        self._model = weakref.ref(unwrapped(model))
        found: dict[Tensor, _Place] = {}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter not in found:
                    found[parameter] = _Place(weakref.ref(module), key, parameter, parameter.shape)
        self._places = [[found[parameter] for parameter in group["params"]] for group in groups]

    @property
    def model(self) -> nn.Module | None:
        """The model, without wrappers; None if it was deleted."""
        return self._model()

    def check(self, groups: Sequence[dict[str, Any]], states: States) -> None:
        """Refuse a step if model and groups no longer have the same parameters.

        Args:
            groups: Current groups of the optimizer.
            states: State of the optimizer.

        Raises:
            RuntimeError: With the name of the layer or parameter.
        """
        own: set[Tensor] | None = None
        # Not strict: groups that were added later do not belong to the model.
        for group, places in zip(groups, self._places, strict=False):
            parameters = group["params"]
            if group["layer"] is not None and len(parameters) != len(places):
                _refuse_shapes(group, parameters)
            parameter: Tensor
            for position, (parameter, place) in enumerate(zip(parameters, places, strict=False)):
                if not place.is_watched:
                    continue
                module = place.module()
                now = module._parameters.get(place.key) if module is not None else None
                if now is not parameter:
                    self._check_replaced(groups, group, position, place, now)
                elif parameter.shape != place.shape:
                    if states.get(parameter):
                        _refuse_resized(group, position, place.shape)
                    place.shape = parameter.shape
                elif parameter.grad is None and not place.is_found:
                    # The whole model is read, once per parameter and not more than once per step.
                    own = self._model_parameters() if own is None else own
                    place.is_found = self._model() is None or parameter in own
                    if not place.is_found:
                        _refuse_replaced(group, position)

    def _check_replaced(
        self,
        groups: Sequence[dict[str, Any]],
        group: dict[str, Any],
        position: int,
        place: _Place,
        now: Tensor | None,
    ) -> None:
        """Refuse a parameter that its module no longer has, unless that is harmless."""
        parameter: Tensor = group["params"][position]
        if is_sharded(parameter) and now is not None and not is_sharded(now):
            raise RuntimeError(
                f"{_named(group, position)} is gathered in the model, by a forward pass without a "
                "backward pass, so the next one would use old values. Call model.reshard() on the "
                "fully_shard module before step()."
            )
        if parameter is not place.parameter:  # a library replaced it in the group
            place.parameter = None
            if now is not None and now.shape != parameter.shape:
                _refuse_shapes(group, group["params"])
        elif now is None and place.module() is None and self._has_unknown_parameter(groups):
            _refuse_replaced(group, position)
        elif now is not None or not self._has(parameter):
            owners = [
                number for number, g in enumerate(groups) if any(now is p for p in g["params"])
            ]
            if not owners:
                _refuse_replaced(group, position)
            owner, was_there = groups[owners[0]], owners[0] < len(self._places)
            if was_there and (group["layer"] is not None or owner["layer"] is not None):
                _refuse_tied(group, position, owner)
        # Harmless: a master copy; or the parameter is elsewhere in the model (parametrize); or the
        # replacement was added to the optimizer, or is tied to another that is not routed.
        place.is_watched = False

    def _has(self, parameter: Tensor) -> bool:
        """Return whether the model has a parameter; True if the model was deleted."""
        return self._model() is None or parameter in self._model_parameters()

    def _model_parameters(self) -> set[Tensor]:
        """Return the model's parameters; none if it was deleted."""
        model = self._model()
        return set(model.parameters()) if model is not None else set()

    def _has_unknown_parameter(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether the model has a trainable parameter that is in no group."""
        model = self._model()
        known = {p for group in groups for p in group["params"]}
        return model is not None and any(
            own.requires_grad and own not in known for own in model.parameters()
        )

    def refuse_without_gradients(self, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse a first step in which other parameters have gradients and no routed layer has.

        Raises:
            RuntimeError: With the likely reason.
        """
        # If all layers are frozen, that may be on purpose, and they may be trained later: the
        # optimizer warns.
        layers = [group for group in groups if group["layer"] is not None]
        if not any(p.requires_grad for group in layers for p in group["params"]):
            return
        raise RuntimeError(
            f"None of the {len(layers)} routed layers has a gradient in the first step (first: "
            f"{layers[0]['layer']}), so nothing would be routed. "
            f"{self.why_without_gradient(layers)}"
        )

    def why_without_gradient(self, layers: Sequence[dict[str, Any]]) -> str:
        """Return the likely reason why layers have no gradient.

        Args:
            layers: Groups of routed layers without a gradient.
        """
        trained = [group for group in layers if any(p.requires_grad for p in group["params"])]
        if not trained:
            return (
                "They were frozen (requires_grad=False) after the optimizer was built, by an "
                "adapter for example. Add adapters first. Unfrozen layers are routed again."
            )
        if self._has_reentrant_checkpointing():
            return (
                "Most likely gradient checkpointing drops them: with use_reentrant=True a part "
                "whose input needs no gradient gets none. Use use_reentrant=False."
            )
        return (
            "Most likely the loss does not depend on them (a vision tower in training on text, "
            "BERT's pooler): put them into exclude_modules. detach, or gradient checkpointing with "
            "use_reentrant=True, may also stop gradients."
        )

    def _has_reentrant_checkpointing(self) -> bool:
        """Return whether a transformers model checkpoints with `use_reentrant=True`."""
        model = self._model()
        for module in model.modules() if model is not None else ():
            call = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(module, "gradient_checkpointing", False) and call is not None:
                return bool(getattr(call, "keywords", {}).get("use_reentrant", True))
        return False


def _named(group: dict[str, Any], position: int) -> str:
    name = group["param_names"][position] if "param_names" in group else f"[{position}]"
    return f"Parameter {name}" if group["layer"] is None else f"Layer {group['layer']}: {name}"


def _refuse_resized(group: dict[str, Any], position: int, before: torch.Size) -> NoReturn:
    raise RuntimeError(
        f"{_named(group, position)} had shape {tuple(before)} in the last step and has "
        f"{tuple(group['params'][position].shape)} now, which its state does not fit. Resize the "
        "model before the optimizer is built."
    )


def _refuse_replaced(group: dict[str, Any], position: int) -> NoReturn:
    raise RuntimeError(
        f"{_named(group, position)} was replaced in the model after the optimizer was built, so "
        "the optimizer has a tensor that the model no longer uses. Resize, load and convert the "
        "model before the optimizer is built, or change values in place (parameter.data.copy_)."
    )


def _refuse_tied(group: dict[str, Any], position: int, owner: dict[str, Any]) -> NoReturn:
    whose = "a parameter that is not routed"
    if owner["layer"] is not None:
        whose = f"layer {owner['layer']}"
    raise RuntimeError(
        f"{_named(group, position)} was replaced in the model after the optimizer was built, by "
        f"the tensor of {whose}: a gradient that sums two uses cannot be routed. Tie parameters "
        "first, and build the optimizer then; exclude_modules leaves tied layers out."
    )


def _refuse_shapes(group: dict[str, Any], parameters: Sequence[Tensor]) -> NoReturn:
    shapes = ", ".join(str(tuple(parameter.shape)) for parameter in parameters[:4])
    names = group.get("param_names", ("a tensor of another shape",))
    whose = f"Layer {group['layer']}" if group["layer"] is not None else "A group"
    raise RuntimeError(
        f"{whose}: the optimizer's group now holds tensors of shape {shapes} in place of "
        f"{', '.join(names[:4])}. The parameter groups were flattened or split, as by DeepSpeed's "
        "ZeRO and FSDP1, and a step needs rows of weights. Train with fully_shard (FSDP2), DDP or "
        "one process."
    )


def without_gradient(layers: Sequence[str], routed: Iterable[str]) -> list[str]:
    """Return the layers without a gradient, except experts of a mixture in use.

    Args:
        layers: Names of all routed layers.
        routed: Names of the layers with a gradient.
    """
    # Experts of a mixture may get no token in a step. If one of a decoder layer's experts has a
    # gradient, the others may get one in a later step.
    having = set(routed)
    places = {_EXPERT.sub(r"\1*\2", name) for name in having}
    return [
        name
        for name in layers
        if name not in having
        and not (_EXPERT.search(name) and _EXPERT.sub(r"\1*\2", name) in places)
    ]
