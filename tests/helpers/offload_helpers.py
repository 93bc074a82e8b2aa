"""A carrier between two memories of a CPU that is as late, and as unforgiving, as is allowed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from molf.core.storage import offload
from molf.core.storage.offload import Carrier, CarrierOf


@contextmanager
def carried_by(carrier_of: CarrierOf) -> Iterator[None]:
    """Replace the carrier of optimizers that are built inside."""
    before, offload.cuda_carrier = offload.cuda_carrier, carrier_of
    try:
        yield
    finally:
        offload.cuda_carrier = before


class LateCarrier(Carrier):
    """Copies when it is waited for and not before; what must not be used is garbage.

    Attributes:
        log: What was asked for, in order: "fetch", "arrive", "put back", "return".
        now: Bytes of tensors that stand for tensors on the device and are alive.
        peak: The most that `now` has been.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = self.peak = 0
        self._host: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self._lent: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is in host memory."""
        return any(tensor is own for own in self._host)

    def room(self, like: Tensor) -> Tensor:
        made = _garbage(torch.empty_like(like, device="cpu"))
        self._host.add(made)
        return made

    def fetch(self, kept: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        self.log.append("fetch")
        assert all(self.holds(tensor) for tensor in kept)
        before = [_bits(tensor) for tensor in kept]
        lent = [_garbage(torch.empty_like(tensor)) for tensor in kept]
        for tensor in lent:
            self._count(tensor)

        def arrive() -> None:
            self.log.append("arrive")
            for copy, tensor, bits in zip(lent, kept, before, strict=True):
                assert torch.equal(_bits(tensor), bits), "changed while it was being fetched"
                copy.copy_(tensor)

        return lent, arrive

    def put_back(self, lent: Sequence[Tensor], kept: Sequence[Tensor]) -> Callable[[], None]:
        self.log.append("put back")
        assert all(self.holds(tensor) for tensor in kept)
        assert not any(self.holds(tensor) for tensor in lent)
        left = [_bits(tensor) for tensor in lent]
        for tensor in kept:
            _garbage(tensor)

        def arrive() -> None:
            self.log.append("return")
            for copy, tensor, bits in zip(lent, kept, left, strict=True):
                assert torch.equal(_bits(copy), bits), "changed, or freed, on its way back"
                tensor.copy_(copy)
                _garbage(copy)

        return arrive

    def wait(self) -> None:
        self.log.append("wait")

    def _count(self, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self.now -= size

        weakref.finalize(tensor, freed)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _garbage(tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    return tensor.fill_(77)
