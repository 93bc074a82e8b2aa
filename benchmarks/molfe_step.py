"""Time a training step of MoLF-Efficient against PEFT LoRA of the summed rank under fused AdamW.

Both train the same adapter (rank, dropout, targets, checkpointing), so only the optimizers differ.
Steps are interleaved in one process; the table has medians and the median of the per-round ratios
with its 95% bootstrap interval. Peak memory is measured in new processes, a few for each method; on
a CPU it is the growth of resident memory since the libraries were imported.

    python benchmarks/molfe_step.py [--ranks 32,128] [--tokens 2048] [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import molf
from common import LR, Bar, Step, fused_adamw, interleave, make_batch, make_model, make_step, report

METHODS = ("lora", "molf-e")
BAR = 1.03  # largest ratio of times
MEMORY_BAR = 1.02


def make(method: str, options: argparse.Namespace) -> Step:
    """Return a method's training step; weights and batch are the same for both methods."""
    ranks = tuple(map(int, options.ranks.split(",")))
    config = molf.MoLFConfig(ranks=ranks, lora_dropout=options.dropout, freeze_base=True)
    batch = make_batch(options.tokens).to(options.device)
    base = make_model().to(options.device)
    if options.gradient_checkpointing:
        kwargs = {"use_reentrant": False}
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model = molf.with_adapter(base, config)
    if method == "molf-e":
        optimizer: torch.optim.Optimizer = molf.MoLFAdamW.from_model(model, config, lr=LR)
    else:
        optimizer = fused_adamw(model)
    return make_step(model, optimizer, batch)


def measure_memory(method: str, options: argparse.Namespace) -> int:
    """Return the peak memory of a method's training in this process, in bytes."""
    if options.device == "cuda":
        make_and_step(method, options)
        return torch.cuda.max_memory_allocated()
    before = _resident()
    make_and_step(method, options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def make_and_step(method: str, options: argparse.Namespace) -> None:
    """Take three steps; the first creates the state."""
    step = make(method, options)
    for _ in range(3):
        step()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory_of(method: str, options: argparse.Namespace) -> int:
    """Measure a method's peak memory in a new process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", method]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(found.stdout)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", default="32,128")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory_runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory_of", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(measure_memory(options.memory_of, options))
        return
    seconds = interleave({method: make(method, options) for method in METHODS}, options.rounds)
    memory = {
        method: [memory_of(method, options) for _ in range(options.memory_runs)]
        for method in METHODS
    }
    peaks = {method: statistics.median(found) for method, found in memory.items()}

    print(f"{options.tokens} tokens, ranks {options.ranks}, {options.rounds} rounds")
    print("method   s/step   peak MiB")
    for method in METHODS:
        median = statistics.median(seconds[method])
        print(f"{method:<8} {median:.3f}   {peaks[method] / 2**20:,.0f}")
    at = f"{options.tokens} tokens, ranks {options.ranks}: MoLF-E's"
    other = "one LoRA's of the summed rank"
    bars = [
        Bar.of_ratios(
            f"{at} training step against {other}", BAR, seconds["molf-e"], seconds["lora"]
        ),
        Bar.exact(f"{at} peak memory against {other}", MEMORY_BAR, peaks["molf-e"] / peaks["lora"]),
    ]
    settings = {key: value for key, value in vars(options).items() if key != "memory_of"}
    report(settings, bars, options.json, seconds=seconds, peak_bytes=memory)


if __name__ == "__main__":
    main()
