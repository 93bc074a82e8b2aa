"""A long training of a small model at full logging: memory, open files and time of its steps.

    python benchmarks/soak.py [--steps 2000] [--json FILE] [--without-time] [-- OPTIONS]

OPTIONS are those of molf train. Each step is logged, routed and measured for lost updates; a
checkpoint is written every 100 steps. The mean of the resident memory in the last quarter of the
steps is compared with that in the second quarter. It ends with status 1 if the memory grew by more
than 1%, if more files are open at the end than after a quarter, or if a log lacks a step; and,
unless --without-time is given, if steps became slower. Their time is the processor time of the
process, which other processes change less than the elapsed time (see `slowdown`).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from common import environment
from molf.cli import main as molf
from molf.job import training
from molf.job.record.routing_log import read_routing
from molf.world import BASE_PATH

RESULTS = Path(__file__).parent / "results" / "soak_cpu.json"
GROWTH = 1.01
SLOWER = 1.05
WINDOW = 25  # steps
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Watch(TrainerCallback):
    """Notes time, resident memory, open files and Python objects.

    Attributes:
        seconds: Processor time of each step, of all threads.
        elapsed: Time of each step.
        resident: Resident memory after each step, in bytes.
        files: Open files after each step.
        objects: Objects of Python's collector after each quarter of the steps.
    """

    def __init__(self, steps: int) -> None:
        self.seconds: list[float] = []
        self.elapsed: list[float] = []
        self.resident: list[int] = []
        self.files: list[int] = []
        self.objects: list[int] = []
        self._every = steps // 4
        self._last = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure."""
        self.seconds.append(time.process_time() - self._last[0])
        self.elapsed.append(time.perf_counter() - self._last[1])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        self.files.append(len(os.listdir("/proc/self/fd")))
        if state.global_step % self._every == 0:
            gc.collect()
            self.objects.append(len(gc.get_objects()))
        self._last = time.process_time(), time.perf_counter()


def slowdown(seconds: Sequence[float]) -> tuple[float, float]:
    """Return how much slower steps are in the last quarter than in the second, and its bar.

    Both are ratios. Medians of windows leave out checkpoints and other rare steps. The bar is 5%,
    and three standard errors of the difference of the two medians, from the quartiles of the
    windows: on a machine whose windows differ more, less can be decided.
    """
    size = len(seconds) // 4
    middles, errors = [], []
    for start in (size, 3 * size):
        part = seconds[start : start + size]
        windows = [
            statistics.median(part[n : n + WINDOW]) for n in range(0, size - WINDOW + 1, WINDOW)
        ]
        low, middle, high = statistics.quantiles(windows, n=4)
        middles.append(middle)
        # The median of n normal values has the error 1.25 s / sqrt(n); s is 0.74 of the quartiles.
        errors.append(1.25 * 0.74 * (high - low) / len(windows) ** 0.5)
    error = math.hypot(*errors) / middles[0]
    return middles[1] / middles[0], SLOWER + 3 * error


def quarters(values: Sequence[float]) -> list[float]:
    """Return the mean of each quarter of the values."""
    size = len(values) // 4
    return [statistics.mean(values[place * size : (place + 1) * size]) for place in range(4)]


def medians(seconds: Sequence[float]) -> list[float]:
    """Return the median of each quarter, in milliseconds."""
    size = len(seconds) // 4
    parts = (seconds[place * size : (place + 1) * size] for place in range(4))
    return [round(1e3 * statistics.median(part), 2) for part in parts]


def small_model(folder: Path) -> Path:
    """Write a random small model with the embedded base's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        **SIZES,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def soak(folder: Path, steps: int, further: Sequence[str]) -> dict[str, Any]:
    """Train and return the figures."""
    watch, run = Watch(steps), folder / "run"
    train = training.run_training
    training.run_training = partial(train, callbacks=[watch])
    options = [
        *("train", "--task", "demo-fact", "--model", str(small_model(folder / "base"))),
        *("--ranks", "4,8", "--alpha", "8", "--max_steps", str(steps), "--logging_steps", "1"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
        *("--save_steps", "100", "--save_total_limit", "2", "--max_eval_samples", "2"),
        *("--no-spectra", "--output_dir", str(run), *further),
    ]
    code = molf(options)
    assert code == 0, code
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    routed = pc.unique(read_routing(run)["step"]).to_pylist()
    resident, files = quarters(watch.resident), watch.files
    ratio, bar = slowdown(watch.seconds)
    return {
        "steps": steps,
        "resident_mb": [round(mean / 1e6, 2) for mean in resident],
        "growth": resident[3] / resident[1],
        "files_after_a_quarter": max(files[steps // 4 : steps // 2]),
        "files_at_the_end": max(files[-steps // 4 :]),
        "objects": watch.objects,
        "step_ms": medians(watch.elapsed),
        "step_cpu_ms": medians(watch.seconds),
        "slowdown": ratio,
        "slowdown_bar": bar,
        "logs_are_complete": logged == [*range(1, steps + 1)] and routed == [*range(steps)],
    }


def main() -> int:
    """Train, print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--without-time", action="store_true", help="no status from the time")
    parser.add_argument("further", nargs="*", help="options of molf train, behind --")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), args.steps, args.further)
    for name, value in found.items():
        print(f"{name}: {value}")
    args.json.write_text(json.dumps({**found, **environment()}, indent=1) + "\n", encoding="utf-8")
    is_flat = found["growth"] <= GROWTH
    has_same_files = found["files_at_the_end"] <= found["files_after_a_quarter"]
    keeps_time = args.without_time or found["slowdown"] <= found["slowdown_bar"]
    is_fine = is_flat and has_same_files and found["logs_are_complete"] and keeps_time
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
