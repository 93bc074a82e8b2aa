"""Where the optimizer's state lives: in host memory, and on the device only while it is used.

`StateOffload.lent` gives a layer's state as tensors on the device, for the length of one step of
that layer; nothing else of the optimizer knows where state lives. Meanwhile the state of the layer
that came next in the last step is on its way to the device, and that of the layer before on its way
back. What moves tensors is a `Carrier`.
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
    """Moves tensors between host memory and one device, perhaps while both do other things."""

    @abstractmethod
    def room(self, like: Tensor) -> Tensor:
        """Make a tensor in host memory, of the same shape, strides and dtype."""

    @abstractmethod
    def fetch(self, kept: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        """Begin to copy tensors from host memory to new ones on the device.

        Returns:
            The copies, and what makes the work that is given to the device afterwards wait for
            them; before that they must not be used.
        """

    @abstractmethod
    def put_back(self, lent: Sequence[Tensor], kept: Sequence[Tensor]) -> Wait:
        """Begin to copy what the work given to the device so far leaves in `lent` into `kept`.

        Returns:
            What makes the host wait until it is there. Before that `lent` must not be freed, and
            `kept` not be read.
        """

    @abstractmethod
    def wait(self) -> None:
        """Make the host wait for all that the device has been given."""


class CudaCarrier(Carrier):
    """Pinned memory, a stream for each direction, and events.

    Copies are allocated for the inbound stream and freed when the host has seen that they were
    copied back. All use of them is over by then, so that their memory may be used again at once;
    it needs no `record_stream`, whose memory would come back later and so be more.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inbound = torch.cuda.Stream(device)
        self._outbound = torch.cuda.Stream(device)

    def room(self, like: Tensor) -> Tensor:
        """Pinned: only then do copies run beside computations."""
        return torch.empty_like(like, device="cpu", pin_memory=True)

    def fetch(self, kept: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        """On the inbound stream; the stream that is current at the time of waiting waits."""
        with torch.cuda.stream(self._inbound):
            lent = [torch.empty_like(tensor, device=self._device) for tensor in kept]
            for copy, tensor in zip(lent, kept, strict=True):
                copy.copy_(tensor, non_blocking=tensor.is_pinned())
            arrived = self._inbound.record_event()
        return lent, lambda: torch.cuda.current_stream(self._device).wait_event(arrived)

    def put_back(self, lent: Sequence[Tensor], kept: Sequence[Tensor]) -> Wait:
        """On the outbound stream, after the work of the current one."""
        self._outbound.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outbound):
            for copy, tensor in zip(lent, kept, strict=True):
                tensor.copy_(copy, non_blocking=tensor.is_pinned())
            returned = self._outbound.record_event()
        return returned.synchronize

    def wait(self) -> None:
        """All streams."""
        torch.cuda.synchronize(self._device)


def cuda_carrier(device: torch.device) -> Carrier | None:
    """Return the carrier of a device; None for other devices than CUDA, whose states stay."""
    return CudaCarrier(device) if device.type == "cuda" else None


CarrierOf = Callable[[torch.device], Carrier | None]


class _Loan:
    """States of some parameters while they are on the device, or on their way there or back.

    Attributes:
        parameters: Whose states they are.
        states: By parameter, with tensors on the device.
    """

    def __init__(self, parameters: Sequence[Tensor], carriers: Sequence[Carrier | None]) -> None:
        self.parameters = tuple(parameters)
        self.states: States = defaultdict(dict)
        self._carriers = dict(zip(parameters, carriers, strict=True))
        self._waits: list[Wait] = []

    def is_for(self, parameters: Sequence[Tensor]) -> bool:
        """Whether they are these parameters', in this order."""
        return list(map(id, self.parameters)) == list(map(id, parameters))

    def fetch(self, states: States) -> None:
        """Begin to bring them; `wait` before they are used."""
        for parameter, carrier in self._carriers.items():
            if parameter not in states:
                continue
            own = states[parameter]
            if carrier is None:
                self.states[parameter] = own
                continue
            kept = _tensors(own)
            lent, wait = carrier.fetch(list(kept.values()))
            self.states[parameter] = {**own, **dict(zip(kept, lent, strict=True))}
            self._waits.append(wait)

    def put_back(self, states: States) -> None:
        """Begin to put them back, new tensors too; `wait` before they are used or freed."""
        for parameter, lent in self.states.items():
            carrier = self._carriers[parameter]
            if not lent:
                continue
            if carrier is None:
                states[parameter] = lent
                continue
            own, tensors = states[parameter], _tensors(lent)
            kept = {
                key: own[key] if isinstance(own.get(key), Tensor) else carrier.room(tensor)
                for key, tensor in tensors.items()
            }
            self._waits.append(carrier.put_back(list(tensors.values()), list(kept.values())))
            own.update({**lent, **kept})

    def wait(self) -> None:
        """Wait for what has begun: the device for what comes, the host for what goes back."""
        for wait in self._waits:
            wait()
        self._waits.clear()

    def abandon(self) -> None:
        """Make sure that nothing needs them any more."""
        for carrier in self._carriers.values():
            if carrier is not None:
                carrier.wait()


