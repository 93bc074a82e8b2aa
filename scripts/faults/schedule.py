"""Faults in the backward pass, in state offload, and in the order in which a step does things."""

# mypy: allow-untyped-defs

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from faults.planting import fault


@contextmanager
def replaced(one: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another method for a while."""
    setattr(one, name, value)
    try:
        yield
    finally:
        delattr(one, name)


def is_called_by(name: str) -> bool:
    """Whether the function that asks was called by a function of this name."""
    return sys._getframe(2).f_code.co_name == name


# -- the backward pass --------------------------------------------------------------------------


@fault("what one step requires holds for the next", "test_nonfinite.py", "UnitOptimizer._take")
def _(take):
    def kept(self, units):
        required = self._required
        try:
            return take(self, units)
        finally:
            self._required = required

    return kept


@fault("zero_grad forgets what the next step requires", "test_nonfinite.py",
       "UnitOptimizer.zero_grad")  # fmt: skip
def _(zero_grad):
    def forgets(self, set_to_none=True):
        zero_grad(self, set_to_none)
        self._required = {}

    return forgets


@fault("in the backward pass, layers do not wait for their bias", "test_in_backward.py",
       "BackwardSteps._on_gradient")  # fmt: skip
def _(on_gradient):
    return lambda self, key, members, parameter: on_gradient(self, key, [parameter], parameter)


@fault("in the backward pass, a step that raises leaves the pass open", "test_in_backward.py",
       "BackwardSteps.finish")  # fmt: skip
def _(finish):
    def left_open(self):
        with replaced(self, "close", lambda: None):
            moved = finish(self)
        self.close()
        return moved

    return left_open


@fault("hooks keep the optimizer alive", "test_in_backward.py", "BackwardSteps.__init__",
       "BackwardSteps.watch")  # fmt: skip
def _(init, watch):
    def strong(self, optimizer):
        init(self, optimizer)
        self._optimizers = [lambda: optimizer]

    def watch_strongly(self):
        watch(self)
        for parameter, _ in self._watched:
            parameter._kept_by_hook = self

    return strong, watch_strongly


@fault("several processes are asked about in the constructor alone", "test_in_backward.py",
       "UnitOptimizer._begin")  # fmt: skip
def _(begin):
    def unasked(self):
        with replaced(self, "_check_processes", lambda: None):
            begin(self)

    return unasked


@fault("in the backward pass, gradients are kept", "test_in_backward.py", "Unit.free_gradients")
def _(free):
    return lambda self: None


@fault("in the backward pass, the threads of several devices step at once", "test_in_backward.py",
       "_on_gradient")  # fmt: skip
def _(on_gradient):
    def at_once(steps: weakref.ref, key, members, parameter):
        alive = steps()
        if alive is not None and alive.owner is not None:
            alive._on_gradient(key, members, parameter)

    return at_once


# -- state offload ------------------------------------------------------------------------------


@fault("an offloaded state is fetched ahead while it is used", "test_offload.py", "_overlap")
def _(overlap):
    def unseen(some, others):
        return not is_called_by("on_device") and overlap(some, others)

    return unseen


@fault("offloaded states stay on the device where zero_grad ends the backward pass",
       "test_offload.py", "UnitOptimizer.zero_grad")  # fmt: skip
def _(zero_grad):
    def left(self, set_to_none=True):
        with replaced(self, "_end_step", lambda: None):
            zero_grad(self, set_to_none)

    return left


@fault(
    "a bad gradient leaves offloaded states on their way", "test_offload.py", "UnitOptimizer._take"
)
def _(take):
    def on_their_way(self, units):
        with replaced(self, "_settled_state", lambda: self.state):
            return take(self, units)

    return on_their_way


@fault("an offloaded state is fetched while it is on its way back", "test_offload.py",
       "StateOffload.finish")  # fmt: skip
def _(finish):
    def all_but_one(self):
        self._inbound = None
        while len(self._outbound) > 1:
            self._await_oldest()

    return all_but_one


@fault("an offloaded state is used before it has come", "test_offload.py", "_DeviceStates.wait")
def _(wait):
    return lambda self: None if is_called_by("on_device") else wait(self)


@fault("an offloaded state never leaves the device", "test_offload.py", "_DeviceStates.put_back")
def _(put_back):
    def kept(self, states):
        put_back(self, states)
        for parameter, lent in self.states.items():
            if lent:
                states[parameter].update(lent)

    return kept


@fault("offloaded layers move before all gradients are checked", "test_offload.py",
       "bad_gradients")  # fmt: skip
def _(bad_gradients):
    return lambda gradients, squares: []


@fault("offloaded layers are checked without their factors", "test_offload.py", "bad_gradients")
def _(bad_gradients):
    def alone(gradients, squares):
        return bad_gradients((one._replace(scale=1.0, factors=()) for one in gradients), squares)

    return alone
