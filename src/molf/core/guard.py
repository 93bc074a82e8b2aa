"""The guard against infinity and NaN: one sum per gradient, found before any state is written."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from molf.core.adam import MomentDecay, compute_dtype, gradient, sum_dtype


class FiniteGuard:
    """Knows, on the devices, whether every gradient of a step is finite.

    Attributes:
        gradient_sums: One sum per gradient, on the first parameter's device. Infinity and NaN
            survive a sum, so the sums tell, once the host reads them, which gradients are bad.
        refuses: Whether the host knows already that the step must not happen.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        home = parameters[0].device
        totals = [_finite_sum(parameter).to(home) for parameter in parameters]
        self.gradient_sums = torch.stack(totals)
        self._finite = {home: self.gradient_sums.isfinite().all()}
        # A number in the host's own memory is read at no cost: there it is known beforehand.
        self._is_known = all(reads_for_nothing(p.device) for p in parameters)
        self.refuses = self._is_known and not self._finite[home].item()
        self._made: dict[Any, MomentDecay] = {}

    def decay_of(
        self, device: torch.device, dtype: torch.dtype, betas: tuple[float, float]
    ) -> MomentDecay:
        """Return how moments on a device, computed in a dtype, move."""
        key = (device, dtype, tuple(betas))
        if key not in self._made:
            finite = self._finite.setdefault(device, next(iter(self._finite.values())).to(device))
            self._made[key] = MomentDecay.of(
                betas, finite, dtype, is_known_finite=self._is_known and not self.refuses
            )
        return self._made[key]


def nonfinite_gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Return the parameters whose gradient has infinity or NaN; the host waits for the device."""
    sums = FiniteGuard(parameters).gradient_sums.tolist()
    return [p for p, total in zip(parameters, sums, strict=True) if not math.isfinite(total)]


def reads_for_nothing(device: torch.device) -> bool:
    """Whether the host reads a tensor on this device without waiting."""
    return device.type == "cpu"


def _finite_sum(parameter: Tensor) -> Tensor:
    """Sum a gradient in float32 or better: infinity and NaN survive a sum. 0-dim."""
    grad = plain_gradient(parameter)
    return grad.sum(dtype=compute_dtype(parameter)).to(sum_dtype(grad.device))


def plain_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one.

    Raises:
        RuntimeError: It is sparse or sharded.
    """
    grad = gradient(parameter)
    if grad.layout != torch.strided:
        raise RuntimeError("MoLFAdamW does not support sparse gradients.")
    if hasattr(grad, "device_mesh"):
        raise RuntimeError("MoLFAdamW does not support sharded parameters (DTensor) yet.")
    return grad
