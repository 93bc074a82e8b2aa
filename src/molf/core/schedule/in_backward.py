"""Steps in the backward pass: each unit is updated as soon as its gradients are complete.

Its gradients are freed at once, so that only one unit's gradients exist at a time.
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

from molf.core.step.unit import Unit, UnitKey
from molf.core.warn import warn

_watchers: Any = WeakIdKeyDictionary()  # parameter: weak reference to its BackwardSteps


class Stepper(Protocol):
    """Methods of the optimizer that the hooks call."""

    def _begin(self) -> None:
        """Reset the results of the last step; called at the first gradient of a backward pass."""

    def _units(self, *, to_step: bool = True) -> Iterator[Unit]:
        """Yield all units of the current groups; `to_step` converts their hyper-parameters."""

    def _take_and_free(self, key: UnitKey) -> None:
        """Step a unit and free its gradients."""


class BackwardSteps:
    """Hooks on an optimizer's parameters that step a unit once its gradients are complete.

    Only weak references to the optimizer are kept; the hooks are removed with it. Shallow copies of
    an optimizer share this object: the first that is alive takes the steps.

    Args:
        optimizer: Optimizer of the parameters.
    """

    def __init__(self, optimizer: Stepper) -> None:
        self._optimizers = [weakref.ref(optimizer)]
        self._skipped: Any = WeakIdKeyDictionary()  # parameter: weak reference to its optimizer
        self._handles: list[RemovableHandle] = []
        self._watched: list[tuple[Tensor, bool]] = []  # and whether it had a hook
        self._ready: dict[UnitKey, set[int]] = {}
        self._stepped: set[UnitKey] = set()
        # Autograd calls hooks from one thread per device. A step waits for its device and so lets
        # other threads run: units step one at a time.
        self._lock = threading.RLock()
        weakref.finalize(self, _remove, self._handles).atexit = False

    @property
    def owner(self) -> Any:
        """The optimizer that takes the steps; None where none is alive."""
        alive = (optimizer() for optimizer in self._optimizers)
        return next((optimizer for optimizer in alive if optimizer is not None), None)

    def is_of(self, optimizer: object) -> bool:
        """Return whether an optimizer shares this."""
        return any(each() is optimizer for each in self._optimizers)

    def add(self, optimizer: Stepper) -> None:
        """Add a shallow copy of the optimizer."""
        self._optimizers.append(weakref.ref(optimizer))

    def remove(self, optimizer: Stepper) -> bool:
        """Remove an optimizer if another takes the steps; return whether it was removed."""
        if self.owner is optimizer:
            return False
        self._optimizers = [each for each in self._optimizers if each() is not optimizer]
        return True

    @property
    def is_open(self) -> bool:
        """Whether a backward pass has begun since the last `close`."""
        return bool(self._ready)

    def watch(self) -> None:
        """Register hooks on the parameters of the current groups, unless they have them."""
        units = list(self._units())
        # A frozen parameter cannot have a hook: it gets one once it is unfrozen.
        found = [(p, p.requires_grad) for unit in units for p in unit.parameters]
        if len(found) == len(self._watched) and all(
            new[0] is old[0] and new[1] == old[1]
            for new, old in zip(found, self._watched, strict=True)
        ):
            return
        self.unwatch()
        self._watched = found
        for parameter, _ in found:
            _watchers[parameter] = weakref.ref(self)
        self._handles += [
            # A weak reference: parameters, and with them hooks, may outlive the optimizer.
            parameter.register_post_accumulate_grad_hook(
                partial(_on_gradient, weakref.ref(self), unit.key, unit.parameters)
            )
            for unit in units
            for parameter in unit.parameters
            if parameter.requires_grad
        ]

    def unwatch(self) -> None:
        """Remove the hooks."""
        _remove(self._handles)
        self._watched = []

    def skip(self, parameters: Iterable[Tensor], optimizer: object) -> None:
        """Skip these parameters for as long as another optimizer, which steps them, is alive."""
        for parameter in parameters:
            self._skipped[parameter] = weakref.ref(optimizer)
        self.unwatch()

    def finish(self) -> int:
        """End a backward pass: step the units that got only some of their gradients.

        Returns:
            Number of units that were updated in the pass.
        """
        try:
            if not self.is_open:
                self._owner()._begin()
            for unit in list(self._units()):
                has_gradient = any(p.grad is not None for p in unit.parameters)
                if has_gradient and unit.key not in self._stepped:
                    self._step(unit.key)
            moved = self.count()
        finally:
            self.close()
        self.watch()  # libraries may have swapped parameters
        return moved

    def close(self) -> None:
        """Reset; the next gradient starts a new backward pass."""
        self._ready.clear()
        self._stepped.clear()

    def count(self) -> int:
        """Return the number of units that were updated in this backward pass."""
        return len(self._stepped)

    def _owner(self) -> Stepper:
        optimizer: Stepper | None = self.owner
        assert optimizer is not None, "an optimizer that is alive holds this object"
        return optimizer

    def _units(self) -> Iterator[Unit]:
        """Yield the optimizer's units, without those that another optimizer has taken over."""
        units = self._owner()._units(to_step=False)
        return (unit for unit in units if not self._is_skipped(unit.parameters))

    def _is_skipped(self, parameters: list[Tensor]) -> bool:
        """Return whether another optimizer that is alive has one of these parameters."""
        if not self._skipped:
            return False
        return any(self._skipped.get(p, _dead)() is not None for p in parameters)

    def _step(self, key: UnitKey) -> None:
        self._owner()._take_and_free(key)
        self._stepped.add(key)

    def _on_gradient(self, key: UnitKey, members: list[Tensor], parameter: Tensor) -> None:
        try:
            if not self.is_open:
                self._owner()._begin()
            # By id: tensors compare elementwise.
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
            # A frozen bias of a layer gets no gradient.
            if len(ready) == sum(member.requires_grad for member in members):
                with torch.no_grad():
                    self._step(key)
        except BaseException:
            self.close()
            raise


