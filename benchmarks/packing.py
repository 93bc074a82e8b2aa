"""Time the passes over the same examples: padded, by length, without padding, and packed.

Each round runs forward and backward passes over all examples in each way in turn, with TRL's
batches and loss, on a Qwen2 of 4M parameters and one thread. The lengths are drawn from a
log-normal distribution, as those of conversations. The table has the tokens per second of CPU time,
without padding, and the median of the per-round ratios to padded batches with its 95% bootstrap
interval.

    python benchmarks/packing.py [--examples 64] [--median 64] [--max_length 512] [--batch 8]
        [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from common import Step, interleave, make_model, ratio_interval, report
from molf.data.packing import pack
from molf.job.trainer.split_data import LengthGroups

_SPREAD = 0.8  # standard deviation of the logarithm of the lengths
_STEP = 4  # batches of a step, which are grouped by length together

Batches = list[dict[str, Any]]


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--median", type=int, default=64, help="tokens of the median example")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    model = make_model(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        max_position_embeddings=options.max_length,
    )
    add_fused_lm_head(model)
    lengths = make_lengths(options.examples, options.median, options.max_length)
    steps = {
        name: make_pass(model, batches)
        for name, batches in make_batches(lengths, options.batch, options.max_length).items()
    }
    seconds = interleave(steps, options.rounds)

    tokens = sum(lengths)
    print(
        f"{options.examples} examples of {min(lengths)} to {max(lengths)} tokens, {tokens} in all, "
        f"{options.rounds} rounds"
    )
    print("batches                         tokens/s   x padded (95% interval)")
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(seconds["padded"], taken, strict=True)]
        median, low, high = ratio_interval(ratios)
        rate = tokens / statistics.median(taken)
        print(f"{name:<30} {rate:>9,.0f}   {median:.2f} ({low:.2f}-{high:.2f})")
    report(vars(options), [], options.json, seconds=seconds, tokens=tokens)


def make_lengths(count: int, median: int, most: int) -> list[int]:
    """Return lengths of examples in tokens, at least 8."""
    draw = random.Random(0)
    drawn = (int(median * draw.lognormvariate(0, _SPREAD)) for _ in range(count))
    return [min(max(length, 8), most) for length in drawn]


def make_batches(lengths: list[int], size: int, most: int) -> dict[str, Batches]:
    """Return the batches of all examples, by the way in which they are made."""
    draw = random.Random(1)
    rows = [[draw.randrange(4096) for _ in range(length)] for length in lengths]
    drawn = list(range(len(rows)))
    draw.shuffle(drawn)
    grouped = list(LengthGroups(lengths, size * _STEP, 0))
    packed = pack(lengths, most)
    draw.shuffle(packed)
    padded, joined = (
        DataCollatorForLanguageModeling(0, padding_free=is_joined) for is_joined in (False, True)
    )

    def divided(order: Sequence[Any], count: int) -> list[Sequence[Any]]:
        return [order[start : start + count] for start in range(0, len(order), count)]

    def examples(order: Sequence[int]) -> list[dict[str, Any]]:
        return [{"input_ids": rows[position], "labels": rows[position]} for position in order]

    found = {
        "padded": [padded(examples(part)) for part in divided(drawn, size)],
        "by length": [padded(examples(part)) for part in divided(grouped, size)],
        "padding-free": [joined(examples(part)) for part in divided(drawn, size)],
    }
    for count in (1, size):
        name = f"packed, {count} x {most} tokens"
        found[name] = [
            joined(examples([position for row in part for position in row]))
            for part in divided(packed, count)
        ]
    return found


def make_pass(model: Any, batches: Batches) -> Step:
    """Return a forward and backward pass over all batches, with the loss of TRL's trainer."""

    def run() -> float:
        start = time.process_time()  # other processes do not count
        for batch in batches:
            outputs = model(**batch, use_cache=False, fused_lm_head=True)
            (-outputs.log_probs.sum()).backward()
        model.zero_grad()
        return time.process_time() - start

    return run


if __name__ == "__main__":
    main()
