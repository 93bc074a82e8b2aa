"""Optimizer state in host memory; each layer's state is on the device only for its own step.

While one layer steps, the next layer's state is copied to the device and the previous one's back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

States = dict[Tensor, dict[str, Any]]
Wait = Callable[[], None]


class Carrier(ABC):
    """Copies tensors between host memory and one device, possibly asynchronously."""

    @abstractmethod
    def room(self, like: Tensor) -> Tensor:
        """Allocate a tensor in host memory, of the same shape, strides and dtype."""

    @abstractmethod
    def fetch(self, kept: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        """Start to copy tensors from host memory to new tensors on the device.

        Returns:
            The copies, and a function that makes later device work wait for them. Call it before
            the copies are used.
        """

    @abstractmethod
    def put_back(self, copies: Sequence[Tensor], kept: Sequence[Tensor]) -> Wait:
        """Start to copy `copies` into `kept`, after the device work that is queued so far.

        Returns:
            A function that makes the host wait for the copy. Call it before `copies` is freed or
            `kept` is read.
        """

    @abstractmethod
    def wait(self) -> None:
        """Make the host wait for all queued device work."""


class CudaCarrier(Carrier):
    """Copies through pinned memory, with one CUDA stream per direction."""

    # Device copies are allocated on the inbound stream and freed after the host has waited for the
    # copy back. All their uses are over then, so `record_stream` is not needed; it would return the
    # memory later and raise the peak.

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inbound = torch.cuda.Stream(device)
        self._outbound = torch.cuda.Stream(device)

    def room(self, like: Tensor) -> Tensor:
        """Allocate pinned memory; only from there copies overlap with kernels."""
        return torch.empty_like(like, device="cpu", pin_memory=True)

    def fetch(self, kept: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        """Copy on the inbound stream; the current stream waits for it."""
        with torch.cuda.stream(self._inbound):
            copies = [torch.empty_like(tensor, device=self._device) for tensor in kept]
            for copy, tensor in zip(copies, kept, strict=True):
                copy.copy_(tensor, non_blocking=tensor.is_pinned())
            arrived = self._inbound.record_event()
        return copies, lambda: torch.cuda.current_stream(self._device).wait_event(arrived)

    def put_back(self, copies: Sequence[Tensor], kept: Sequence[Tensor]) -> Wait:
        """Copy on the outbound stream, after the work of the current stream."""
        # The step writes the copies on the current stream.
        self._outbound.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outbound):
            for copy, tensor in zip(copies, kept, strict=True):
                tensor.copy_(copy, non_blocking=tensor.is_pinned())
            returned = self._outbound.record_event()
        return returned.synchronize

    def wait(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize(self._device)


def cuda_carrier(device: torch.device) -> Carrier | None:
    """Return the carrier of a device; None for other devices than CUDA, whose states stay."""
    return CudaCarrier(device) if device.type == "cuda" else None


CarrierOf = Callable[[torch.device], Carrier | None]


class _DeviceStates:
    """Device copies of the states of some parameters.

    Attributes:
        parameters: The parameters.
        states: Their states, with tensors on the device.
    """

    def __init__(self, parameters: Sequence[Tensor], carriers: Sequence[Carrier | None]) -> None:
        self.parameters = tuple(parameters)
        self.states: States = defaultdict(dict)
        self._carriers = dict(zip(parameters, carriers, strict=True))
        self._waits: list[Wait] = []

    def is_for(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether these are the states of these parameters, in this order."""
        return list(map(id, self.parameters)) == list(map(id, parameters))

    def fetch(self, states: States) -> None:
        """Start to copy the states to the device; `wait` before they are used."""
        for parameter, carrier in self._carriers.items():
            if parameter not in states:
                continue
            own = states[parameter]
            if carrier is None:
                self.states[parameter] = own
                continue
            kept = _tensors(own)
            copies, wait = carrier.fetch(list(kept.values()))
            self.states[parameter] = {**own, **dict(zip(kept, copies, strict=True))}
            self._waits.append(wait)

    def put_back(self, states: States) -> None:
        """Start to copy the states back, new tensors included; `wait` before they are freed."""
        for parameter, state in self.states.items():
            carrier = self._carriers[parameter]
            if not state:
                continue
            if carrier is None:
                states[parameter] = state
                continue
            own, tensors = states[parameter], _tensors(state)
            kept = {
                key: own[key] if isinstance(own.get(key), Tensor) else carrier.room(tensor)
                for key, tensor in tensors.items()
            }
            self._waits.append(carrier.put_back(list(tensors.values()), list(kept.values())))
            # Numbers, such as the step count, are copied at once.
            own.update({**state, **kept})

    def wait(self) -> None:
        """Wait for the copies: the device for inbound ones, the host for outbound ones."""
        for wait in self._waits:
            wait()
        self._waits.clear()

    def abandon(self) -> None:
        """Wait for all device work, so that the copies can be freed."""
        for carrier in self._carriers.values():
            if carrier is not None:
                carrier.wait()


