"""GPU sizes and their usable memory."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

# An allowance for driver, CUDA context, workspaces of kernels, and fragmentation of the allocator.
# Not measured: they differ by card, driver and library.
_RESERVED = GIB
_FRAGMENTED = 0.05


@dataclass(frozen=True)
class Device:
    """A GPU of a size that cards are sold in; GB are taken as GiB.

    Attributes:
        gib: Its memory in GiB.
    """

    gib: int

    @property
    def name(self) -> str:
        """The name, such as `24 GB`."""
        return f"{self.gib} GB"

    @property
    def usable(self) -> int:
        """Bytes available for tensors: 95% of the memory, minus 1 GiB."""
        return int(self.gib * GIB * (1 - _FRAGMENTED)) - _RESERVED

    def fits(self, peak: int) -> bool:
        """Return whether a training with this peak in bytes fits."""
        return peak <= self.usable


# RTX 3090/4090, A100 40 GB, A100/H100 80 GB, H200.
DEVICES = tuple(Device(gib) for gib in (24, 40, 80, 141))
