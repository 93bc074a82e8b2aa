"""The planned memory peak of a training against the measured: a random Qwen2 of 100M parameters.

Two optimizer steps (forward and backward pass with TRL's loss head, clipping, the optimizer) of
each method are measured: on a CPU the live tensor bytes that torch's profiler records (or, with
`--tracker mem_tracker`, torch.distributed's MemTracker: fft and molf alone, as it fails on frozen
parameters, and autograd copies where it watches), on a GPU `max_memory_allocated`. Exits
with 1 if any planned peak is more than 10% off.

    python benchmarks/plan_memory.py [--device cpu|cuda] [--shapes 1x128,2x256] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from torch.distributed._tools.mem_tracker import MemTracker
from trl.trainer.utils import add_fused_lm_head

import molf
from molf.plan.devices import show_bytes
from molf.plan.measure import PeakBytes
from molf.plan.memory import Planner
from molf.plan.workload import METHODS, Workload, method_config

BAR = 0.10
STEPS = 2
RANKS = {"lora": (32,), "molf": (128,), "molf-e": (32, 128)}


def model_config() -> transformers.Qwen2Config:
    """Return the configuration of a Qwen2 of 100M parameters."""
    return transformers.Qwen2Config(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def make_model(workload: Workload) -> Any:
    """Return the model with random weights, as the method trains it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(model_config(), dtype=torch.float32)
    config = workload.config
    if workload.method == "molf-e":
        return molf.with_adapter(model, config)
    if workload.method == "lora" and config is not None:
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.ranks[0],
            lora_alpha=32,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
        )
        return peft.get_peft_model(model, lora)
    return model


def make_optimizer(model: Any, workload: Workload) -> torch.optim.Optimizer:
    """Return the method's optimizer."""
    if workload.method in ("molf", "molf-e"):
        return molf.MoLFAdamW.from_model(model, workload.config, lr=5e-5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=5e-5, fused=True)


def train(model: Any, optimizer: torch.optim.Optimizer, workload: Workload) -> Iterator[None]:
    """Take the steps; yields before each forward pass."""
    size = (workload.batch_size, workload.length)
    ids = torch.randint(0, model_config().vocab_size, size, device=workload.device)
    mask = torch.ones_like(ids)
    if workload.padded:
        mask[0, -workload.length // 8 :] = 0  # a batch holds sequences of several lengths
    for _ in range(STEPS):
        for _ in range(2 if workload.accumulates else 1):
            yield
            with torch.autocast(workload.device, torch.bfloat16, enabled=workload.bf16):
                outputs = model(
                    input_ids=ids,
                    attention_mask=mask,
                    labels=ids,
                    use_cache=False,
                    fused_lm_head=True,
                )
            loss = -outputs.log_probs.sum() / ids.numel()
            del outputs
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def measure(workload: Workload, tracker: str) -> int:
    """Return the measured peak in bytes."""
    model = make_model(workload).to(workload.device).train()
    inner = model.get_base_model() if workload.has_adapter else model
    add_fused_lm_head(inner, outputs=("log_probs", "entropy", "is_top1"))
    if workload.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if workload.has_adapter:
            model.enable_input_require_grads()
    optimizer = make_optimizer(model, workload)
    gc.collect()
    steps = train(model, optimizer, workload)
    if tracker == "mem_tracker":
        memory = MemTracker()
        memory.track_external(model, optimizer)
        with memory:
            for _ in steps:
                memory.reset_mod_stats()  # it refuses a second forward pass else
        return max(snapshot["Total"] for snapshot in memory.get_tracker_snapshot("peak").values())
    held = [*model.parameters(), *model.buffers()]
    peak = PeakBytes(torch.device(workload.device), held)
    with peak:
        for _ in steps:
            pass
    return peak.bytes


def workloads(
    methods: Sequence[str], device: str, shapes: list[tuple[int, int]]
) -> Iterator[Workload]:
    """Yield the methods at every shape, with and without checkpointing."""
    for method in methods:
        for batch_size, length in shapes:
            for checkpointing in (False, True):
                yield Workload(
                    method=method,
                    config=method_config(method, ranks=RANKS.get(method)),
                    batch_size=batch_size,
                    length=length,
                    checkpointing=checkpointing,
                    # One shape accumulates, so that gradients are there in the forward pass.
                    accumulates=batch_size == 1,
                    bf16=device == "cuda",
                    device=device,
                    padded=batch_size > 1,
                )


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", default="1x128,2x256")
    parser.add_argument("--tracker", choices=("profiler", "mem_tracker"), default="profiler")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)

    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    methods = ("fft", "molf") if options.tracker == "mem_tracker" else METHODS
    planner = Planner(model_config())
    rows = []
    print(
        f"{'method':<7} {'batch':>8} {'checkpointing':>13} {'planned':>12} {'measured':>12}  ratio"
    )
    for workload in workloads(methods, options.device, [(b, n) for b, n in shapes]):
        planned = planner.memory(workload)
        measured = measure(workload, options.tracker)
        ratio = planned.peak / measured
        passed = abs(ratio - 1) <= BAR
        rows.append(
            {
                "method": workload.method,
                "batch_size": workload.batch_size,
                "length": workload.length,
                "checkpointing": workload.checkpointing,
                "accumulates": workload.accumulates,
                "planned": planned.record(),
                "measured": measured,
                "ratio": ratio,
                "passed": passed,
            }
        )
        print(
            f"{workload.method:<7} {f'{workload.batch_size}x{workload.length}':>8} "
            f"{'yes' if workload.checkpointing else 'no':>13} {show_bytes(planned.peak):>12} "
            f"{show_bytes(measured):>12}  {ratio:.4f} {'pass' if passed else 'FAIL'}",
            flush=True,
        )
    if options.json:
        results = {
            "settings": {k: v for k, v in vars(options).items() if k != "json"},
            "parameters": planner.shape(
                next(workloads(METHODS, options.device, [(1, 1)]))
            ).parameters,
            "bar": BAR,
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, peft)},
            "machine": torch.cuda.get_device_name()
            if options.device == "cuda"
            else f"{platform.machine()}, {os.cpu_count()} CPUs",
            "rows": rows,
        }
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
