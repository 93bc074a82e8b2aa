"""The guard of a step: every moment that follows from its gradients fits its dtype.

A gradient with infinity or NaN must not reach the state, and neither must a finite one whose square
overflows: a second moment of infinity never comes back, and the parameter would stand still for
good. The gradients of LoRA factors, `s B^T G` and `s G A^T`, are made of G later and layer by
layer; what they can be at most, `s ||A|| ||G||` and `s ||B|| ||G||`, is known from norms. So one
number per gradient says, before anything is written, whether the step may happen. The loss, or
another number that must be finite, is one number more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.core.adam import MomentDecay, compute_dtype, gradient
from molf.core.devices import CanRead, is_host_memory, upload
from molf.core.place import WHOLE, Place


class NonFiniteError(RuntimeError):
    """A step was refused, because a gradient or the loss is not finite; nothing was written."""


class Guarded(NamedTuple):
    """A gradient that a step uses, and what is made of it.

    Attributes:
        parameter: It has the gradient.
        scale: The gradient is also multiplied by this.
        factors: And by these matrices, one at a time.
    """

    parameter: Tensor
    scale: float = 1.0
    factors: tuple[Tensor, ...] = ()


Squares = Callable[[Iterable[tuple[Tensor, torch.dtype]]], Tensor]
"""Sums of squares of tensors, each computed in the dtype beside it, [n]."""


class FiniteGuard:
    """Knows, on the devices, whether the gradients of a step let it happen.

    Attributes:
        bounds: One number per gradient, on the first parameter's device: below 1 where everything
            that is made of it fits; then one per further number. The host learns from them which
            are bad.
        refuses: Whether the host knows already that the step must not happen.

    Args:
        gradients: The gradients.
        required: Further numbers that must be finite, 0-dim.
        squares: Of the executor.
        can_read: Whether the host reads a tensor on a device without waiting.
    """

    def __init__(
        self,
        gradients: Sequence[Guarded],
        required: Iterable[Tensor],
        squares: Squares,
        can_read: CanRead = is_host_memory,
    ) -> None:
        bounds = bounds_of(gradients, squares)
        home = bounds.device
        further = [bound_of(number).to(home).view(1) for number in required]
        self.bounds = torch.cat([bounds, *further])
        self.finite = may_happen(self.bounds)
        self._finite = {home: self.finite}
        # A number in the host's own memory is read at no cost: there it is known beforehand.
        self._is_known = all(can_read(one.parameter.device) for one in gradients)
        self.refuses = self._is_known and not self.finite.item()
        self._made: dict[Any, MomentDecay] = {}

    def decay_of(
        self, device: torch.device, dtype: torch.dtype, betas: tuple[float, float]
    ) -> MomentDecay:
        """Return how moments on a device, computed in a dtype, are updated."""
        key = (device, dtype, tuple(betas))
        if key not in self._made:
            finite = self._finite.setdefault(device, self.finite.to(device))
            self._made[key] = MomentDecay.of(
                betas, finite, dtype, is_known_finite=self._is_known and not self.refuses
            )
        return self._made[key]


def bounds_of(gradients: Iterable[Guarded], squares: Squares, place: Place = WHOLE) -> Tensor:
    """Return the largest square of what is made of each gradient, over the largest allowed, [n].

    Squares, because they add up over the parts of a tensor, which norms do not.

    Args:
        gradients: They are looked at one after the other and not kept; factors may be on another
            device than the gradient.
        squares: Of the executor.
        place: Sums the squares over the parts.
    """
    own: list[int] = []  # index of each gradient's square
    factors: list[tuple[int, int]] = []  # and of its factors'
    scales: list[float] = []
    limits: list[float] = []
    count = 0

    def tensors() -> Iterable[tuple[Tensor, torch.dtype]]:
        nonlocal count
        for one in gradients:
            dtype = compute_dtype(one.parameter)
            own.append(count)
            factors.append((count + 1, count + len(one.factors)) if one.factors else (-1, -1))
            scales.append(one.scale**2)
            limits.append(largest_square(dtype))
            count += 1 + len(one.factors)
            yield gradient(one.parameter), dtype
            yield from ((factor, dtype) for factor in one.factors)

    totals = place.sum(squares(tensors()))
    home, dtype = totals.device, totals.dtype
    indices = upload(torch.tensor([own, *zip(*factors, strict=True)], device="cpu"), home)
    numbers = upload(torch.tensor([scales, limits], dtype=dtype, device="cpu"), home)
    padded = torch.cat([totals, totals.new_ones(1)])  # -1: without factors
    gains = torch.maximum(padded[indices[1]], padded[indices[2]]) * numbers[0]
    return totals[indices[0]] / numbers[1] * gains.clamp(min=1)


def may_happen(bounds: Tensor) -> Tensor:
    """Whether all bounds let the step happen, a 0-dim bool; a NaN does not."""
    return (bounds < 1).all()


def bound_of(number: Tensor) -> Tensor:
    """Return what stands beside the bounds for a number that must be finite, 0-dim: 0 if it is."""
    return torch.where(number.detach().isfinite(), 0.0, torch.inf)


def fits(bound: float) -> bool:
    """The same of one number, on the host."""
    return bound < 1


def bad_gradients(gradients: Iterable[Guarded], squares: Squares) -> list[Tensor]:
    """Return the parameters whose gradient forbids a step, before any step; the host waits."""
    parameters = []

    def noted() -> Iterable[Guarded]:
        for one in gradients:
            parameters.append(one.parameter)
            yield one

    bounds = bounds_of(noted(), squares).tolist()
    return [p for p, bound in zip(parameters, bounds, strict=True) if not fits(bound)]


def largest_square(dtype: torch.dtype) -> float:
    """Sum of squares below which the square of every element fits a dtype, with a margin."""
    return 0.25 * torch.finfo(dtype).max


def describe_number(name: str, number: Tensor) -> str:
    """Return the reason to refuse a step whose loss or gradient norm is not finite."""
    return f"Non-finite {name.replace('grad_norm', 'gradient norm')} ({number.item()})"


def describe_bad(bad: Sequence[Tensor], name_of: Callable[[Tensor], str]) -> str:
    """Return the reason to refuse a step with bad gradients, with the names of the first."""
    nonfinite = [p for p in bad if not gradient(p).isfinite().all()]
    named = nonfinite or bad
    names = ", ".join(map(name_of, named[:3])) + (
        f" and {len(named) - 3} more" if len(named) > 3 else ""
    )
    if nonfinite:
        return f"Non-finite gradient in {names}"
    return (
        f"Gradient too large in {names} (finite, but its moments or those of the LoRA factors "
        "would overflow)"
    )


def unusable(parameter: Tensor) -> str | None:
    """Return why no step can use the kind of gradient that a parameter has; None if one can."""
    grad = gradient(parameter)
    if grad.layout != torch.strided:
        return f"is sparse ({grad.layout}). Use dense ones: sparse=False in nn.Embedding."
    if hasattr(grad, "device_mesh"):
        return "is sharded (DTensor). Sharded parameters are not supported yet."
    if grad.device.type == "meta":
        return "is on the meta device, which holds no numbers. Load the weights first."
    return None