@torch._disable_dynamo
def _on_gradient(
    steps: weakref.ref[BackwardSteps], key: UnitKey, members: list[Tensor], parameter: Tensor
) -> None:
    """Hook of a parameter: pass its gradient on, if the optimizer is alive."""
    alive = steps()
    if alive is not None and alive.owner is not None:
        with alive._lock:
            alive._on_gradient(key, members, parameter)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def release(parameters: Iterable[Tensor], optimizer: object) -> None:
    """Remove the hooks of other optimizers on these parameters.

    Warns:
        UserWarning: Such an optimizer is still alive; it no longer steps these parameters.
    """
    found: dict[int, tuple[BackwardSteps, list[Tensor]]] = {}
    for parameter in parameters:
        steps = _watchers.get(parameter, _dead)()
        if steps is not None and steps.owner is not None and not steps.is_of(optimizer):
            found.setdefault(id(steps), (steps, []))[1].append(parameter)
    for steps, taken in found.values():
        steps.skip(taken, optimizer)
    if found:
        warn(
            "Another optimizer stepped these parameters in the backward pass "
            "(optimizer_in_backward=True); from now on this one steps them. Delete the other."
        )


def _dead() -> None:
    """Stand for a weak reference whose object was deleted."""


def check_no_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a step that `torch.amp.GradScaler` calls.

    Raises:
        RuntimeError: With the remedy.
    """
    # GradScaler sets these attributes on optimizers with `_step_supports_amp_scaling` and deletes
    # them after the step.
    left = [vars(optimizer).pop(name, None) for name in ("grad_scale", "found_inf")]
    if any(each is not None for each in left):
        raise RuntimeError(
            "torch.amp.GradScaler cannot be used with optimizer_in_backward=True: the layers have "
            "moved already, by gradients that were still scaled. Use bfloat16 autocast without a "
            "scaler, or leave optimizer_in_backward out, and begin again from a checkpoint."
        )


def check_no_float16(parameters: Iterable[Tensor]) -> None:
    """Refuse trained float16 parameters, whose gradients are scaled until the pass is over.

    Raises:
        ValueError: With the remedy.
    """
    if any(p.requires_grad and p.dtype == torch.float16 for p in parameters):
        raise ValueError(
            "optimizer_in_backward=True with float16 weights is not possible: they need loss "
            "scaling, and a layer would move before its gradient is unscaled. Load the model in "
            "bfloat16 or float32."
        )
