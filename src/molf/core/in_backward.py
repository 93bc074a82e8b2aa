"""Steps taken during the backward pass: a layer moves as soon as its gradient is complete.

The gradient is freed at once, so that no more than one layer's is alive at a time. One unit is one
routed layer (its weight, bias and adapter factors wait for each other), or one other parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

Unit = tuple[int, ...]
"""Number of a parameter group and, where it is not routed, a parameter's position in it."""


class BackwardSteps:
    """Hooks on an optimizer's parameters that say when a unit's gradients are there.

    Args:
        groups: The optimizer's parameter groups, as they are at each time.
        begin: Called with the first gradient of a backward pass.
        take: Steps a unit and frees its gradients.
    """

    def __init__(
        self,
        groups: Callable[[], list[dict[str, Any]]],
        begin: Callable[[], None],
        take: Callable[[Unit], None],
    ) -> None:
        self._groups, self._begin, self._take = groups, begin, take
        self._handles: list[RemovableHandle] = []
        self._watched: list[Tensor] = []
        self._ready: dict[Unit, set[int]] = {}
        self._taken: set[Unit] = set()

    @property
    def is_open(self) -> bool:
        """Whether a backward pass has begun since the last `close`."""
        return bool(self._ready)

    def watch(self) -> None:
        """Put hooks on the parameters that are in the groups now, where they are not already."""
        parameters = [p for group in self._groups() for p in group["params"]]
        if len(parameters) == len(self._watched) and all(
            new is old for new, old in zip(parameters, self._watched, strict=True)
        ):
            return
        for handle in self._handles:
            handle.remove()
        self._watched = parameters
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(unit, members))
            for unit, members in self._units()
            for parameter in members
            if parameter.requires_grad
        ]

    def close(self) -> None:
        """End a backward pass; the next gradient begins another."""
        self._ready.clear()
        self._taken.clear()

    def left(self) -> Iterator[Unit]:
        """Units with a gradient that have not moved, because a part of them got none."""
        for unit, members in self._units():
            if unit not in self._taken and any(p.grad is not None for p in members):
                yield unit

    def count(self) -> int:
        """How many units have moved in this backward pass."""
        return len(self._taken)

    def _units(self) -> Iterator[tuple[Unit, list[Tensor]]]:
        for number, group in enumerate(self._groups()):
            if group["layer"] is not None:
                yield (number,), group["params"]
            else:
                for position, parameter in enumerate(group["params"]):
                    yield (number, position), [parameter]

    def _hook(self, unit: Unit, members: list[Tensor]) -> Callable[[Tensor], None]:
        def on_gradient(parameter: Tensor) -> None:
            if not self.is_open:
                self._begin()
            ready = self._ready.setdefault(unit, set())
            if id(parameter) in ready:
                self.close()
                raise RuntimeError(
                    "A second gradient of a parameter before optimizer.step(): with "
                    "optimizer_in_backward=True the first has moved the weights already. Call "
                    "optimizer.step() after each backward pass and accumulate no gradients; under "
                    "gradient checkpointing, use use_reentrant=False."
                )
            ready.add(id(parameter))
            if len(ready) < sum(member.requires_grad for member in members):
                return
            self._taken.add(unit)
            try:
                with torch.no_grad():
                    self._take(unit)
            except BaseException:
                self.close()
                raise

        return on_gradient


def check_in_backward(nonfinite: str, grad_accumulation_dtype: str | None) -> None:
    """Refuse what steps in the backward pass cannot do.

    Raises:
        ValueError: With what to change.
    """
    if nonfinite == "skip":
        raise ValueError(
            "nonfinite='skip' is not possible with optimizer_in_backward=True: when a bad gradient "
            "is found, other layers have moved already. Use nonfinite='raise'."
        )
    if grad_accumulation_dtype is not None:
        raise ValueError(
            "grad_accumulation_dtype with optimizer_in_backward=True has nothing to accumulate: a "
            "layer moves after each backward pass. Leave one of them out."
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
        if world_size > 1:
            raise ValueError(
                f"optimizer_in_backward=True with {world_size} processes is not possible: a layer "
                "would move before its gradients are summed over them."
            )
