"""Elementwise kernels over many tensors per launch.

Each program processes BLOCK elements of one tensor, whose address and strides are in `table`. With
ALIGNED all tensors of the launch are contiguous, with a multiple of 16 elements, at multiples of 16
bytes, and loads are vectors. Otherwise rows may have gaps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from molf.core.execute.triton.device import (
    BLOCKS,
    DECAY,
    FIRST_BLOCK,
    FIRST_INDEX,
    INCREMENT_1,
    INCREMENT_2,
    KEPT,
    KEPT_SQ,
    NEW_SHARE,
    NEW_SQ,
    OLD_1,
    OLD_2,
    SLOT,
    descent,
    elements,
    entry_row,
    load_float32,
    load_weight,
    moved_moments,
    pointers,
    score_term,
    store_weight,
    word,
)


@triton.jit
def squares_kernel(
    table: tl.tensor,
    blocks: tl.tensor,
    partials: tl.tensor,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sum squares; infinity, NaN and overflow survive. Fields: values. Reads g."""
    row, _ = entry_row(table, blocks, 1)
    index, cols, mask = elements(row, ALIGNED, BLOCK)
    values = load_float32(pointers(row, index, cols, 0, BITS, ALIGNED), mask, BITS)
    tl.store(partials + tl.program_id(0), tl.sum(values * values))


@triton.jit
def moments_kernel(
    table: tl.tensor,
    words: tl.tensor,
    blocks: tl.tensor,
    finite: tl.tensor,
    partials: tl.tensor,
    GRAD_BITS: tl.constexpr,
    TERM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update m, v and sum a score's term. Fields: gradient, m, v. Reads g, m, v; writes m, v.

    If `finite` is False nothing is written and the sum is 0.
    """
    partial = 0.0
    # Read before any write: a write could not be undone bit for bit.
    if tl.load(finite):
        row, entry = entry_row(table, blocks, 3)
        index, cols, mask = elements(row, ALIGNED, BLOCK)
        grad_at = pointers(row, index, cols, 0, GRAD_BITS, ALIGNED)
        avg_at = pointers(row, index, cols, 1, 32, ALIGNED)
        sq_at = pointers(row, index, cols, 2, 32, ALIGNED)
        exp_avg, exp_avg_sq = moved_moments(
            load_float32(grad_at, mask, GRAD_BITS),
            load_float32(avg_at, mask, 32),
            load_float32(sq_at, mask, 32),
            word(words, entry, NEW_SHARE),
            word(words, entry, KEPT_SQ),
            word(words, entry, NEW_SQ),
        )
        tl.store(avg_at, exp_avg, mask=mask)
        tl.store(sq_at, exp_avg_sq, mask=mask)
        partial = tl.sum(score_term(exp_avg, exp_avg_sq, TERM))
    tl.store(partials + tl.program_id(0), partial)


@triton.jit
def adamw_kernel(
    table: tl.tensor,
    words: tl.tensor,
    blocks: tl.tensor,
    finite: tl.tensor,
    GRAD_BITS: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Take an AdamW step with decoupled decay. Fields: weight, low half, m, v, gradient.

    With GRAD_BITS = 0 the moments are updated already: reads w, m, v; writes w. Otherwise they are
    updated here: reads w, m, v, g; writes w, m, v.
    """
    if tl.load(finite):
        row, entry = entry_row(table, blocks, 5)
        index, cols, mask = elements(row, ALIGNED, BLOCK)
        avg_at = pointers(row, index, cols, 2, 32, ALIGNED)
        sq_at = pointers(row, index, cols, 3, 32, ALIGNED)
        exp_avg, exp_avg_sq = load_float32(avg_at, mask, 32), load_float32(sq_at, mask, 32)
        if GRAD_BITS > 0:
            grad_at = pointers(row, index, cols, 4, GRAD_BITS, ALIGNED)
            exp_avg, exp_avg_sq = moved_moments(
                load_float32(grad_at, mask, GRAD_BITS),
                exp_avg,
                exp_avg_sq,
                word(words, entry, NEW_SHARE),
                word(words, entry, KEPT_SQ),
                word(words, entry, NEW_SQ),
            )
            tl.store(avg_at, exp_avg, mask=mask)
            tl.store(sq_at, exp_avg_sq, mask=mask)
        WEIGHT_BITS: tl.constexpr = 32 if ROUNDING == "none" else 16
        weight_at = pointers(row, index, cols, 0, WEIGHT_BITS, ALIGNED)
        low_at = pointers(row, index, cols, 1, 16, ALIGNED)
        weight = load_weight(weight_at, low_at, mask, ROUNDING) * word(words, entry, KEPT)
        weight = weight - descent(exp_avg, exp_avg_sq, words, entry)
        whole = index + tl.load(row + FIRST_INDEX)
        store_weight(weight_at, low_at, weight, mask, whole, words, entry, ROUNDING)


@triton.jit
def factor_kernel(
    table: tl.tensor,
    words: tl.tensor,
    blocks: tl.tensor,
    finite: tl.tensor,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Take the AdamW step of a LoRA factor and write two operands of the weight's product.

    Fields: factor P, m, v, two outputs. P becomes `P + dP`; each output is `old P + increment dP`
    with P before the step.
    """
    if tl.load(finite):
        row, entry = entry_row(table, blocks, 5)
        index, cols, mask = elements(row, ALIGNED, BLOCK)
        factor_at = pointers(row, index, cols, 0, 32, ALIGNED)
        exp_avg = load_float32(pointers(row, index, cols, 1, 32, ALIGNED), mask, 32)
        exp_avg_sq = load_float32(pointers(row, index, cols, 2, 32, ALIGNED), mask, 32)
        factor = load_float32(factor_at, mask, 32)
        decay = word(words, entry, DECAY)
        # Not `new - old`, which cancels.
        increment = -descent(exp_avg, exp_avg_sq, words, entry) - decay * factor
        one = word(words, entry, OLD_1) * factor + word(words, entry, INCREMENT_1) * increment
        two = word(words, entry, OLD_2) * factor + word(words, entry, INCREMENT_2) * increment
        tl.store(pointers(row, index, cols, 3, 32, ALIGNED), one, mask=mask)
        tl.store(pointers(row, index, cols, 4, 32, ALIGNED), two, mask=mask)
        tl.store(factor_at, factor + increment, mask=mask)


@triton.jit
def total_kernel(
    table: tl.tensor,
    partials: tl.tensor,
    totals: tl.tensor,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Sum the partial sums of one entry in float64, always in the same order."""
    # One program adds all partial sums in order, so that the last bits do not differ between runs.
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    first, count = tl.load(row + FIRST_BLOCK), tl.load(row + BLOCKS)
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], dtype=tl.float64)
    for start in range(0, count, LANES):
        total += tl.load(partials + first + start + lane, mask=start + lane < count, other=0.0).to(
            tl.float64
        )
    tl.store(totals + tl.load(row + SLOT), tl.sum(total))
