"""Device functions of the kernels: reading the table, AdamW's arithmetic, rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from molf.core.scores.score import SCORE_EPS

# Columns of a table row (`table.py` writes them): the header, then three for every field.
SLOT = tl.constexpr(0)  # index of the entry's number in the result
FIRST_BLOCK = tl.constexpr(1)
BLOCKS = tl.constexpr(2)
ROWS = tl.constexpr(3)
COLS = tl.constexpr(4)
FIRST_INDEX = tl.constexpr(5)  # of the entry's first element in the whole tensor
INNER = tl.constexpr(6)  # K of a low-rank product [rows, K] @ [K, cols]
IS_FULL = tl.constexpr(7)  # whether the write uses moments
HEADER = tl.constexpr(8)
ADDRESS = tl.constexpr(0)
STRIDE_0 = tl.constexpr(1)
STRIDE_1 = tl.constexpr(2)
FIELD = tl.constexpr(3)

# Words of an entry that may change with every step: float32, except the rounding key.
NEW_SHARE = tl.constexpr(0)  # 1 - b1
KEPT_SQ = tl.constexpr(1)  # b2
NEW_SQ = tl.constexpr(2)  # 1 - b2
KEPT = tl.constexpr(3)  # 1 - lr wd
DECAY = tl.constexpr(4)  # lr wd
STEP_SIZE = tl.constexpr(5)  # lr / (1 - b1^t)
INVERSE_CORRECTION = tl.constexpr(6)  # 1 / sqrt(1 - b2^t)
EPS = tl.constexpr(7)
OLD_1 = tl.constexpr(8)  # coefficients of a value and its increment in two outputs
INCREMENT_1 = tl.constexpr(9)
OLD_2 = tl.constexpr(10)
INCREMENT_2 = tl.constexpr(11)
ALPHA = tl.constexpr(12)  # of a low-rank product
KEY_FIRST = tl.constexpr(13)
KEY_SECOND = tl.constexpr(14)
WORDS = tl.constexpr(15)

_SCORE_EPS = tl.constexpr(SCORE_EPS)
_MIX_1 = tl.constexpr(0x85EBCA6B)  # as in molf.core.storage.rounding
_MIX_2 = tl.constexpr(0xC2B2AE35)
_GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def entry_row(
    table: tl.tensor, blocks: tl.tensor, FIELDS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the table row and the index of this program's entry."""
    entry = tl.load(blocks + tl.program_id(0)).to(tl.int64)
    return table + entry * (HEADER + FIELDS * FIELD), entry


