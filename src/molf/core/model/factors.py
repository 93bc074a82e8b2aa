"""Stacked LoRA factors of a layer: initial values and the slices of each expert.

Expert i owns r_i rows of A [R, in] and the same r_i columns of B [out, R], R = sum of ranks. So the
number of operations per layer does not depend on the number of experts, and one LoRA adapter holds
all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def owned_by(ranks: Sequence[int], index: int) -> slice:
    """Return the rows of A, which are the columns of B, of LoRA expert `index`."""
    start = sum(ranks[:index])
    return slice(start, start + ranks[index])


def live_ranks(ranks: Sequence[int], lora_B: Tensor, *, can_read: bool) -> list[slice]:
    """Return the columns of B that are not zero; neighbouring experts share a slice.

    B of an expert is zero until it first wins, and so are products with it.

    Args:
        ranks: Ranks of the experts.
        lora_B: Stacked B, [out, R].
        can_read: Whether the host reads B without waiting; if not, all columns are returned.
    """
    if not can_read:
        return [slice(0, sum(ranks))]
    live: list[slice] = []
    for index in range(len(ranks)):
        own = owned_by(ranks, index)
        # The first row is checked first: after a win it is almost surely not zero.
        if not (lora_B[:1, own].any() or lora_B[:, own].abs().sum()):
            continue
        if live and live[-1].stop == own.start:
            own = slice(live.pop().start, own.stop)
        live.append(own)
    return live


def per_rank(values: Sequence[float], ranks: Sequence[int], like: Tensor) -> Tensor:
    """Return one value per rank, [R], from one value per expert."""
    pairs = zip(values, ranks, strict=True)
    # Filled on the device: a tensor built from a list would be copied, and the host would wait.
    return torch.cat([like.new_full((rank,), value) for value, rank in pairs])


def draw_lora_a(seed: int, layer: str, ranks: Sequence[int], in_features: int) -> Tensor:
    """Draw the stacked A factors, [R, in], float32 on the CPU: U(-1/sqrt(in), 1/sqrt(in)).

    The values of an expert depend on (seed, layer name, expert index) and on nothing else.
    """
    bound = 1 / math.sqrt(in_features)
    factors = []
    for index, rank in enumerate(ranks):
        key = f"{seed}/{layer}/{index}".encode()
        digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        # On the CPU, because generators of other devices draw other numbers.
        generator = torch.Generator("cpu").manual_seed(digest)
        uniform = torch.rand(
            rank, in_features, generator=generator, dtype=torch.float32, device="cpu"
        )
        factors.append(uniform.mul_(2 * bound).sub_(bound))
    return torch.cat(factors)


def split_factors(
    ranks: Sequence[int], lora_A: Tensor, lora_B: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return copies of the factors of each expert: A [r, in] and B [out, r]."""
    pairs = zip(lora_A.split(list(ranks), 0), lora_B.split(list(ranks), 1), strict=True)
    return [(A.clone(), B.clone()) for A, B in pairs]
