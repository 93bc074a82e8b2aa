"""LoRA factors of a layer, stacked: how they start, and which rows and columns an expert owns.

Expert i owns r_i rows of A [R, in] and the same r_i columns of B [out, R], R = sum of ranks. Both
forms keep factors like this, so that a layer costs the same few operations however many experts it
has, and one ordinary LoRA adapter holds them all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def owned_by(ranks: Sequence[int], index: int) -> slice:
    """Rows of A, and columns of B, that belong to LoRA expert `index`."""
    start = sum(ranks[:index])
    return slice(start, start + ranks[index])


def live_ranks(ranks: Sequence[int], lora_B: Tensor, *, can_read: bool) -> list[slice]:
    """Columns of B [out, R] that may differ from zero; those of neighbouring experts are one slice.

    B of an expert that has not won yet is zero, and so is every product with it.

    Args:
        ranks: Of the experts.
        lora_B: The stacked B.
        can_read: Whether the host reads B without waiting; if not, all columns may differ.
    """
    if not can_read:
        return [slice(0, sum(ranks))]
    live: list[slice] = []
    for index in range(len(ranks)):
        own = owned_by(ranks, index)
        # An expert that has won differs in its first row already, almost surely.
        if not (lora_B[:1, own].any() or lora_B[:, own].abs().sum()):
            continue
        if live and live[-1].stop == own.start:
            own = slice(live.pop().start, own.stop)
        live.append(own)
    return live


def per_rank(values: Sequence[float], ranks: Sequence[int], like: Tensor) -> Tensor:
    """One value per expert, repeated for every row of A that the expert owns, [R]."""
    pairs = zip(values, ranks, strict=True)
    # Filled on the device: a tensor made from a list would be copied there, and awaited.
    return torch.cat([like.new_full((rank,), value) for value, rank in pairs])


def draw_lora_a(seed: int, layer: str, ranks: Sequence[int], in_features: int) -> Tensor:
    """Draw the stacked A factors, [R, in], float32 on the CPU: U(-1/sqrt(in), 1/sqrt(in)).

    Each expert's numbers depend on (seed, layer name, expert) alone, not on the process, the other
    experts, or the order in which layers are met.
    """
    bound = 1 / math.sqrt(in_features)
    factors = []
    for index, rank in enumerate(ranks):
        key = f"{seed}/{layer}/{index}".encode()
        digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        generator = torch.Generator("cpu").manual_seed(digest)
        uniform = torch.rand(
            rank, in_features, generator=generator, dtype=torch.float32, device="cpu"
        )
        factors.append(uniform.mul_(2 * bound).sub_(bound))
    return torch.cat(factors)


def split_factors(
    ranks: Sequence[int], lora_A: Tensor, lora_B: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Copies of the factors of each expert: A [r, in] and B [out, r]."""
    pairs = zip(lora_A.split(list(ranks), 0), lora_B.split(list(ranks), 1), strict=True)
    return [(A.clone(), B.clone()) for A, B in pairs]