@triton.jit
def word(words: tl.tensor, entry: tl.tensor, COLUMN: tl.constexpr) -> tl.tensor:
    """Return one float32 number of an entry."""
    return tl.load(words + entry * WORDS + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def key(words: tl.tensor, entry: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the two unsigned words of an entry's rounding key."""
    first = tl.load(words + entry * WORDS + KEY_FIRST)
    second = tl.load(words + entry * WORDS + KEY_SECOND)
    return first.to(tl.uint32, bitcast=True), second.to(tl.uint32, bitcast=True)


@triton.jit
def elements(
    row: tl.tensor, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the indices of this program's elements, the columns of the entry, and the mask."""
    block = tl.program_id(0) - tl.load(row + FIRST_BLOCK)
    index = block * BLOCK + tl.arange(0, BLOCK)
    cols = tl.load(row + COLS)
    count = cols * tl.load(row + ROWS)
    if ALIGNED:
        # Contiguous with a multiple of 16 elements: the mask is constant within a vector load.
        count = tl.multiple_of(cols, 16)
    return index, cols, index < count


@triton.jit
def pointers(
    row: tl.tensor,
    index: tl.tensor,
    cols: tl.tensor,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Return pointers to the elements of field INDEX, as float32 or (BITS = 16) as words."""
    column: tl.constexpr = HEADER + INDEX * FIELD
    address = tl.load(row + column + ADDRESS)
    if BITS == 16:
        base = address.to(tl.pointer_type(tl.uint16))
    else:
        base = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        found = tl.multiple_of(base, 16) + index
    else:
        found = base + (index // cols) * tl.load(row + column + STRIDE_0) + index % cols
    return found


@triton.jit
def load_float32(source: tl.tensor, mask: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Load float32, or (BITS = 16) bfloat16 as float32; zeros where masked."""
    # bfloat16 as 16-bit words and integer arithmetic: the same bits on every GPU and in Triton's
    # interpreter.
    if BITS == 16:
        high = tl.load(source, mask=mask, other=0).to(tl.uint32)
        value = (high << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(source, mask=mask, other=0.0)
    return value


@triton.jit
def moved_moments(
    grad: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    new_share: tl.tensor,
    kept_sq: tl.tensor,
    new_sq: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Return `m + (1 - b1)(g - m)` and `b2 v + (1 - b2) g*g`."""
    change = grad - exp_avg
    # As torch.lerp: from the nearer end, so that with b1 = 0 m is exactly g.
    near, far = exp_avg + new_share * change, grad - (1 - new_share) * change
    return tl.where(new_share < 0.5, near, far), exp_avg_sq * kept_sq + (new_sq * grad) * grad


@triton.jit
def score_term(exp_avg: tl.tensor, exp_avg_sq: tl.tensor, TERM: tl.constexpr) -> tl.tensor:
    """Return a term. Descent: `m^2 / (sqrt(v) + eps)`. Norm: `(m / (sqrt(v) + eps))^2`."""
    # `sqrt_rn` and `div_rn` are correctly rounded, as in torch; Triton's `/` and `sqrt` are not.
    preconditioned = tl.div_rn(exp_avg, tl.sqrt_rn(exp_avg_sq) + _SCORE_EPS)
    return preconditioned * (preconditioned if TERM == "norm" else exp_avg)


@triton.jit
def descent(
    exp_avg: tl.tensor, exp_avg_sq: tl.tensor, words: tl.tensor, entry: tl.tensor
) -> tl.tensor:
    """Return AdamW's update `lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`."""
    root = tl.sqrt_rn(exp_avg_sq) * word(words, entry, INVERSE_CORRECTION)
    return word(words, entry, STEP_SIZE) * tl.div_rn(exp_avg, root + word(words, entry, EPS))


@triton.jit
def load_weight(
    weight: tl.tensor, low: tl.tensor, mask: tl.tensor, ROUNDING: tl.constexpr
) -> tl.tensor:
    """Load a weight as float32, joined with its low half if rounding is exact."""
    if ROUNDING == "none":
        value = tl.load(weight, mask=mask, other=0.0)
    else:
        bits = tl.load(weight, mask=mask, other=0).to(tl.uint32) << 16
        if ROUNDING == "exact":
            lower = tl.load(low, mask=mask, other=0).to(tl.uint32)
            # A negative remainder borrows from the high half. A NaN stays a NaN.
            lower = tl.where(lower >= 0x8000, lower | 0xFFFF0000, lower)
            # Something else may have set the weight to zero, which a negative remainder would turn
            # into a NaN.
            is_zero = (bits & 0x7FFFFFFF) == 0
            lower = tl.where(is_zero & (lower >= 0x8000), 0, lower)
            bits = tl.add(bits, lower, sanitize_overflow=False)
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def store_weight(
    weight: tl.tensor,
    low: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    index: tl.tensor,
    words: tl.tensor,
    entry: tl.tensor,
    ROUNDING: tl.constexpr,
) -> None:
    """Store float32 values, or round them to bfloat16 in one of three ways.

    `index` (int64, in the shape of `value`) is each element's index in the whole tensor.
    """
    if ROUNDING == "none":
        tl.store(weight, value, mask=mask)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        cut = bits >> 16
        hidden_nan = (magnitude > 0x7F800000) & ((cut & 0x7F) == 0)
        cut = tl.where(hidden_nan, cut | 0x40, cut)  # stays a NaN
        if ROUNDING == "exact":
            nearest = tl.add(bits, 0x8000, sanitize_overflow=False) >> 16
            high = tl.where(magnitude > 0x7F800000, cut, nearest)
            # The remainder's 16 bits are the low bits, for either sign.
            tl.store(low, (bits & 0xFFFF).to(tl.uint16), mask=mask)
        elif ROUNDING == "nearest":
            even = 0x7FFF + ((bits >> 16) & 1)
            nearest = tl.add(bits, even, sanitize_overflow=False) >> 16
            high = tl.where(magnitude > 0x7F800000, cut, nearest)
        else:
            drawn = tl.add(bits, draws(index, words, entry), sanitize_overflow=False) >> 16
            # Finite values stay finite; infinity and NaN are truncated, which keeps them.
            stays = (magnitude >= 0x7F800000) | ((drawn & 0x7FFF) >= 0x7F80)
            high = tl.where(stays, cut, drawn)
        tl.store(weight, high.to(tl.uint16), mask=mask)


@triton.jit
def draws(index: tl.tensor, words: tl.tensor, entry: tl.tensor) -> tl.tensor:
    """Return 16 random bits per element: `molf.core.storage.rounding.random_bits`, bit for bit."""
    first, second = key(words, entry)
    upper = (index >> 32).to(tl.uint32)
    spread = tl.mul(upper, _GOLDEN, sanitize_overflow=False)
    mixed = mix(index.to(tl.uint32) ^ first) ^ second ^ spread
    return mix(mixed) >> 16


@triton.jit
def mix(x: tl.tensor) -> tl.tensor:
    """Mix the bits of unsigned 32-bit words (a bijection)."""
    x = tl.mul(x ^ (x >> 16), _MIX_1, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 13), _MIX_2, sanitize_overflow=False)
    return x ^ (x >> 16)
