"""Float32 values in parameters of 16 bits: split without loss, or rounded without bias.

An AdamW step is often smaller than half a unit in the last place of a bfloat16 weight; rounding to
nearest then loses it. Two ways out: the 16 bits that rounding takes stay in the optimizer's state
(`split_float32`, `join_float32`), or the direction of rounding is drawn so that its expectation is
the float32 value (`round_stochastic`). Every function is elementwise, runs on any device, and never
waits for it.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFF  # of a bfloat16: all bits but the sign
_INFINITY = 0x7F80
_PAYLOAD = 0x007F  # of a bfloat16 NaN
_QUIET = 0x0040
# The multipliers of MurmurHash3's 32-bit finaliser, and the usual odd number near 2^32 / phi.
_MIX_1 = 0x85EBCA6B
_MIX_2 = 0xC2B2AE35
_GOLDEN = 0x9E3779B9
_LARGEST_FLOAT16 = 65504.0


class RoundingKey(NamedTuple):
    """64 bits that decide every draw for one tensor in one step; two unsigned 32-bit words."""

    first: int
    second: int

    @classmethod
    def of(cls, seed: int, name: str, step: int) -> RoundingKey:
        """Derive the key from the seed, the tensor's name and its step counter, and nothing else.

        So every rank, and a resumed run, draws what one uninterrupted process would.
        """
        digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def split_float32(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into its nearest bfloat16, ties away from zero, and the 16 bits lost.

    `high = (bits + 0x8000) >> 16`, `low = bits - (high << 16)` in [-32768, 32767]; the lower end
    is a tie. Finite values whose high part rounds to infinity come back finite.

    A NaN is cut instead: the formula would turn 0x7FFFFFFF, the NaN that NVIDIA's GPUs compute,
    into a weight of -0.0. Its high part is a NaN and its bits come back, but for one kind: a
    signalling NaN whose payload lies in the low 16 bits alone becomes quiet, as in any arithmetic.
    (There are fewer pairs with a NaN in the high part than there are NaNs.)

    Args:
        values: float32, any shape.

    Returns:
        The high part (bfloat16) and the low part (int16), in the shape of `values`.
    """
    bits = _bits(values)
    high = torch.where(values.isnan(), _cut(bits), (bits + 0x8000) >> 16)
    return _as_bfloat16(high), (bits - (high << 16)).to(torch.int16)


def join_float32(high: Tensor, low: Tensor) -> Tensor:
    """Return the float32 values that `split_float32` has split.

    Args:
        high: bfloat16, any shape.
        low: int16, the same shape.
    """
    if high.dtype != torch.bfloat16 or low.dtype != torch.int16:
        raise TypeError(
            f"Invalid parts of dtypes {high.dtype}, {low.dtype}. "
            "Must be torch.bfloat16, torch.int16."
        )
    upper, lower = high.view(torch.int16).to(torch.int32), low.to(torch.int32)
    lower = torch.where((upper & _MAGNITUDE) > _INFINITY, lower & 0xFFFF, lower)
    return ((upper << 16) + lower).view(torch.float32)


def round_stochastic(values: Tensor, key: RoundingKey, first: int = 0) -> Tensor:
    """Round float32 to one of the two neighbouring bfloat16, up with the share of the way up.

    The expectation over keys is the float32 value, exactly. Values that a bfloat16 holds stay as
    they are, infinity and NaN included. A finite value beyond the largest finite bfloat16 becomes
    that, never infinity.

    Args:
        values: float32, any shape.
        key: Of this tensor in this step.
        first: Index of the first element in the whole tensor, where `values` is a part of it: draws
            belong to elements, in row-major order, and not to the parts that hold them.
    """
    bits = _bits(values)
    draws = random_bits(key, first, values.numel(), values.device).view(values.shape)
    high = (bits + draws) >> 16
    # Neither infinity nor NaN takes part, and nothing finite reaches them.
    high = torch.where((high & _MAGNITUDE) >= _INFINITY, _cut(bits), high)
    return _as_bfloat16(torch.where(values.isfinite(), high, _cut(bits)))


