"""Cost of the routing scores: time that each adds to a training step, against EPD.

Each round takes one optimizer step with every score in turn, on a Qwen2 of 20M parameters. The cost
of a score is the median difference of its optimizer step to EPD's, divided by EPD's whole step
(forward, backward, optimizer) on `--tokens` tokens.

    python benchmarks/score_cost.py [--tokens 2048] [--rank 128] [--rounds 30] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch

from common import Bar, make_batch, make_model, move_experts, ratio_interval, report
from molf import MoLFAdamW, MoLFConfig
from molf.core.scores.registry import SCORES

LIMIT = 0.01  # of a training step on 2,048 tokens


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    batch, base = make_batch(options.tokens), make_model()
    texts = [*SCORES, "share:0.2:gsnr", "shuffled:gsnr"]
    optimizers = {}
    for text in texts:
        model = copy.deepcopy(base)
        config = MoLFConfig(ranks=options.rank, score=text, target_modules="all-linear")
        optimizers[text] = MoLFAdamW.from_model(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        move_experts(optimizers[text])
    seconds: dict[str, list[float]] = {text: [] for text in texts}
    for number in range(options.rounds + 2):
        for text in texts:
            start = time.perf_counter()
            optimizers[text].step()
            if number >= 2:  # the first rounds create state and warm up
                seconds[text].append(time.perf_counter() - start)
    passes = []
    for _ in range(5):
        start = time.perf_counter()
        base(input_ids=batch, labels=batch).loss.backward()
        passes.append(time.perf_counter() - start)
    whole = statistics.median(passes) + statistics.median(seconds["epd"])

    print(f"{options.tokens} tokens, rank {options.rank}: {whole:.3f} s a step with epd")
    print("score            ms/optimizer step   share of a step (95% interval)")
    bars = []
    for text in texts:
        added = [(a - b) / whole for a, b in zip(seconds[text], seconds["epd"], strict=True)]
        median, low, high = ratio_interval(added)
        shown = f"{median:+.2%} ({low:+.2%} to {high:+.2%})"
        print(f"{text:<16} {statistics.median(seconds[text]) * 1e3:8.1f}            {shown}")
        name = f"{options.tokens} tokens: time that score={text} adds to a step with epd"
        bars.append(Bar(name, LIMIT, median, low, high))
    report(vars(options), bars, options.json, seconds=seconds)


if __name__ == "__main__":
    main()
