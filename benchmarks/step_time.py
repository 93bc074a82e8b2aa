"""One whole training step of full fine-tuning, PEFT LoRA and MoLF, interleaved in one process.

Each round takes one step (forward, backward, optimizer) of every method in turn, of a Qwen2 of 20M
parameters. Printed are medians and the median of the per-round ratios with its 95% bootstrap
interval, against full fine-tuning with torch's fused AdamW and against LoRA of the same rank.

    python benchmarks/step_time.py [--tokens 2048] [--rank 128] [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
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

LIMITS = {2048: 1.10, 8192: 1.04}  # by tokens, at rank 128: MoLF's step against fft's


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=128)
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
    seconds = interleave(steps, options.rounds)

    print(f"{options.tokens} tokens, rank {options.rank}, {options.rounds} rounds")
    print("method   s/step   x fft (95% interval)")
    for method, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["fft"], strict=True)]
        median, low, high = ratio_interval(ratios)
        print(f"{method:<8} {statistics.median(taken):.3f}   {median:.3f} ({low:.3f}-{high:.3f})")
    at = f"{options.tokens} tokens, rank {options.rank}: MoLF's training step against"
    bars = [Bar.of_ratios(f"{at} LoRA's", 1.0, seconds["molf"], seconds["lora"])]
    if options.rank == 128 and options.tokens in LIMITS:
        limit = LIMITS[options.tokens]
        fft = Bar.of_ratios(f"{at} full fine-tuning's", limit, seconds["molf"], seconds["fft"])
        bars.insert(0, fft)
    report(vars(options), bars, options.json, seconds=seconds)


if __name__ == "__main__":
    main()
