"""Time the optimizer's step alone: MoLF against torch's fused AdamW and the memory's bandwidth.

For each step, the table has its seconds; the bytes that it must move (each phase reads or writes
each of its numbers once; the cache keeps none of them between phases); the operations of its
products; and the time that those bytes and operations take at the speed of a large copy and of a
large product, as a share of the step's time. Both speeds are measured in the same run.

    python benchmarks/optimizer_step.py [--rank 128] [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

import molf
from common import (
    LR,
    Step,
    copy_bandwidth,
    fused_adamw,
    interleave,
    make_model,
    move_experts,
    product_speed,
    ratio_interval,
    report,
)

MOLF = (  # name of the row, winner of all layers, whether LoRA experts have won before
    ("molf, full wins", "full", True),
    ("molf, lora wins", "lora", True),
    ("molf, fresh", "full", False),
)


class Work(NamedTuple):
    """The bytes to move and the operations of a step."""

    bytes: int
    operations: int


def work_of_adamw(model: torch.nn.Module) -> Work:
    """Count 28 bytes per element: read the gradient; read and write weight, m and v."""
    return Work(28 * sum(p.numel() for p in model.parameters()), 0)


def work_of_molf(optimizer: molf.MoLFAdamW, winner: str, *, moved: bool) -> Work:
    """Count a float32 step in which one expert wins all layers.

    `moved` tells whether B of the LoRA experts is nonzero; a step skips products with zeros.
    """
    transfer = operations = 0
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        if group["layer"] is None:
            transfer += (4 + 28) * count  # read by the finite check; then as AdamW
            continue
        weight = group["params"][0]
        rank = sum(group["ranks"])
        factors, one_product = rank * sum(weight.shape), 2 * rank * weight.numel()
        # Gradient: read by the finite check, read for the factors' gradients, and read once more
        # to update both moments, which are read and written.
        transfer += (4 + 4 + 20) * count
        # Factors: read; gradients written, then read to update moments, read and written.
        transfer += (4 + 4 + 20) * factors
        operations += (1 + moved) * one_product
        if winner == "full":  # weight read and written, moments read; s B A read for the decay
            transfer += (8 + 8) * count + 4 * factors
            operations += moved * one_product
        else:  # weight read and written; factors read and written, their moments read
            transfer += 8 * count + (8 + 8) * factors
            operations += 2 * one_product
    return Work(transfer, operations)


def timed(optimizer: torch.optim.Optimizer) -> Step:
    """Return a step of an optimizer whose parameters have gradients."""

    def step() -> float:
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    return step


def with_gradients(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy with the same random gradients for every method."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return model


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = make_model()
    plain = with_gradients(model)
    steps = {"fused AdamW": timed(fused_adamw(plain))}
    work = {"fused AdamW": work_of_adamw(plain)}
    for method, winner, moved in MOLF:
        config = molf.MoLFConfig(ranks=(options.rank,), score=winner)
        optimizer = molf.MoLFAdamW.from_model(with_gradients(model), config, lr=LR)
        if moved:
            move_experts(optimizer)
        steps[method] = timed(optimizer)
        work[method] = work_of_molf(optimizer, winner, moved=moved)
    bandwidth, speed = copy_bandwidth(), product_speed()
    seconds = interleave(steps, options.rounds, warm_up=2)

    print(
        f"rank {options.rank}, {options.rounds} rounds; a copy moves {bandwidth / 1e9:.1f} GB/s, a "
        f"product does {speed / 1e9:.0f} GFLOP/s"
    )
    print("step              ms   x AdamW (95% interval)    MB  GFLOP  memory  with products")
    rows = {}
    for method, taken in seconds.items():
        median = statistics.median(taken)
        pairs = zip(taken, seconds["fused AdamW"], strict=True)
        ratio, low, high = ratio_interval([a / b for a, b in pairs])
        own = work[method]
        memory, products = own.bytes / bandwidth / median, own.operations / speed / median
        rows[method] = {
            **own._asdict(),
            "seconds": median,
            "ratio": ratio,
            "low": low,
            "high": high,
            "share_of_memory_floor": memory,
            "share_with_products": memory + products,
        }
        print(
            f"{method:<16} {median * 1e3:5.1f}   {ratio:.2f} ({low:.2f}-{high:.2f})"
            f"{own.bytes / 1e6:15.0f} {own.operations / 1e9:6.1f} {memory:7.0%}"
            f" {memory + products:14.0%}"
        )
    report(
        vars(options),
        [],
        options.json,
        copy_bytes_per_second=bandwidth,
        product_operations_per_second=speed,
        rows=rows,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
