"""Time whole training steps of full fine-tuning, PEFT LoRA and MoLF, interleaved in one process.

Each round takes one step (forward, backward, optimizer) of each method in turn, on a Qwen2 of 20M
parameters. The table has medians and the median of the per-round ratios with its 95% bootstrap
interval, against full fine-tuning with torch's fused AdamW and against LoRA of the same rank. All
of MoLF's LoRA experts have won before. `--fresh` adds a step in which none has, as at the start of
a run or where `full` always wins; it has fewer products.

    python benchmarks/step_time.py [--tokens 2048] [--rank 128] [--fresh] [--rounds 15]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from common import (
    Bar,
    fft_step,
    interleave,
    lora_step,
    make_batch,
    make_model,
    molf_step,
    ratio_interval,
    report,
)

LIMITS = {2048: 1.10, 8192: 1.04}  # tokens: largest ratio of MoLF's step to fft's, at rank 128


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--fresh", action="store_true", help="add MoLF before any LoRA win")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    batch, model = make_batch(options.tokens), make_model()
    steps = {
        "fft": fft_step(model, batch),
        "lora": lora_step(model, batch, options.rank),
        "molf": molf_step(model, batch, (options.rank,)),
    }
    if options.fresh:
        steps["molf, fresh"] = molf_step(model, batch, (options.rank,), moved=False)
    seconds = interleave(steps, options.rounds)

    print(f"{options.tokens} tokens, rank {options.rank}, {options.rounds} rounds")
    print("method        s/step   x fft (95% interval)")
    for method, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["fft"], strict=True)]
        median, low, high = ratio_interval(ratios)
        print(f"{method:<13} {statistics.median(taken):.3f}   {median:.3f} ({low:.3f}-{high:.3f})")
    report(vars(options), bars_of(options, seconds), options.json, seconds=seconds)


def bars_of(options: argparse.Namespace, seconds: Mapping[str, list[float]]) -> list[Bar]:
    """Return the bars of MoLF's step with the measured values."""
    at = f"{options.tokens} tokens, rank {options.rank}: MoLF's training step"
    limit = LIMITS.get(options.tokens) if options.rank == 128 else None
    bars = []
    for method in [name for name in seconds if name.startswith("molf")]:
        own = at + (" while no LoRA expert has won" if method == "molf, fresh" else "")
        if limit is not None:
            name = f"{own} against full fine-tuning's"
            bars.append(Bar.of_ratios(name, limit, seconds[method], seconds["fft"]))
        bars.append(Bar.of_ratios(f"{own} against LoRA's", 1.0, seconds[method], seconds["lora"]))
    return bars


if __name__ == "__main__":
    main()
