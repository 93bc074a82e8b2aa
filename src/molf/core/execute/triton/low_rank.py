"""Kernel that writes a routed weight and computes the low-rank product."""

from __future__ import annotations

import triton
import triton.language as tl

from molf.core.execute.triton.device import (
    ADDRESS,
    ALPHA,
    COLS,
    FIELD,
    FIRST_BLOCK,
    FIRST_INDEX,
    HEADER,
    INNER,
    IS_FULL,
    KEPT,
    ROWS,
    STRIDE_0,
    STRIDE_1,
    descent,
    entry_row,
    load_weight,
    store_weight,
    word,
)


@triton.jit
def low_rank_kernel(
    table: tl.tensor,
    words: tl.tensor,
    blocks: tl.tensor,
    finite: tl.tensor,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
) -> None:
    """Update `W <- kept W + alpha left @ right - update`, rounded once; the update if `full` won.

    Fields: weight [rows, cols], low half, m, v, left [rows, K], right [K, cols]. Reads w, both
    operands and, for `full`, m and v; writes w. Each program writes a tile of the weight.
    """
    if tl.load(finite):
        row, entry = entry_row(table, blocks, 6)
        rows, cols = tl.load(row + ROWS), tl.load(row + COLS)
        if ALIGNED:
            cols = tl.multiple_of(cols, 16)
        tile = tl.program_id(0) - tl.load(row + FIRST_BLOCK)
        across = (cols + BLOCK_COLS - 1) // BLOCK_COLS
        r = (tile // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        c = (tile % across) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        mask = (r[:, None] < rows) & (c[None, :] < cols)
        index = r[:, None] * cols + c[None, :]

        left_at: tl.constexpr = HEADER + 4 * FIELD
        right_at: tl.constexpr = HEADER + 5 * FIELD
        left = tl.load(row + left_at + ADDRESS).to(tl.pointer_type(tl.float32))
        right = tl.load(row + right_at + ADDRESS).to(tl.pointer_type(tl.float32))
        left += r[:, None] * tl.load(row + left_at + STRIDE_0)
        right += c[None, :] * tl.load(row + right_at + STRIDE_1)
        left_step = tl.load(row + left_at + STRIDE_1)
        right_step = tl.load(row + right_at + STRIDE_0)
        inner = tl.load(row + INNER)
        # In this kernel, because a separate product would read and write the weight once more.
        product = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
        for start in range(0, inner, BLOCK_INNER):
            k = start + tl.arange(0, BLOCK_INNER)
            left_part = tl.load(
                left + k[None, :] * left_step,
                mask=(r[:, None] < rows) & (k[None, :] < inner),
                other=0.0,
            )
            right_part = tl.load(
                right + k[:, None] * right_step,
                mask=(k[:, None] < inner) & (c[None, :] < cols),
                other=0.0,
            )
            # `ieee`: Triton's default is TF32.
            product = tl.dot(left_part, right_part, product, input_precision="ieee")

        WEIGHT_BITS: tl.constexpr = 32 if ROUNDING == "none" else 16
        weight_at = tile_pointers(row, index, 0, WEIGHT_BITS, ALIGNED)
        low_at = tile_pointers(row, index, 1, 16, ALIGNED)
        weight = load_weight(weight_at, low_at, mask, ROUNDING) * word(words, entry, KEPT)
        weight += word(words, entry, ALPHA) * product
        if tl.load(row + IS_FULL) != 0:
            exp_avg = tl.load(tile_pointers(row, index, 2, 32, ALIGNED), mask=mask, other=0.0)
            exp_avg_sq = tl.load(tile_pointers(row, index, 3, 32, ALIGNED), mask=mask, other=0.0)
            weight -= descent(exp_avg, exp_avg_sq, words, entry)
        whole = index + tl.load(row + FIRST_INDEX)
        store_weight(weight_at, low_at, weight, mask, whole, words, entry, ROUNDING)


@triton.jit
def tile_pointers(
    row: tl.tensor,
    index: tl.tensor,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Return pointers to a tile of a contiguous field."""
    address = tl.load(row + HEADER + INDEX * FIELD + ADDRESS)
    if BITS == 16:
        base = address.to(tl.pointer_type(tl.uint16))
    else:
        base = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + index
