"""Offloaded state in a plan: counted only while its copies are on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molf.core.storage.offload import Carrier, Wait


def pinned_bytes(tensor: Tensor) -> int:
    """Return the bytes that torch allocates for a tensor in pinned memory: a power of two."""
    size = tensor.untyped_storage().nbytes()
    # torch's caching allocator of pinned memory rounds sizes up.
    return 1 << (size - 1).bit_length() if size else 0


class PlannedCarrier(Carrier):
    """A carrier that copies nothing; the meta device, which is not counted, is its host memory."""

    def room(self, like: Tensor) -> Tensor:
        """Return a tensor of the same size in host memory."""
        return torch.empty_like(like, device="meta")

    def fetch(self, kept: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        """Return device tensors of the sizes of the copies."""
        return [torch.empty_like(tensor, device="cpu") for tensor in kept], _at_once

    def put_back(self, copies: Sequence[Tensor], kept: Sequence[Tensor]) -> Wait:
        """Copy nothing; the caller keeps `copies` alive until it waits."""
        return _at_once

    def wait(self) -> None:
        """Return at once; no copy is pending."""


def _at_once() -> None:
    pass
