"""The guard of a step: every moment that follows from its gradients fits its dtype.

A gradient with infinity or NaN must not reach the state, and neither must a finite one whose square
overflows: a second moment of infinity never comes back, and the parameter would stand still for
good. The gradients of LoRA factors, `s B^T G` and `s G A^T`, are made of G later and layer by
layer; what they can be at most, `s ||A|| ||G||` and `s ||B|| ||G||`, is known from norms. So one
number per gradient says, before anything is written, whether the step may happen. The loss, or
another number that must be finite, is one number more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.core.adam import MomentDecay, compute_dtype, gradient, row_blocks


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
    """

    def __init__(self, gradients: Sequence[Guarded], required: Iterable[Tensor] = ()) -> None:
        home = gradients[0].parameter.device
        bounds = [_bound(one).to(home) for one in gradients]
        self.bounds = torch.stack([*bounds, *(bound_of(number).to(home) for number in required)])
        self._finite = {home: may_happen(self.bounds)}
        # A number in the host's own memory is read at no cost: there it is known beforehand.
        self._is_known = all(reads_for_nothing(one.parameter.device) for one in gradients)
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


def may_happen(bounds: Tensor) -> Tensor:
    """Whether all bounds let the step happen, a 0-dim bool; a NaN does not."""
    return (bounds < 1).all()


def bound_of(number: Tensor) -> Tensor:
    """Return what stands beside the bounds for a number that must be finite, 0-dim: 0 if it is."""
    return torch.where(number.detach().isfinite(), 0.0, torch.inf)


def fits(bound: float) -> bool:
    """The same of one number, on the host."""
    return bound < 1


def bad_gradients(gradients: Iterable[Guarded]) -> list[Tensor]:
    """Return the parameters whose gradient forbids a step, before any step; the host waits.

    Args:
        gradients: They are looked at one after the other and not kept; factors may be on another
            device than the gradient.
    """
    bounds = [(one.parameter, _bound(one)) for one in gradients]
    home = [bound.to(bounds[0][1].device) for _, bound in bounds]
    on_host = torch.stack(home).tolist() if home else []
    return [p for (p, _), bound in zip(bounds, on_host, strict=True) if not fits(bound)]


def largest_norm(dtype: torch.dtype) -> float:
    """Norm below which the square of every element fits a dtype, with a margin for rounding."""
    return 0.5 * torch.finfo(dtype).max ** 0.5


def reads_for_nothing(device: torch.device) -> bool:
    """Whether the host reads a tensor on this device without waiting."""
    return device.type == "cpu"


def _bound(one: Guarded) -> Tensor:
    """The largest norm of what is made of a gradient, over `largest_norm`, 0-dim."""
    grad, dtype = gradient(one.parameter), compute_dtype(one.parameter)
    norm = _norm(grad, dtype) / largest_norm(dtype)
    if not one.factors:
        return norm * max(1.0, one.scale)
    gains = [_norm(factor, dtype) * one.scale for factor in one.factors]
    return norm * torch.stack(gains).amax().clamp(min=1).to(norm.device)


def _norm(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The Frobenius norm, in a dtype: infinity, NaN and overflow survive it. 0-dim."""
    if tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous():
        flat = tensor.view(-1)  # twice as fast; a square that overflows forbids a step anyway
        return torch.dot(flat, flat).sqrt()
    if tensor.dtype == dtype:
        return torch.linalg.vector_norm(tensor)
    # in parts: torch copies to the other dtype
    parts = [torch.linalg.vector_norm(tensor[x], dtype=dtype) for x in row_blocks(tensor)]
    return torch.linalg.vector_norm(torch.stack(parts or [tensor.new_zeros((), dtype=dtype)]))


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
