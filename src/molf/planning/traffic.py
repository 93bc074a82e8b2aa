"""Bytes that the GPUs of a sharded training send in a step, by formula.

A payload is the size of the whole tensor that is gathered or reduced. In a ring of n GPUs each one
sends (n - 1) / n of the payload of a gather or a reduce-scatter, and twice that of an all-reduce.
`benchmarks/traffic.py` counts the payloads of real steps and compares them with these formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from molf.core.step.exchange import BUCKET_BYTES

FLOPS = 4e14
"""Assumed speed of a GPU, in operations per second: about 40% of an H100's in bfloat16."""

SHARE = 0.05
"""Share of a step above which the optimizer's traffic counts as a cost."""

_FACTOR = 4  # bytes of a number of a LoRA factor
_SUM = 8  # bytes of a sum of squares or of a score's term


class RoutedShape(NamedTuple):
    """A routed linear layer.

    Attributes:
        out_features: Size of its output.
        in_features: Size of its input.
        transposed: Whether the weight is stored as [in, out].
        has_bias: Whether a bias is trained.
    """

    out_features: int
    in_features: int
    transposed: bool = False
    has_bias: bool = False

    def far(self, shards: int) -> int:
        """Return the features of the far factor, padded to a multiple of the shards."""
        size = self.out_features if self.transposed else self.in_features
        return -(-size // shards) * shards


class StepBytes(NamedTuple):
    """Payloads of the collectives of one optimizer step, in bytes.

    Attributes:
        check: Squares of all gradients and factors, one all-reduce.
        gather: Far factors, all-gathers.
        reduce: Gradients of the far factors, reduce-scatters.
        scores: Sums of score terms, one all-reduce.
        operands: Far operands of the products, all-gathers.
    """

    check: int
    gather: int
    reduce: int
    scores: int
    operands: int

    @property
    def exchanged(self) -> int:
        """Payloads of gathers and reduce-scatters."""
        return self.gather + self.reduce + self.operands

    def sent(self, gpus: int, shards: int) -> float:
        """Return the bytes that each GPU sends; all-reduces are over all, the rest over shards."""
        return self.exchanged * _ring(shards) + 2 * (self.check + self.scores) * _ring(gpus)


def folded_step(
    layers: Sequence[RoutedShape],
    ranks: Sequence[int],
    shards: int,
    *,
    winners: Sequence[Sequence[int]],
    others: int = 0,
    terms: int = 1,
    required: int = 0,
) -> StepBytes:
    """Return the payloads of a step whose LoRA experts are folded into the weights.

    Args:
        layers: The routed layers.
        ranks: Ranks of the LoRA experts.
        shards: Number of shards.
        winners: Winners of each layer; 0 is `full`, 1 the first LoRA expert.
        others: Number of other trained tensors.
        terms: Number of terms of the score.
        required: Number of further numbers that must be finite, such as the loss.
    """
    total = sum(ranks)
    far = [layer.far(shards) for layer in layers]
    dense = sum(1 + layer.has_bias for layer in layers)
    operands = 0
    for size, won in zip(far, winners, strict=True):
        width = sum(2 * ranks[expert - 1] for expert in won if expert)
        operands += _FACTOR * size * (width + (total if 0 in won else 0))
    return StepBytes(
        check=_SUM * (dense + 2 * len(layers) + others + required),
        gather=_FACTOR * total * sum(far),
        reduce=_FACTOR * total * sum(far),
        scores=_SUM * terms * (dense + 2 * len(ranks) * len(layers)),
        operands=operands,
    )


def adapter_step(layers: int, experts: int, trained: int, terms: int, required: int) -> StepBytes:
    """Return the payloads of a step whose LoRA experts are an adapter: two all-reduces.

    Args:
        layers: Number of routed layers.
        experts: Number of LoRA experts.
        trained: Number of trained tensors.
        terms: Number of terms of the score.
        required: Number of further numbers that must be finite, such as the loss.
    """
    scores = _SUM * terms * 2 * experts * layers
    return StepBytes(_SUM * (trained + required), 0, 0, scores, 0)


def buffer_bytes(layers: Sequence[RoutedShape], ranks: Sequence[int], shards: int) -> int:
    """Return the most bytes of the buffers of a folded step's collectives, in a bucket of layers.

    Args:
        layers: The routed layers, in the optimizer's order.
        ranks: Ranks of the LoRA experts.
        shards: Number of shards.
    """
    total = sum(ranks)
    largest = bucket = 0
    for layer in layers:
        if bucket >= BUCKET_BYTES:
            bucket = 0
        bucket += _FACTOR * total * layer.far(shards)
        largest = max(largest, bucket)
    # Gradients of the whole far factors, the same padded, and the buffer that is sent; beside
    # them the own parts of factors and sums.
    reduced = 3 * largest + 2 * largest // shards
    # The buffer that is received, and the whole operands that are copied from it.
    operand = largest * max(2 * max(ranks), total) // total
    return max(reduced, 2 * operand + operand // shards)


class ShardedModel(NamedTuple):
    """Sizes of a model under `fully_shard`, which cuts each decoder layer and the rest.

    Attributes:
        layers: Parameters in decoder layers.
        outside: Parameters outside of them.
        trained: Trained parameters.
        weight_bytes: Bytes of a gathered number.
        gradient_bytes: Bytes of a reduced number.
    """

    layers: int
    outside: int
    trained: int
    weight_bytes: int
    gradient_bytes: int

    def sent(self, gpus: int, shards: int, passes: int) -> float:
        """Return the bytes that each GPU sends in a step of so many forward passes.

        Decoder layers are gathered in the forward and in the backward pass, the rest once. Each
        backward pass reduces all gradients; with replicas, also over these.
        """
        gathered = self.weight_bytes * (2 * self.layers + self.outside)
        reduced = self.gradient_bytes * self.trained
        over_replicas = 2 * reduced / shards * _ring(gpus // shards)
        return passes * ((gathered + reduced) * _ring(shards) + over_replicas)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each GPU sends in a step, and the speed that they need.

    Attributes:
        gpus: Number of GPUs.
        shards: GPUs that share one model; `gpus / shards` replicas.
        fsdp: Bytes of FSDP2's own collectives.
        optimizer: Bytes of the optimizer's, by what wins in all layers.
        seconds: Estimated time of the computation of a step.
    """

    gpus: int
    shards: int
    fsdp: float
    optimizer: dict[str, float]
    seconds: float

    @property
    def fsdp_speed(self) -> float:
        """Bytes per second below which FSDP2's traffic takes longer than the computation."""
        return self.fsdp / self.seconds

    @property
    def optimizer_speed(self) -> float:
        """Bytes per second below which the optimizer's takes over 5% of the computation."""
        return max(self.optimizer.values(), default=0.0) / (SHARE * self.seconds)

    def record(self) -> dict[str, Any]:
        """Return the figures as plain values; sizes are bytes."""
        return {
            "gpus": self.gpus,
            "shards": self.shards,
            "sent_by_fsdp": round(self.fsdp),
            "sent_by_optimizer": {name: round(size) for name, size in self.optimizer.items()},
            "computation_seconds": self.seconds,
            "assumed_flops": FLOPS,
            "fsdp_bytes_per_second": round(self.fsdp_speed),
            "optimizer_bytes_per_second": round(self.optimizer_speed),
        }


def computation_seconds(
    parameters: int, tokens: int, *, trains_dense: bool, checkpointing: bool
) -> float:
    """Estimate the time of a step's forward and backward passes on one GPU.

    Two operations per parameter and token for each product: in the forward pass, for the gradient
    of the input, for that of a trained weight, and for a recomputed forward pass. Attention between
    tokens is left out.
    """
    products = 2 + trains_dense + checkpointing
    return 2 * products * parameters * tokens / FLOPS


def _ring(count: int) -> float:
    """Return the share of a payload that each of `count` GPUs sends."""
    return (count - 1) / count
