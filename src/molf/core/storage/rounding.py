"""Float32 values in 16-bit parameters: split without loss, or rounded without bias.

`split_float32` and `join_float32` convert between float32 and bfloat16 + low half (int16).
`round_stochastic` draws the direction of rounding. All functions are elementwise, run on any device
and do not wait for it.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFF  # of a bfloat16: all bits without the sign
_INFINITY = 0x7F80
_PAYLOAD = 0x007F  # of a bfloat16 NaN
_QUIET = 0x0040
# The multipliers of MurmurHash3's 32-bit finaliser, and the usual odd number near 2^32 / phi.
_MIX_1 = 0x85EBCA6B
_MIX_2 = 0xC2B2AE35
_GOLDEN = 0x9E3779B9
_LARGEST_FLOAT16 = 65504.0


class RoundingKey(NamedTuple):
    """64-bit key of all draws for one tensor in one step: two unsigned 32-bit words."""

    first: int
    second: int

    @classmethod
    def of(cls, seed: int, name: str, step: int) -> RoundingKey:
        """Derive the key from the seed, the tensor's name and its step counter."""
        # From nothing else: every rank, and a resumed run, makes the same draws.
        digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def split_float32(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into its nearest bfloat16, ties away from zero, and the 16 bits lost.

    `high = (bits + 0x8000) >> 16`, `low = bits - (high << 16)` in [-32768, 32767]; the lower end
    is a tie. `join_float32` returns all finite values, also those whose high part is infinite.

    A NaN is truncated instead. `join_float32` returns its bits, except that a signalling NaN with
    its payload in the low 16 bits alone becomes quiet.

    Args:
        values: float32, any shape.

    Returns:
        The high part (bfloat16) and the low part (int16), in the shape of `values`.
    """
    bits = _bits(values)
    # Rounding would turn 0x7FFFFFFF, the NaN that NVIDIA's GPUs compute, into -0.0.
    high = torch.where(values.isnan(), _cut(bits), (bits + 0x8000) >> 16)
    return _as_bfloat16(high), (bits - (high << 16)).to(torch.int16)


def join_float32(high: Tensor, low: Tensor) -> Tensor:
    """Return the float32 values that `split_float32` split.

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
    """Round float32 up or down to bfloat16, so that the expectation is the float32 value.

    Values of bfloat16 stay, infinity and NaN included. A finite value beyond the largest finite
    bfloat16 becomes that, not infinity.

    Args:
        values: float32, any shape.
        key: Key of this tensor and step.
        first: Index of the first element in the whole tensor (row-major), if `values` is a part of
            it; a draw depends on the element's index in the whole tensor.

    Returns:
        bfloat16, in the shape of `values`.
    """
    bits = _bits(values)
    draws = random_bits(key, first, values.numel(), values.device).view(values.shape)
    high = (bits + draws) >> 16
    # Finite values stay finite; infinity and NaN are truncated, which keeps them.
    high = torch.where((high & _MAGNITUDE) >= _INFINITY, _cut(bits), high)
    return _as_bfloat16(torch.where(values.isfinite(), high, _cut(bits)))


def low_bits(values: Tensor) -> Tensor:
    """Return the lower 16 bits of float32 values, as int16, in their shape.

    `join_rounded` joins them with the result of `round_stochastic`.
    """
    return (_bits(values) & 0xFFFF).to(torch.int16)


def join_rounded(high: Tensor, low: Tensor, key: RoundingKey, first: int = 0) -> Tensor:
    """Return the float32 values that `round_stochastic` rounded.

    The draws are repeated to find which values were rounded up. Exact for finite values below the
    second-largest finite bfloat16.

    Args:
        high: bfloat16, result of `round_stochastic` with the same `key` and `first`.
        low: `low_bits` of the values, int16, the same shape.
        key: Key of this tensor and step.
        first: Index of the first element in the whole tensor.
    """
    lower = low.to(torch.int32) & 0xFFFF
    draws = random_bits(key, first, low.numel(), low.device).view(low.shape)
    upper = high.view(torch.int16).to(torch.int32) - ((lower + draws) >> 16)
    return ((upper << 16) | lower).view(torch.float32)


def round_stochastic_float16(values: Tensor, key: RoundingKey, first: int = 0) -> Tensor:
    """Round float32 up or down to float16, so that the expectation is the float32 value.

    Below 2^-14, where float16 is subnormal, probabilities have 16 bits. Values of float16 stay. A
    value whose nearest float16 is finite stays finite.

    Args:
        values: float32, any shape.
        key: Key of this tensor and step.
        first: Index of the first element in the whole tensor.

    Returns:
        float16, in the shape of `values`.
    """
    draws = random_bits(key, first, values.numel(), values.device).view(values.shape)
    nearest = values.to(torch.float16)
    normal = ((_bits(values) + (draws >> 3)) & ~0x1FFF).view(torch.float32)
    # Rounding up from the largest finite float16 would give infinity.
    normal = normal.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16)
    units = values.double().abs() * 2**24  # of the spacing of subnormal numbers
    subnormal = (units + draws / 2**16).floor() / 2**24 * values.double().sign()
    rounded = torch.where(values.abs() < 2**-14, subnormal.float(), normal).to(torch.float16)
    return torch.where(nearest.isfinite(), rounded, nearest)


def random_bits(key: RoundingKey, first: int, count: int, device: torch.device) -> Tensor:
    """Return 16 random bits for `count` elements from index `first` on: int32, [count].

    A keyed hash of the element's index, the same on every device. For a random key the 16 bits of
    an element are exactly uniform.
    """
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    low, high = index.to(torch.int32), (index >> 32).to(torch.int32)  # int32 wraps around
    mixed = _mix(low ^ _signed(key.first)) ^ _signed(key.second) ^ (high * _signed(_GOLDEN))
    return (_mix(mixed) >> 16) & 0xFFFF


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of int32 words (a bijection); shifts are logical."""
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
    """Return the upper 16 bits of float32 bits; a NaN stays a NaN."""
    high = bits >> 16
    is_nan = (bits & 0x7FFFFFFF) > (_INFINITY << 16)
    return torch.where(is_nan & ((high & _PAYLOAD) == 0), high | _QUIET, high)


def _as_bfloat16(high: Tensor) -> Tensor:
    return high.to(torch.int16).view(torch.bfloat16)
