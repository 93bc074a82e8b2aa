"""Whether the parameters of an optimizer are still those of the model that it was built from."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from molf.core.module_names import unwrapped

States = Mapping[Tensor, Mapping[str, Any]]

# The number of an element in a list that is itself in a numbered element.
_EXPERT = re.compile(r"(\.\d+\..*\.)\d+(\.|$)")


@dataclass(slots=True)
class _Place:
    """Where the model keeps a parameter; no module is kept alive from here.

    Attributes:
        module: The module.
        key: The attribute.
        parameter: The parameter that was there when the optimizer was built; None once the group
            has another. A weak reference would keep `torch.utils.swap_tensors` from changing it.
        shape: Its shape then, or when it was changed before the first step.
        is_watched: Whether it is looked at; not any more once a change was found harmless.
        is_found: Whether it was looked for in the model, for want of a gradient, and found.
    """

    module: weakref.ref[nn.Module]
    key: str
    parameter: Tensor | None
    shape: torch.Size
    is_watched: bool = True
    is_found: bool = False


class Owners:
    """Where a model keeps the parameters of an optimizer's groups, by group and position.

    Args:
        model: The model; neither it nor its modules are kept alive.
        groups: The optimizer's groups, as they were built for the model.
    """

    def __init__(self, model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
        # A wrapper (torch.compile) may be gone before the model.
        self._model = weakref.ref(unwrapped(model))
        found: dict[Tensor, _Place] = {}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter not in found:
                    found[parameter] = _Place(weakref.ref(module), key, parameter, parameter.shape)
        self._places = [[found[parameter] for parameter in group["params"]] for group in groups]

    def check(self, groups: Sequence[dict[str, Any]], states: States) -> None:
        """Refuse a step where model and groups no longer have the same parameters.

        Costs a look at some attributes per parameter. A parameter that lacks a gradient for the
        first time is looked for in the whole model, once.

        Args:
            groups: The optimizer's groups as they are now.
            states: The optimizer's state.

        Raises:
            RuntimeError: With the layer's or the parameter's name.
        """
        # `zip` cuts: groups that were added later are no concern of the model's.
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
                    self._judge(groups, group, position, place, now)
                elif parameter.shape != place.shape:
                    if states.get(parameter):
                        _refuse_resized(group, position, place.shape)
                    place.shape = parameter.shape
                elif parameter.grad is None and not place.is_found:
                    place.is_found = self._has(parameter)
                    if not place.is_found:
                        _refuse_replaced(group, position)

    def _judge(
        self,
        groups: Sequence[dict[str, Any]],
        group: dict[str, Any],
        position: int,
        place: _Place,
        now: Tensor | None,
    ) -> None:
        """Refuse a parameter that is not the one of its module, unless that is harmless."""
        parameter: Tensor = group["params"][position]
        if parameter is not place.parameter:  # something has swapped the group's
            place.parameter = None
            if now is not None and now.shape != parameter.shape:
                _refuse_shapes(group, group["params"])
        elif now is None and place.module() is None and self._has_stranger(groups):
            _refuse_replaced(group, position)
        elif now is not None or not self._has(parameter):
            owners = [number for number, g in enumerate(groups) if _is_among(now, g["params"])]
            if not owners:
                _refuse_replaced(group, position)
            owner, was_there = groups[owners[0]], owners[0] < len(self._places)
            if was_there and (group["layer"] is not None or owner["layer"] is not None):
                _refuse_tied(group, position, owner)
        # Else a master copy; or it has moved within the model, as by torch.nn.utils.parametrize; or
        # the new one was added to the optimizer, or tied to another that is not routed.
        place.is_watched = False

    def _has(self, parameter: Tensor) -> bool:
        """Whether the model has a parameter; also where the model is gone and nobody can tell."""
        model = self._model()
        return model is None or any(one is parameter for one in model.parameters())

    def _has_stranger(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the model has a parameter to be trained that is in no group."""
        model = self._model()
        known = {p for group in groups for p in group["params"]}
        return model is not None and any(
            one.requires_grad and one not in known for one in model.parameters()
        )

    def refuse_without_gradients(self, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse a first step in which no routed layer has a gradient, though others have.

        Layers that were all frozen on purpose may be trained later: they are only warned of.

        Raises:
            RuntimeError: With the likely reason.
        """
        layers = [group for group in groups if group["layer"] is not None]
        if not any(p.requires_grad for group in layers for p in group["params"]):
            return
        raise RuntimeError(
            f"None of the {len(layers)} routed layers has a gradient in the first step (first: "
            f"{layers[0]['layer']}), so nothing would be routed. "
            f"{self.why_without_gradient(layers)}"
        )

    def why_without_gradient(self, layers: Sequence[dict[str, Any]]) -> str:
        """Say why layers have no gradient, the likely reason first.

        Args:
            layers: Groups of routed layers that have none.
        """
        trained = [group for group in layers if any(p.requires_grad for p in group["params"])]
        if not trained:
            return (
                "They were frozen (requires_grad=False) after the optimizer was built: by an "
                "adapter, say, which is to be put on first. Unfrozen layers are routed again."
            )
        if self._has_reentrant_checkpointing():
            return (
                "Most likely gradient checkpointing has cut them: with use_reentrant=True a part "
                "whose input is frozen gets none. Use use_reentrant=False."
            )
        return (
            "Most likely the loss does not depend on them, as a text does not use a vision tower "
            "and most losses do not use BERT's pooler: exclude_modules leaves them out. Gradients "
            "may also be cut, by detach or by gradient checkpointing with use_reentrant=True."
        )

    def _has_reentrant_checkpointing(self) -> bool:
        """Whether a transformers model checkpoints with `use_reentrant=True`."""
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
        "model first, and build the optimizer then."
    )


def _refuse_replaced(group: dict[str, Any], position: int) -> NoReturn:
    raise RuntimeError(
        f"{_named(group, position)} was replaced in the model after the optimizer was built, so "
        "the optimizer has a tensor that the model no longer uses. Resize, load and convert the "
        "model first, and build the optimizer then; or change values in place "
        "(parameter.data.copy_)."
    )


def _is_among(tensor: Tensor | None, others: Sequence[Tensor]) -> bool:
    return any(other is tensor for other in others)


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
        f"{', '.join(names[:4])}. Something has flattened or split the parameter groups, as "
        "DeepSpeed's ZeRO and FSDP1 do, and a step needs whole weights. Train with DDP or one "
        "process."
    )


def without_gradient(layers: Sequence[str], routed: Iterable[str]) -> list[str]:
    """Return those layers that have no gradient in a step and perhaps never will.

    The experts of a mixture in a decoder layer do not all get tokens in every step: where one of
    them has a gradient, the others may have one in a later step.

    Args:
        layers: Names of all routed layers.
        routed: Names of those with a gradient.
    """
    having = set(routed)
    places = {_EXPERT.sub(r"\1*\2", name) for name in having}
    return [
        name
        for name in layers
        if name not in having
        and not (_EXPERT.search(name) and _EXPERT.sub(r"\1*\2", name) in places)
    ]
