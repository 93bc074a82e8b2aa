"""One whole training step of full fine-tuning, PEFT LoRA and MoLF, interleaved in one process.

Each round takes one step (forward, backward, optimizer) of every method in turn, so that whatever
else the machine does hits all alike. Printed are medians and, against full fine-tuning with fused
AdamW, the median of the per-round ratios with its 95% bootstrap interval.

    python benchmarks/step_time.py [--tokens 2048] [--rank 128] [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

import molf

LENGTH = 256
BAR = 1.25  # MoLF's step against full fine-tuning's, 2,048 tokens, rank 128


def make_model() -> torch.nn.Module:
    """Return a Qwen2 of 20M parameters with random weights."""
    config = transformers.Qwen2Config(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config).float()


def make_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor
) -> Callable[[], float]:
    """Return a function that takes one training step and gives the seconds it took."""
    model.train()

    def step() -> float:
        start = time.perf_counter()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def make_steps(rank: int, batch: torch.Tensor) -> dict[str, Callable[[], float]]:
    """Return the training step of each method, all from the same weights."""
    model = make_model()
    lora = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=rank, lora_alpha=32, use_rslora=True, target_modules="all-linear"),
    )
    full, routed = copy.deepcopy(model), copy.deepcopy(model)
    adapter = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    config = molf.MoLFConfig(ranks=(rank,))
    return {
        "fft": make_step(full, torch.optim.AdamW(full.parameters(), lr=5e-5, fused=True), batch),
        "lora": make_step(lora, torch.optim.AdamW(adapter, lr=5e-5, fused=True), batch),
        "molf": make_step(routed, molf.MoLFAdamW.from_model(routed, config, lr=5e-5), batch),
    }


def ratio_interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the median of the ratios and its 95% percentile-bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return statistics.median(ratios), float(low), float(high)


def verdict(low: float, high: float, bar: float = BAR) -> str:
    """Say whether an interval lies below the bar, above it, or across it."""
    return "pass" if high <= bar else "fail" if low > bar else "undecided"


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
    batch = torch.randint(0, 4096, (options.tokens // LENGTH, LENGTH))
    steps = make_steps(options.rank, batch)
    for step in steps.values():  # state is made, memory is warmed
        step()
        step()
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for index in range(options.rounds):
        order = list(steps)
        for method in order[index % 3 :] + order[: index % 3]:
            seconds[method].append(steps[method]())

    results: dict[str, object] = {
        "settings": {k: v for k, v in vars(options).items() if k != "json"},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "machine": f"{platform.machine()}, {platform.processor() or 'unknown CPU'}",
        "seconds": seconds,
    }
    print(f"{options.tokens} tokens, rank {options.rank}, {options.rounds} rounds")
    print("method   s/step   x fft (95% interval)")
    for method, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["fft"], strict=True)]
        median, low, high = ratio_interval(ratios)
        results[method] = {"ratio": median, "low": low, "high": high}
        note = f"  bar {BAR}: {verdict(low, high)}" if method == "molf" else ""
        print(
            f"{method:<8} {statistics.median(taken):.3f}   "
            f"{median:.3f} ({low:.3f}-{high:.3f}){note}"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
