"""GPU sizes, and what of them a training can use."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

# What the driver, the CUDA context, kernels' workspaces and the allocator's fragmentation may take.
# An allowance, not a measurement: they differ by card, driver and library.
_RESERVED = GIB
_FRAGMENTED = 0.05


@dataclass(frozen=True)
class Device:
    """A size of GPU, as cards are sold; GB are taken as GiB.

    Attributes:
        gib: Its memory.
    """

    gib: int

    @property
    def name(self) -> str:
        """Its name, such as `24 GB`."""
        return f"{self.gib} GB"

    @property
    def usable(self) -> int:
        """Bytes that tensors may take: less 1 GiB and 5%."""
        return int(self.gib * GIB * (1 - _FRAGMENTED)) - _RESERVED

    def fits(self, peak: int) -> bool:
        """Whether a training with this peak in bytes fits."""
        return peak <= self.usable


DEVICES = tuple(Device(gib) for gib in (24, 40, 80, 141))


def show_bytes(size: float) -> str:
    """A size for people: GiB from one GiB on, else MiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"
