"""Executor with Triton kernels (`kernels="triton"`); opt-in, not yet run on a GPU.

The state is that of the eager executor: save with one, resume with the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from molf.core.arithmetic.adam import gradient
from molf.core.arithmetic.blocks import BLOCKS
from molf.core.arithmetic.devices import CanRead, is_host_memory
from molf.core.execute.kernel_checks import check_kernel_parameter
from molf.core.execute.triton.items import AdamW, LowRank, Moments, Weight
from molf.core.execute.triton.kernels import Kernels
from molf.core.model.factors import owned_by
from molf.core.options import KERNEL_TERMS
from molf.core.scores.rules import Winners
from molf.core.step.dense import DenseTensor
from molf.core.step.executor import Executor, Owner, ScoreSums
from molf.core.step.fidelity import Sample, UpdateTally
from molf.core.step.guard import FiniteGuard
from molf.core.step.layer import RoutedLayer
from molf.core.step.operations import LayerWrites, TensorWrite

_CHUNK_BYTES = 64 << 20


class Triton(Executor):
    """Runs operations on many tensors per launch; all parameters are on one device.

    Args:
        chunk_bytes: Size of a chunk of layers, counted in the gradients or operands of their
            factors. Larger chunks need fewer launches and more memory.
        can_read: Whether the host reads a tensor on a device without waiting.
    """

    def __init__(self, chunk_bytes: int = _CHUNK_BYTES, can_read: CanRead = is_host_memory) -> None:
        super().__init__(can_read)
        self._chunk_bytes = chunk_bytes
        self._kernels: Kernels | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies, without kernels."""
        # Kernels hold addresses of this optimizer's tensors; a copy creates its own.
        return {**vars(self), "_kernels": None}

    def check(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Refuse parameters that the kernels do not support."""
        # In every step: libraries may have replaced or moved parameters.
        home: torch.device | None = None
        for name, parameter in parameters:
            home = home or parameter.device
            check_kernel_parameter(parameter, name, home)

    def _on(self, device: torch.device) -> Kernels:
        if self._kernels is None or self._kernels.device != device:
            self._kernels = Kernels(device)
        return self._kernels

    def squares(self, tensors: Iterable[tuple[Tensor, torch.dtype]]) -> Tensor:
        """Sum the squares of each tensor, in float32 within a block of 2,048 elements."""
        found = [tensor for tensor, _ in tensors]
        return self._on(found[0].device).squares(found)

    def update_moments(self, layers: Sequence[RoutedLayer], guard: FiniteGuard) -> ScoreSums:
        """Update all dense tensors in one launch, factors in chunks of layers."""
        kernels = self._on(guard.bounds.device)
        numbers: list[Tensor] = []
        owners: list[Owner] = []

        def update(items: Sequence[Moments], term: str) -> None:
            # `part`: each call of a step keeps its own table of addresses.
            numbers.append(kernels.moments(items, guard.finite, term, part=len(numbers)))

        for term in KERNEL_TERMS:
            scored = [
                (number, layer)
                for number, layer in enumerate(layers)
                if layer.score.terms[0].name == term
            ]
            if not scored:
                continue
            update([item for _, layer in scored for item in _dense_moments(layer)], term)
            owners += [
                Owner(number, 0, part, term)
                for number, layer in scored
                for part in range(len(layer.dense))
            ]
            items: list[Moments] = []
            for number, layer in scored:
                found = _factor_moments(layer)
                # Order: A and B of expert 1, A and B of expert 2, ...
                owners += [
                    Owner(number, 1 + place // 2, place % 2, term) for place in range(len(found))
                ]
                items += found
                if sum(item.grad.nbytes for item in items) >= self._chunk_bytes:
                    update(items, term)
                    items = []
            update(items, term)
        return ScoreSums(torch.cat(numbers), owners)

    def write(
        self,
        layers: Iterable[tuple[RoutedLayer, Winners]],
        plain: Sequence[DenseTensor],
        guard: FiniteGuard,
        tally: UpdateTally | None,
    ) -> None:
        """Write factors and products in chunks of layers, then all tensors without a product."""
        kernels, finite = self._on(guard.bounds.device), guard.finite
        # Tensors without a product need no operands: one launch for all of them at the end.
        late: list[TensorWrite] = []
        for part, chunk in enumerate(self._chunks(layers)):
            tensors = [write for writes in chunk for write in writes.tensors]
            kernels.factors([x for writes in chunk for x in writes.factors], finite, part=part)
            products = [write for write in tensors if write.product is not None]
            with _measured(products, tally):
                kernels.low_rank([_low_rank(write) for write in products], finite, part=part)
                _mark_written(products)
            late += [x for x in tensors if x.product is None and x.step is not None]
        for tensor in plain:
            tensor.state["step"] += 1
        steps = [TensorWrite(tensor, tensor.adamw_step()) for tensor in plain]
        with _measured([*late, *steps], tally):
            items = [_adamw(write, has_moments=True) for write in late]
            items += [_adamw(write, has_moments=False) for write in steps]
            kernels.adamw(items, finite)
            _mark_written([*late, *steps])

    def _chunks(self, layers: Iterable[tuple[RoutedLayer, Winners]]) -> Iterator[list[LayerWrites]]:
        """Yield the writes of layers in chunks whose operands take `chunk_bytes`."""
        chunk: list[LayerWrites] = []
        for layer, winners in layers:
            chunk.append(layer.writes(winners))
            if sum(writes.nbytes for writes in chunk) >= self._chunk_bytes:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _dense_moments(layer: RoutedLayer) -> list[Moments]:
    """Return the moments of `full`: of the weight and of a bias."""
    betas = layer.group["betas"]
    return [
        Moments(gradient(tensor.parameter), *tensor.moments.load(...), betas)
        for tensor in layer.dense
    ]


def _factor_moments(layer: RoutedLayer) -> list[Moments]:
    """Compute the factors' gradients; return the moments of A and B of each LoRA expert."""
    grad_A, grad_B = layer.factor_gradients(BLOCKS)
    (m_A, v_A), (m_B, v_B) = layer.factor_moments()
    betas = layer.group["betas"]
    items = []
    for index in range(len(layer.group["ranks"])):
        own = owned_by(layer.group["ranks"], index)
        items.append(Moments(grad_A[own], m_A[own], v_A[own], betas))
        items.append(Moments(grad_B[:, own], m_B[:, own], v_B[:, own], betas))
    return items


def _weight(tensor: DenseTensor) -> Weight:
    """Return the stored parameter; call it after `step` was incremented."""
    stored = tensor.stored
    key = stored.step_key() if stored.rounding == "stochastic" else None
    return Weight(tensor.parameter.detach(), stored.low, key, stored.first_index())


def _low_rank(write: TensorWrite) -> LowRank:
    tensor, step, product, transposed = write
    assert product is not None, "it is a write with a product"
    product = product.stored_as(transposed=transposed)
    full = None if step is None else (*tensor.moments.load(...), step)
    return LowRank(_weight(tensor), product, full)


def _adamw(write: TensorWrite, *, has_moments: bool) -> AdamW:
    tensor, step, _, _ = write
    assert step is not None, "it is a write with a step"
    moments = tensor.moments.load(...)
    if has_moments:  # `update_moments` has updated them
        return AdamW(_weight(tensor), *moments, step)
    grad, betas = gradient(tensor.parameter), tensor.group["betas"]
    return AdamW(_weight(tensor), *moments, step, grad, betas)


def _mark_written(writes: Sequence[TensorWrite]) -> None:
    # Autograd does not track the kernels' writes. With a new version it refuses a backward pass
    # through the old values.
    torch.autograd.graph.increment_version([write.tensor.parameter for write in writes])


@contextmanager
def _measured(writes: Sequence[TensorWrite], tally: UpdateTally | None) -> Iterator[None]:
    """Compare sampled rows of each tensor before and after its write, if there is a tally."""
    if tally is None:
        yield
        return
    rows = [tally.sample(write.tensor.parameter) for write in writes]
    samples = [
        Sample(write.tensor.stored.read(own)) for write, own in zip(writes, rows, strict=True)
    ]
    yield
    for (tensor, step, product, transposed), own, sample in zip(writes, rows, samples, strict=True):
        part = product and product.rows(own, transposed=transposed)
        moments = [moment[own] for moment in tensor.moments.load(...)]
        sample.intend(moments, step, part, transposed=transposed)
        weight = tally.weight(tensor.parameter)
        sample.compare(tensor.stored.read(own), tally, weight=weight)
