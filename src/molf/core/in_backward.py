"""Steps taken during the backward pass: a layer moves as soon as its gradient is complete.

The gradient is freed at once, so that no more than one layer's is alive at a time. One unit is one
routed layer (its weight, bias and adapter factors wait for each other), or one other parameter.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from molf.core.unit import Unit, UnitKey
from molf.core.warn import warn

_watchers: Any = WeakIdKeyDictionary()  # parameter: weak reference to the BackwardSteps it is with


class Stepper(Protocol):
    """The optimizer, as far as its hooks know it."""

    def _begin(self) -> None:
        """Called with the first gradient of a backward pass."""

    def _units(self, *, to_step: bool = True) -> Iterator[Unit]:
        """All units of the groups as they are now; `to_step` reads their hyper-parameters."""

    def _take_and_free(self, key: UnitKey) -> None:
        """Step a unit and free its gradients."""


class BackwardSteps:
    """Hooks on an optimizer's parameters that say when a unit's gradients are there.

    Neither the hooks nor this keep the optimizer alive; without it the hooks are gone. Shallow
    copies of an optimizer share this: the first that is alive takes the steps. Autograd calls hooks
    from one thread for every device; units take their turns.

    Args:
        optimizer: Whose parameters these are.
    """

    def __init__(self, optimizer: Stepper) -> None:
        self._optimizers = [weakref.ref(optimizer)]
        self._lost: Any = WeakIdKeyDictionary()  # parameter: weak reference to who has it now
        self._handles: list[RemovableHandle] = []
        self._watched: list[Tensor] = []
        self._ready: dict[UnitKey, set[int]] = {}
        self._taken: set[UnitKey] = set()
        # Held while a unit takes its step: that waits for its device, so other threads would run.
        self._turn = threading.RLock()
        weakref.finalize(self, _remove, self._handles).atexit = False

    @property
    def owner(self) -> Any:
        """The optimizer that takes the steps; None where none is alive."""
        alive = (optimizer() for optimizer in self._optimizers)
        return next((optimizer for optimizer in alive if optimizer is not None), None)

    def serves(self, optimizer: object) -> bool:
        """Whether an optimizer shares this."""
        return any(each() is optimizer for each in self._optimizers)

    def share(self, optimizer: Stepper) -> None:
        """Serve a shallow copy too."""
        self._optimizers.append(weakref.ref(optimizer))

    def leave(self, optimizer: Stepper) -> bool:
        """Forget an optimizer if another takes the steps; return whether that is so."""
        if self.owner is optimizer:
            return False
        self._optimizers = [each for each in self._optimizers if each() is not optimizer]
        return True

    @property
    def is_open(self) -> bool:
        """Whether a backward pass has begun since the last `close`."""
        return bool(self._ready)

    def watch(self) -> None:
        """Put hooks on the parameters that are in the groups now, where they are not already."""
        units = list(self._units())
        parameters = [p for unit in units for p in unit.parameters]
        if len(parameters) == len(self._watched) and all(
            new is old for new, old in zip(parameters, self._watched, strict=True)
        ):
            return
        self.unwatch()
        self._watched = parameters
        for parameter in parameters:
            _watchers[parameter] = weakref.ref(self)
        self._handles += [
            # Hooks live as long as their parameters, which may be longer than the optimizer.
            parameter.register_post_accumulate_grad_hook(
                partial(_on_gradient, weakref.ref(self), unit.key, unit.parameters)
            )
            for unit in units
            for parameter in unit.parameters
            if parameter.requires_grad
        ]

    def unwatch(self) -> None:
        """Take the hooks away."""
        _remove(self._handles)
        self._watched = []

    def lose(self, parameters: Iterable[Tensor], optimizer: object) -> None:
        """Leave parameters to another optimizer, for as long as it lives."""
        for parameter in parameters:
            self._lost[parameter] = weakref.ref(optimizer)
        self.unwatch()

    def finish(self) -> int:
        """End a backward pass: step the units with a gradient of which a part has got none.

        Returns:
            How many units have moved in it.
        """
        try:
            if not self.is_open:
                self._owner()._begin()
            for unit in list(self._units()):
                has_gradient = any(p.grad is not None for p in unit.parameters)
                if has_gradient and unit.key not in self._taken:
                    self._take(unit.key)
            moved = self.count()
        finally:
            self.close()
        self.watch()  # libraries may have swapped parameters
        return moved

    def close(self) -> None:
        """Forget the backward pass; the next gradient begins another."""
        self._ready.clear()
        self._taken.clear()

    def count(self) -> int:
        """How many units have moved in this backward pass."""
        return len(self._taken)

    def _owner(self) -> Stepper:
        optimizer: Stepper | None = self.owner
        assert optimizer is not None, "what holds this is an optimizer"
        return optimizer

    def _units(self) -> Iterator[Unit]:
        """The optimizer's units, as far as no other optimizer has them."""
        units = self._owner()._units(to_step=False)
        return (unit for unit in units if not self._has_lost(unit.parameters))

    def _has_lost(self, members: list[Tensor]) -> bool:
        """Whether another optimizer that is alive has one of these parameters."""
        return bool(self._lost) and any(self._lost.get(p, _nobody)() is not None for p in members)

    def _take(self, key: UnitKey) -> None:
        self._owner()._take_and_free(key)
        self._taken.add(key)

    def _on_gradient(self, key: UnitKey, members: list[Tensor], parameter: Tensor) -> None:
        try:
            if not self.is_open:
                self._owner()._begin()
            ready = self._ready.setdefault(key, set())
            if id(parameter) in ready:
                raise RuntimeError(
                    "A second gradient of a parameter before optimizer.step(): with "
                    "optimizer_in_backward=True the first has moved the weights already. Call "
                    "optimizer.step() after each backward pass and accumulate no gradients; under "
                    "gradient checkpointing, use use_reentrant=False; after a backward pass that "
                    "was interrupted, call optimizer.zero_grad()."
                )
            ready.add(id(parameter))
            if len(ready) == sum(member.requires_grad for member in members):
                with torch.no_grad():
                    self._take(key)
        except BaseException:
            self.close()
            raise


