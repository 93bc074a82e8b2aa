"""Check of a step's gradients, before anything is written: no moment may overflow or become NaN.

One number (bound) per gradient, on the device; below 1 means that the step may happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.core.arithmetic.adam import MomentDecay, compute_dtype, gradient
from molf.core.arithmetic.devices import CanRead, is_host_memory, upload
from molf.core.storage.collectives import ALONE, Processes
from molf.core.storage.sharding import is_sharded, layout_of, local_part


class NonFiniteError(RuntimeError):
    """A gradient or the loss is not finite: the step was refused, nothing was written."""


class Guarded(NamedTuple):
    """A gradient that a step uses, and the factors that multiply it.

    Attributes:
        parameter: Parameter with the gradient G.
        scale: s of the products `s B^T G` and `s G A^T`, or of `s G`.
        factors: A [R, in] and B [out, R], or none.
    """

    parameter: Tensor
    scale: float = 1.0
    factors: tuple[Tensor, ...] = ()


Squares = Callable[[Iterable[tuple[Tensor, torch.dtype]]], Tensor]
"""Sums of squares of tensors, each in the dtype that comes with it, [n]."""


class FiniteGuard:
    """Bounds of a step's gradients, on the devices.

    Attributes:
        bounds: [n], one per gradient, then one per required number, on the first parameter's
            device. Below 1: finite, and no moment overflows.
        refuses: Whether the host has read that the step must not happen.

    Args:
        gradients: Gradients of the step.
        required: Further numbers that must be finite, 0-dim.
        squares: `Executor.squares`.
        can_read: Whether the host reads a tensor on a device without waiting.
        processes: Processes that share the tensors.
    """

    def __init__(
        self,
        gradients: Sequence[Guarded],
        required: Iterable[Tensor],
        squares: Squares,
        can_read: CanRead = is_host_memory,
        processes: Processes = ALONE,
    ) -> None:
        self.bounds = bounds_of(gradients, squares, required, processes)
        home = self.bounds.device
        self.finite = may_happen(self.bounds)
        self._finite = {home: self.finite}
        # Reading host memory costs nothing, so on a CPU a bad step ends here.
        self._is_known = all(can_read(one.parameter.device) for one in gradients)
        self.refuses = self._is_known and not self.finite.item()
        self._made: dict[Any, MomentDecay] = {}

    def decay_of(
        self, device: torch.device, dtype: torch.dtype, betas: tuple[float, float]
    ) -> MomentDecay:
        """Return the scalars that update moments on a device, in a dtype."""
        # Made once per step: the scalars are copied to the device.
        key = (device, dtype, tuple(betas))
        if key not in self._made:
            finite = self._finite.setdefault(device, self.finite.to(device))
            self._made[key] = MomentDecay.of(
                betas, finite, dtype, is_known_finite=self._is_known and not self.refuses
            )
        return self._made[key]


def bounds_of(
    gradients: Iterable[Guarded],
    squares: Squares,
    required: Iterable[Tensor] = (),
    processes: Processes = ALONE,
) -> Tensor:
    """Return the bound of each gradient, its largest square over the largest allowed.

    Args:
        gradients: Read one at a time; factors may be on another device than the gradient.
        squares: `Executor.squares`.
        required: Further numbers that must be finite, 0-dim; each process has its own.
        processes: Processes that share the tensors.

    Returns:
        [n], one per gradient, then one per required number.
    """
    # Gradients of LoRA factors, `s B^T G` and `s G A^T`, are computed later, layer by layer. They
    # are at most `s ||B|| ||G||` and `s ||A|| ||G||`, so norms are enough to check them now.
    # Squares, not norms: squares add up over the parts of a tensor.
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

    own_squares = squares(tensors())
    home, dtype = own_squares.device, own_squares.dtype
    further = [bound_of(number).to(home, dtype).view(1) for number in required]
    totals = processes.sum(torch.cat([own_squares, *further]))
    totals, further = totals[:count], totals[count:].split(1)
    indices = upload(torch.tensor([own, *zip(*factors, strict=True)], device="cpu"), home)
    numbers = upload(torch.tensor([scales, limits], dtype=dtype, device="cpu"), home)
    padded = torch.cat([totals, totals.new_ones(1)])  # -1: without factors
    gains = torch.maximum(padded[indices[1]], padded[indices[2]]) * numbers[0]
    return torch.cat([totals[indices[0]] / numbers[1] * gains.clamp(min=1), *further])


def may_happen(bounds: Tensor) -> Tensor:
    """Return whether all bounds are below 1, a 0-dim bool; False for a NaN."""
    return (bounds < 1).all()


def bound_of(number: Tensor) -> Tensor:
    """Return the bound of a required number, 0-dim: 0 if it is finite, else infinity."""
    return torch.where(number.detach().isfinite(), 0.0, torch.inf)


def fits(bound: float) -> bool:
    """Return whether a bound is below 1; False for a NaN."""
    return bound < 1


def bad_gradients(gradients: Iterable[Guarded], squares: Squares) -> list[Tensor]:
    """Return the parameters whose gradient must not be used; the host waits."""
    parameters = []

    def noted() -> Iterable[Guarded]:
        for one in gradients:
            parameters.append(one.parameter)
            yield one

    bounds = bounds_of(noted(), squares).tolist()
    return [p for p, bound in zip(parameters, bounds, strict=True) if not fits(bound)]


def largest_square(dtype: torch.dtype) -> float:
    """Return the largest sum of squares for which no second moment overflows, with a margin."""
    # An infinite second moment never decays: the parameter would stop moving.
    return 0.25 * torch.finfo(dtype).max


def describe_number(name: str, number: Tensor, processes: Processes = ALONE) -> str:
    """Return the reason to refuse a step whose loss or gradient norm is not finite.

    With several processes all of them must call it; they return the same.
    """
    # The mean of the processes is not finite if one of their numbers is not.
    mean = processes.sum(number.detach().cpu().double().view(1)) / processes.count
    return f"Non-finite {name.replace('grad_norm', 'gradient norm')} ({mean.item()})"


def _count_nonfinite(parameter: Tensor) -> Tensor:
    """Return the number of elements of a gradient that are not finite, 0-dim float64 on the CPU."""
    grad = local_part(gradient(parameter))
    return (~grad.isfinite()).sum().double().cpu()


def describe_bad(
    bad: Sequence[Tensor], name_of: Callable[[Tensor], str], processes: Processes = ALONE
) -> str:
    """Return the reason to refuse a step with bad gradients, with the names of the first.

    With several processes all of them must call it; they return the same.
    """
    found = torch.stack([_count_nonfinite(p) for p in bad])
    counts = processes.sum(found).tolist()
    nonfinite = [p for p, count in zip(bad, counts, strict=True) if count]
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
    """Return the reason why a parameter's gradient is not supported; None if it is."""
    grad = gradient(parameter)
    if grad.layout != torch.strided:
        return f"is sparse ({grad.layout}). Use dense ones: sparse=False in nn.Embedding."
    if is_sharded(grad) and not is_sharded(parameter):
        return "is sharded (DTensor), and the parameter is not."
    if is_sharded(parameter) and (not is_sharded(grad) or layout_of(grad) != layout_of(parameter)):
        return f"is not sharded as the parameter is, {layout_of(parameter).placements}."
    if grad.device.type == "meta":
        return "is on the meta device, which holds no numbers. Load the weights first."
    return None