def low_bits(values: Tensor) -> Tensor:
    """Return the lower 16 bits of float32 values, as int16, in their shape.

    With the result of `round_stochastic` they give the values back: `join_rounded`.
    """
    return (_bits(values) & 0xFFFF).to(torch.int16)


def join_rounded(high: Tensor, low: Tensor, key: RoundingKey, first: int = 0) -> Tensor:
    """Return the float32 values that `round_stochastic` has rounded; `low` is their `low_bits`.

    Whether a value was rounded up is known from its draw, which is made once more. It holds for
    finite values below the largest finite bfloat16 but one.

    Args:
        high: bfloat16, what `round_stochastic` gave with the same `key` and `first`.
        low: int16, the same shape.
        key: Of this tensor in this step.
        first: Index of the first element in the whole tensor.
    """
    lower = low.to(torch.int32) & 0xFFFF
    draws = random_bits(key, first, low.numel(), low.device).view(low.shape)
    upper = high.view(torch.int16).to(torch.int32) - ((lower + draws) >> 16)
    return ((upper << 16) | lower).view(torch.float32)


def round_stochastic_float16(values: Tensor, key: RoundingKey, first: int = 0) -> Tensor:
    """Round float32 to one of the two neighbouring float16, up with the share of the way up.

    Below 2^-14, where float16 is subnormal, that share is known to 16 bits. Values that a float16
    holds stay as they are; values that the nearest float16 is finite for stay finite.

    Args:
        values: float32, any shape.
        key: Of this tensor in this step.
        first: Index of the first element in the whole tensor.
    """
    draws = random_bits(key, first, values.numel(), values.device).view(values.shape)
    nearest = values.to(torch.float16)
    normal = ((_bits(values) + (draws >> 3)) & ~0x1FFF).view(torch.float32)
    normal = normal.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16)
    units = values.double().abs() * 2**24  # of the spacing of subnormal numbers
    subnormal = (units + draws / 2**16).floor() / 2**24 * values.double().sign()
    rounded = torch.where(values.abs() < 2**-14, subnormal.float(), normal).to(torch.float16)
    return torch.where(nearest.isfinite(), rounded, nearest)


def random_bits(key: RoundingKey, first: int, count: int, device: torch.device) -> Tensor:
    """Return 16 random bits for each of `count` elements from index `first` on: int32, [count].

    A keyed hash of the element's index: no state, no order, the same on every device. For a random
    key the 16 bits of an element are exactly uniform.
    """
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    low, high = index.to(torch.int32), (index >> 32).to(torch.int32)  # int32 wraps around
    mixed = _mix(low ^ _signed(key.first)) ^ _signed(key.second) ^ (high * _signed(_GOLDEN))
    return (_mix(mixed) >> 16) & 0xFFFF


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of int32 words, one-to-one; shifts are logical."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(_MIX_1)
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _signed(_MIX_2)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    """Return the int32 with the bits of an unsigned 32-bit word."""
    return word - (1 << 32) if word >> 31 else word


def _bits(values: Tensor) -> Tensor:
    if values.dtype != torch.float32:
        raise TypeError(f"Invalid values of dtype {values.dtype}. Must be torch.float32.")
    return values.view(torch.int32)


def _cut(bits: Tensor) -> Tensor:
    """Return the upper 16 bits of float32 bits; those of a NaN stay a NaN's."""
    high = bits >> 16
    is_nan = (bits & 0x7FFFFFFF) > (_INFINITY << 16)
    return torch.where(is_nan & ((high & _PAYLOAD) == 0), high | _QUIET, high)


def _as_bfloat16(high: Tensor) -> Tensor:
    return high.to(torch.int16).view(torch.bfloat16)