class StateOffload:
    """Keeps states in host memory; each layer's are on the device for its step.

    At most three layers' states are on the device: one in use, one inbound, one outbound.

    Args:
        carrier_of: Returns the carrier of a device, or None if states stay there; `cuda_carrier`
            if not given.
    """

    def __init__(self, carrier_of: CarrierOf | None = None) -> None:
        self._make = carrier_of or cuda_carrier
        self._carriers: dict[torch.device, Carrier | None] = {}
        self._inbound: _DeviceStates | None = None
        self._outbound: deque[_DeviceStates] = deque()  # oldest first
        self._order: list[tuple[Tensor, ...]] = []  # of the units of this step
        self._followers: dict[Tensor, tuple[Tensor, ...]] = {}  # next unit, by the last step

    def moves(self, parameter: Tensor) -> bool:
        """Return whether the parameter's state is kept in host memory."""
        return self._carrier(parameter) is not None

    @contextmanager
    def on_device(self, states: States, parameters: Sequence[Tensor]) -> Iterator[States]:
        """Copy the states of a unit's parameters to the device; after the block, copy all back.

        If the block raises, the states in host memory stay unchanged.

        Args:
            states: All states, in host memory.
            parameters: Parameters of the unit.
        """
        self._order.append(tuple(parameters))
        copied, self._inbound = self._inbound, None
        if copied is None or not copied.is_for(parameters):
            copied = self._fetch(states, parameters)
        copied.wait()
        follower = self._followers.get(parameters[0])
        # A state in use is not prefetched: this step changes it.
        if follower is not None and not _overlap(follower, parameters):
            self._inbound = self._fetch(states, follower)
        try:
            yield copied.states
        except BaseException:
            copied.abandon()
            self.finish()
            raise
        # Before `put_back`: if that fails, `finish` still waits for the copies that have started.
        self._outbound.append(copied)
        copied.put_back(states)

    def finish(self) -> None:
        """Wait until all states are back in host memory."""
        self._inbound = None
        while self._outbound:
            self._await_oldest()

    def end_step(self) -> None:
        """Wait as `finish` does; the next step prefetches in the order of this step."""
        self.finish()
        if self._order:
            pairs = zip(self._order, self._order[1:], strict=False)
            self._followers = {first[0]: second for first, second in pairs}
        self._order = []

    def forget_order(self) -> None:
        """Prefetch nothing in the next step, whose order may differ."""
        self._followers, self._order = {}, []

    def keep(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return a copy of a state tensor in the memory that keeps the parameter's state."""
        carrier = self._carrier(parameter)
        if carrier is None:
            return tensor.to(parameter.device, copy=True)
        return carrier.room(tensor).copy_(tensor)

    def room(self, parameter: Tensor, like: Tensor) -> Tensor:
        """Allocate a tensor in host memory, of the shape, strides and dtype of `like`."""
        carrier = self._carrier(parameter)
        assert carrier is not None, "only states that move have room here"
        return carrier.room(like)

    def keep_all(self, states: States) -> None:
        """Move all states to the memory that keeps them, after a copy or unpickling."""
        for parameter, state in states.items():
            for key, tensor in _tensors(state).items():
                state[key] = self.keep(parameter, tensor)

    def _carrier(self, parameter: Tensor) -> Carrier | None:
        # One per device: streams belong to a device.
        device = parameter.device
        if device not in self._carriers:
            self._carriers[device] = self._make(device)
        return self._carriers[device]

    def _fetch(self, states: States, parameters: Sequence[Tensor]) -> _DeviceStates:
        """Start to copy states to the device."""
        # First, so that at most three layers are on the device, and no state is read too early.
        while len(self._outbound) > 1 or any(
            _overlap(earlier.parameters, parameters) for earlier in self._outbound
        ):
            self._await_oldest()
        copied = _DeviceStates(parameters, [self._carrier(parameter) for parameter in parameters])
        copied.fetch(states)
        return copied

    def _await_oldest(self) -> None:
        """Wait for the oldest copy to the host."""
        # Removed after the wait: an interrupted wait can be repeated.
        self._outbound[0].wait()
        self._outbound.popleft()


def _overlap(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return not set(some).isdisjoint(others)


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
