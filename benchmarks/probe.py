"""Measure the peak memory of a probe, and its share of the time of a whole job.

Memory: bytes of all live tensors at the peak of a step with the options of `molf probe`, against
full fine-tuning of the same bfloat16 weights (`molf.AdamW`, float32 moments, stochastic rounding;
and torch's AdamW, whose moments are bfloat16 too). Time: steps of a probe and of the training by
its assignment (k and v in full, LoRA elsewhere), in turn, in one process; 30 steps of the former
and 1,000 of the latter are a job. By default a step of the training has four batches, as in `molf
train` (8 x 4 examples), and a step of the probe has one, because steps in the backward pass
accumulate nothing. The training with one batch a step is measured beside it, without a bar.

    python benchmarks/probe.py [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import molf
from common import Bar, Step, interleave, make_batch, make_model, make_step, move_experts, report
from memory import ORDINARY, SETTINGS, SHAPES, LiveBytes, measure
from molf.job.settings.probe import STEPS, ProbeSettings

JOB = 1000  # steps of the training after the probe
SHAPE = {  # of the steps that are timed
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
RANK = 32


def probe_options() -> dict[str, Any]:
    """Return the optimizer's options of `molf probe`."""
    settings = ProbeSettings()
    return {
        "state_dtype": settings.state_dtype,
        "weight_rounding": settings.weight_rounding,
        "optimizer_in_backward": settings.optimizer_in_backward,
    }


def plain_peak(tokens: int) -> float:
    """Return the peak of torch's AdamW on bfloat16 weights, in bytes per parameter."""
    model = make_model(torch.bfloat16, **SHAPES["wide"])
    count = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    batch = make_batch(tokens)

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    live = LiveBytes()
    state = (v for one in optimizer.state.values() for v in one.values())
    for tensor in (*model.parameters(), *model.buffers(), *state):
        live.add(tensor)
    with live:
        step()
    return live.peak / count


def probe_step(dtype: torch.dtype, batch: torch.Tensor) -> Step:
    """Return a step of a probe."""
    model = make_model(dtype, **SHAPE)
    options = probe_options()
    if dtype == torch.float32:
        options["weight_rounding"] = None
    optimizer = molf.MoLFAdamW.from_model(model, molf.MoLFConfig(ranks=(RANK,)), lr=5e-5, **options)
    move_experts(optimizer)
    return make_step(model, optimizer, batch)


def job_step(dtype: torch.dtype, batch: torch.Tensor, batches: int) -> Step:
    """Return a step of the training by an assignment: k and v in full.

    Args:
        dtype: Type of the weights.
        batch: A batch.
        batches: Number of batches of a step, whose gradients are added up.
    """
    model = make_model(dtype, **SHAPE)
    patterns = {"full": ["k_proj", "v_proj"], "default": {"r": RANK, "alpha": RANK}}
    assignment = molf.Assignment.from_patterns(model, patterns)
    adapted = molf.with_assignment(model, assignment)
    optimizer = molf.AdamW.from_assignment(adapted, assignment, lr=1e-5, lora_lr=1e-4)
    last = make_step(adapted, optimizer, batch)

    def step() -> float:
        start = time.perf_counter()
        for _ in range(batches - 1):
            adapted(input_ids=batch, labels=batch).loss.backward()
        last()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Measure memory and time; print the bars."""
    parser = argparse.ArgumentParser(description="Memory and time of a probe.")
    parser.add_argument("--tokens", type=int, default=2048, help="of the timed steps")
    parser.add_argument("--batches", type=int, default=4, help="of a step of the training")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    own = measure(SHAPES["wide"], 32, 128, "molf", torch.bfloat16, **probe_options())
    gc.collect()
    full = measure(SHAPES["wide"], 32, 128, **SETTINGS[ORDINARY])
    gc.collect()
    peaks = {
        "probe": own["peak_bytes_per_parameter"],
        "fft, float32 moments": full["peak_bytes_per_parameter"],
        "fft, bfloat16 moments (torch)": plain_peak(32),
    }
    gc.collect()
    for name, value in peaks.items():
        print(f"{name:32} {value:6.2f} bytes per parameter at the peak", flush=True)
    name = "a probe's peak against full fine-tuning's in bfloat16"
    bars = [Bar.exact(name, 0.6, peaks["probe"] / peaks["fft, float32 moments"])]
    batch, seconds = make_batch(options.tokens), {}
    for name in options.dtypes:
        dtype = getattr(torch, name)
        steps = {
            "probe": probe_step(dtype, batch),
            "hybrid": job_step(dtype, batch, options.batches),
            "hybrid, one batch a step": job_step(dtype, batch, 1),
        }
        taken = seconds[name] = interleave(steps, options.rounds)
        probe = [STEPS * x for x in taken["probe"]]
        for other, limit in (("hybrid", 0.04), ("hybrid, one batch a step", math.inf)):
            job = [JOB * x for x in taken[other]]
            title = f"{name}: {STEPS} steps of a probe against {JOB:,} of {other}"
            bar = Bar.of_ratios(title, limit, probe, job)
            if limit < math.inf:
                bars.append(bar)
            print(f"{bar.value:.3f} ({bar.low:.3f}-{bar.high:.3f})  {title}", flush=True)
        del steps
        gc.collect()
    report(vars(options), bars, options.json, peaks=peaks, seconds=seconds)


if __name__ == "__main__":
    main()