@torch._disable_dynamo
def _on_gradient(
    steps: weakref.ref[BackwardSteps], key: UnitKey, members: list[Tensor], parameter: Tensor
) -> None:
    """Tell what watches a parameter, if it and an optimizer are alive, of its gradient."""
    alive = steps()
    if alive is not None and alive.owner is not None:
        with alive._turn:
            alive._on_gradient(key, members, parameter)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def release(parameters: Iterable[Tensor], optimizer: object) -> None:
    """Take away the hooks of other optimizers that would step these parameters.

    Warns:
        UserWarning: There was one that is still alive: it takes no steps of its own any more.
    """
    found: dict[int, tuple[BackwardSteps, list[Tensor]]] = {}
    for parameter in parameters:
        steps = _watchers.get(parameter, _nobody)()
        if steps is not None and steps.owner is not None and not steps.serves(optimizer):
            found.setdefault(id(steps), (steps, []))[1].append(parameter)
    for steps, taken in found.values():
        steps.lose(taken, optimizer)
    if found:
        warn(
            "Another optimizer stepped these parameters in the backward pass "
            "(optimizer_in_backward=True); from now on this one has them. Delete the other."
        )


def _nobody() -> None:
    return None


def check_no_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a step that `torch.amp.GradScaler` asks for, with what it has left on the optimizer.

    It hands what it knows to optimizers with `_step_supports_amp_scaling`, as attributes that it
    deletes after the step.

    Raises:
        RuntimeError: With what to change.
    """
    left = [vars(optimizer).pop(name, None) for name in ("grad_scale", "found_inf")]
    if any(each is not None for each in left):
        raise RuntimeError(
            "torch.amp.GradScaler cannot be used with optimizer_in_backward=True: the layers have "
            "moved already, by gradients that were still scaled. Use bfloat16 autocast without a "
            "scaler, or leave optimizer_in_backward out, and begin again from a checkpoint."
        )


def check_no_float16(parameters: Iterable[Tensor]) -> None:
    """Refuse float16 parameters, whose gradients are scaled until the whole pass is over.

    Raises:
        ValueError: With what to change.
    """
    if any(parameter.dtype == torch.float16 for parameter in parameters):
        raise ValueError(
            "optimizer_in_backward=True with float16 weights is not possible: they need loss "
            "scaling, and a layer would move before its gradient is unscaled. Load the model in "
            "bfloat16 or float32."
        )
