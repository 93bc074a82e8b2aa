"""Time and memory of a step with an assignment, against full fine-tuning, MoLF and PEFT's LoRA.

A random Llama of two layers, width 1,024 (28M parameters): k and v are trained in full, all other
linear layers have LoRA of rank 32, and the rest is frozen, as with LoRA. So 11% of the parameters
are trained. Steps are interleaved in one process. Peak memory is planned, and measured as the live
tensor bytes recorded by torch's profiler, at the length of the timed steps and at a short one,
where weights and states decide.

    python benchmarks/hybrid.py [--tokens 2048] [--length 256] [--rounds 12] [--threads 1]
                                [--keep_memory] [--cpu_time] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import common
import molf
import plan_memory
from common import LENGTH, LR, Bar, fft_step, interleave, lora_step, make_step, molf_step, report
from molf.planning.memory import Planner
from molf.planning.trainable import skeleton
from molf.planning.workload import Workload

RANK = 32
PATTERNS = {
    "full": ["k_proj", "v_proj"],
    "default": {"r": RANK, "alpha": 32},
    "freeze_rest": True,
    "use_rslora": True,
}
TIME_BAR, LORA_BAR, MEMORY_BAR, PLAN_BAR = 0.80, 1.02, 0.5, 0.10
# glibc returns large tensors to the system when they are freed, and page faults of the next ones
# take a tenth of a step, more where there are more temporaries, as in PEFT's layers.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "10000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}


def model_config() -> transformers.LlamaConfig:
    """Return the configuration of the model."""
    return transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def make_model() -> Any:
    """Return the model with random weights."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(model_config())


def full_share_of_products(assignment: molf.Assignment) -> float:
    """Return what full layers add to a step of LoRA in all layers, as a share of its products.

    Per token a trained weight takes two operations per element for its gradient, and factors of
    rank r six per element in forward and backward pass; every weight takes four.
    """
    weights = sum(p.numel() for p in skeleton(model_config()).parameters() if p.dim() == 2)
    factors = {x.name: RANK * sum(x.shape) for x in assignment.entries}
    lora = 4 * weights + 6 * sum(factors.values())
    return sum(2 * x.weights - 6 * factors[x.name] for x in assignment.full) / lora


def measure_time(tokens: int, length: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round by method."""
    model = make_model()
    torch.manual_seed(0)
    batch = torch.randint(0, 4096, (max(1, tokens // length), min(tokens, length)))
    assignment = molf.Assignment.from_patterns(model, PATTERNS)
    print(assignment)
    steps = {
        "fft": fft_step(model, batch),
        "molf": molf_step(model, batch, [RANK]),
        "lora": lora_step(model, batch, RANK),
    }
    adapted = molf.with_assignment(model, assignment)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    print(f"trained: {trained / sum(p.numel() for p in make_model().parameters()):.1%}")
    optimizer = molf.AdamW.from_assignment(adapted, assignment, lr=LR, lora_lr=LR)
    steps["hybrid"] = make_step(adapted, optimizer, batch)
    return interleave(steps, rounds)


def measure_memory(tokens: int, length: int) -> dict[str, dict[str, int]]:
    """Return planned and measured peaks in bytes, by setting."""
    plan_memory.model_config = model_config
    assignment = molf.Assignment.from_patterns(skeleton(model_config()), PATTERNS)
    planner = Planner(model_config())
    found = {}
    for dtype in ("float32", "bfloat16"):
        for method in ("fft", "hybrid"):
            workload = Workload(
                method=method,
                config=None,
                assignment=assignment if method == "hybrid" else None,
                batch_size=max(1, tokens // length),
                length=min(tokens, length),
                device="cpu",
                dtype=dtype,
                padded=False,
            )
            found[f"{method}, {dtype}"] = {
                "planned": planner.memory(workload).peak,
                "measured": plan_memory.measure(workload, "profiler"),
            }
    return found


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sequence")
    parser.add_argument("--short", type=int, default=32, help="tokens where states decide")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu_time", action="store_true", help="on a busy machine, one thread")
    parser.add_argument("--keep_memory", action="store_true", help="malloc keeps freed memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.keep_memory and not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        common.clock = time.process_time
    warnings.simplefilter("ignore")

    load = os.getloadavg()[0]
    assignment = molf.Assignment.from_patterns(skeleton(model_config()), PATTERNS)
    seconds = measure_time(options.tokens, options.length, options.rounds)
    print(f"{options.tokens} tokens, {options.threads} threads, load of the machine {load:.1f}")
    print("method   s/step   of fft   of lora")
    for method, taken in seconds.items():
        ratios = [
            statistics.median(a / b for a, b in zip(taken, seconds[base], strict=True))
            for base in ("fft", "lora")
        ]
        median = statistics.median(taken)
        print(f"{method:<8} {median:.3f}    {ratios[0]:.3f}    {ratios[1]:.3f}")
    name = "a step of hybrid (k, v in full, LoRA of rank 32 elsewhere) against"
    bars = [
        Bar.of_ratios(f"{name} full fine-tuning's", TIME_BAR, seconds["hybrid"], seconds["fft"]),
        Bar.of_ratios(
            f"{name} LoRA's everywhere, 1.02 and the products of full layers",
            round(LORA_BAR + full_share_of_products(assignment), 3),
            seconds["hybrid"],
            seconds["lora"],
        ),
    ]
    memory = {}
    for tokens in (options.short, options.tokens):
        memory[tokens] = peaks = measure_memory(tokens, options.length)
        for setting, found in peaks.items():
            ratio = found["planned"] / found["measured"]
            print(
                f"{tokens:>5} tokens, {setting:<17} {found['measured'] / 2**20:8.1f} MiB measured"
            )
            name = f"{tokens} tokens, {setting}: planned peak against the measured, distance from 1"
            bars.append(Bar.exact(name, PLAN_BAR, abs(ratio - 1)))
    for dtype in ("float32", "bfloat16"):
        own, fft = (memory[options.short][f"{x}, {dtype}"]["measured"] for x in ("hybrid", "fft"))
        name = f"{options.short} tokens, {dtype}: peak of hybrid against full fine-tuning's"
        bars.append(Bar.exact(name, MEMORY_BAR, own / fft))
    report(vars(options), bars, options.json, seconds=seconds, peak_bytes=memory, load=load)


if __name__ == "__main__":
    main()
