"""States in host memory, as a plan sees them: there, and counted on the device while lent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molf.core.offload import Carrier, Wait


def pinned_bytes(tensor: Tensor) -> int:
    """What torch allocates for a tensor in pinned memory: a power of two."""
    size = tensor.untyped_storage().nbytes()
    return 1 << (size - 1).bit_length() if size else 0


class PlannedCarrier(Carrier):
    """Moves nothing: host memory is the meta device, which is not counted."""

    def room(self, like: Tensor) -> Tensor:
        """Of the same size."""
        return torch.empty_like(like, device="meta")

    def fetch(self, kept: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        """What the copies take."""
        return [torch.empty_like(tensor, device="cpu") for tensor in kept], _at_once

    def put_back(self, lent: Sequence[Tensor], kept: Sequence[Tensor]) -> Wait:
        """Nothing; `lent` is alive until it is waited for."""
        return _at_once

    def wait(self) -> None:
        """There is nothing to wait for."""


def _at_once() -> None:
    pass