class StateOffload:
    """Keeps states in host memory and lends them to the device, layer by layer.

    No more than three neighbouring layers' states are on the device: one is used, one comes, one
    goes back.

    Args:
        carrier_of: Returns the carrier of a device, or None if states stay there; `cuda_carrier`
            if not given.
    """

    def __init__(self, carrier_of: CarrierOf | None = None) -> None:
        self._make = carrier_of or cuda_carrier
        self._carriers: dict[torch.device, Carrier | None] = {}
        self._coming: _Loan | None = None
        self._going: deque[_Loan] = deque()  # the oldest first
        self._order: list[tuple[Tensor, ...]] = []  # of the loans in this step
        self._followers: dict[Tensor, tuple[Tensor, ...]] = {}  # as in the last step

    def moves(self, parameter: Tensor) -> bool:
        """Whether the parameter's state lives elsewhere than the parameter."""
        return self._carrier(parameter) is not None

    @contextmanager
    def lent(self, states: States, parameters: Sequence[Tensor]) -> Iterator[States]:
        """Lend the states of some parameters, made there if there are none; changes are kept.

        Where the block raises, the states in host memory stay as they were.

        Args:
            states: All states, as they live.
            parameters: What takes a step together.
        """
        self._order.append(tuple(parameters))
        loan, self._coming = self._coming, None
        if loan is None or not loan.is_for(parameters):
            loan = self._fetch(states, parameters)
        loan.wait()
        follower = self._followers.get(parameters[0])
        # What is in use cannot be fetched ahead: it is about to change.
        if follower is not None and not _overlap(follower, parameters):
            self._coming = self._fetch(states, follower)
        try:
            yield loan.states
        except BaseException:
            loan.abandon()
            self.finish()
            raise
        self._going.append(loan)  # first: where putting back fails, what has begun is waited for
        loan.put_back(states)

    def finish(self) -> None:
        """Wait until all states are in host memory, and none is on the device."""
        self._coming = None
        while self._going:
            self._await_oldest()

    def end_step(self) -> None:
        """As `finish`; the next step is expected to borrow in the order of this one, if any."""
        self.finish()
        if self._order:
            pairs = zip(self._order, self._order[1:], strict=False)
            self._followers = {first[0]: second for first, second in pairs}
        self._order = []

    def forget_order(self) -> None:
        """Expect nothing of the next step: it may borrow in another order than the last."""
        self._followers, self._order = {}, []

    def keep(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor of the parameter's state, where that state lives."""
        carrier = self._carrier(parameter)
        if carrier is None:
            return tensor.to(parameter.device, copy=True)
        return carrier.room(tensor).copy_(tensor)

    def keep_all(self, states: States) -> None:
        """Have all states where they live: after copying or unpickling an optimizer."""
        for parameter, state in states.items():
            for key, tensor in _tensors(state).items():
                state[key] = self.keep(parameter, tensor)

    def _carrier(self, parameter: Tensor) -> Carrier | None:
        device = parameter.device
        if device not in self._carriers:
            self._carriers[device] = self._make(device)
        return self._carriers[device]

    def _fetch(self, states: States, parameters: Sequence[Tensor]) -> _Loan:
        """Begin to bring states; first, all but one of those that go have to be back."""
        while len(self._going) > 1 or any(_overlap(g.parameters, parameters) for g in self._going):
            self._await_oldest()
        loan = _Loan(parameters, [self._carrier(parameter) for parameter in parameters])
        loan.fetch(states)
        return loan

    def _await_oldest(self) -> None:
        """Wait for the first of those that go; interrupted, it is still there to be waited for."""
        self._going[0].wait()
        self._going.popleft()


def _overlap(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return not set(some).isdisjoint(others)


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
