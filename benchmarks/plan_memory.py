"""Compare planned and measured memory peaks of training a random Qwen2 of 100M parameters.

Two optimizer steps of each setting are measured: forward and backward pass with TRL's loss head,
clipping, and the optimizer. On a GPU the peak is `max_memory_allocated`. On a CPU it is the live
tensor bytes recorded by torch's profiler, or with `--tracker mem_tracker` by torch.distributed's
MemTracker (fft and molf in float32 only: it fails on frozen parameters, and causes extra copies in
autograd). The exit code is 1 if a planned peak is more than 10% off.

    python benchmarks/plan_memory.py [--device cpu|cuda] [--shapes 1x128,2x256] [--json FILE]
                                     [--settings "fft;molf, 8-bit states"] [--layers 12]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
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
from molf.amounts import binary_size
from molf.core.model.quantised import keep_differentiable
from molf.job.settings.settings import TrainSettings
from molf.planning.measure import PeakBytes, held_tensors
from molf.planning.memory import Planner
from molf.planning.trainable import skeleton
from molf.planning.workload import METHODS, Workload

BAR = 0.10
STEPS = 2
LAYERS = 12
RANKS = {"lora": (32,), "molf": (128,), "molf-e": (32, 128)}
_SMALL: dict[str, Any] = {
    "dtype": "bfloat16",
    "weight_rounding": "stochastic",
    "state_dtype": "8bit",
    "optimizer_in_backward": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    **{
        f"{method}, {words}": {"method": method, **options}
        for method in ("fft", "molf")
        for words, options in (
            ("8-bit states", {"state_dtype": "8bit"}),
            ("in backward", {"optimizer_in_backward": True}),
            ("8-bit states, in backward", {"state_dtype": "8bit", "optimizer_in_backward": True}),
            ("bfloat16 exact", {"dtype": "bfloat16"}),
            (
                "bfloat16 exact, float32 gradients",
                {"dtype": "bfloat16", "grad_accumulation_dtype": "float32"},
            ),
            ("bfloat16 stochastic, 8-bit states, in backward", _SMALL),
        )
    },
    **{
        f"{method}, {bits}-bit base": {"method": method, "quantised": f"load_in_{bits}bit"}
        for method in ("lora", "molf-e", "hybrid")
        for bits in (4, 8)
    },
    "hybrid, bfloat16 exact": {"method": "hybrid", "dtype": "bfloat16"},
    "hybrid, 4-bit base, bfloat16 exact": {
        "method": "hybrid",
        "quantised": "load_in_4bit",
        "dtype": "bfloat16",
    },
}
"""Each setting: a method and its storage of weights, gradients and state."""


def model_config() -> transformers.Qwen2Config:
    """Return the configuration of a Qwen2, by default with 100M parameters."""
    return transformers.Qwen2Config(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def method_config(method: str, **options: Any) -> molf.MoLFConfig | None:
    """Return a method's adapter or experts, with the defaults of `molf train`."""
    if method == "hybrid":
        return None
    return TrainSettings(task="custom", method=method, **options).method_config


def assignment(method: str, rank: int = 32) -> molf.Assignment | None:
    """Return the assignment of hybrid: k and v in full, LoRA on the other layers."""
    if method != "hybrid":
        return None
    patterns = {"full": ["k_proj", "v_proj"], "default": {"r": rank, "alpha": rank}}
    return molf.Assignment.from_patterns(skeleton(model_config()), patterns)


def make_model(workload: Workload) -> Any:
    """Return the model with random weights, prepared for the method."""
    torch.manual_seed(0)
    dtype = getattr(torch, workload.dtype)
    model = transformers.AutoModelForCausalLM.from_config(model_config(), dtype=dtype)
    if workload.quantised is not None:
        model = quantised(model, workload)
    model = model.to(workload.device)
    config = workload.config
    if workload.assignment is not None:
        return molf.with_assignment(model, workload.assignment, lora_dropout=workload.lora_dropout)
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


def quantised(model: Any, workload: Workload) -> Any:
    """Return the model with quantised linear layers, as `molf train` loads it."""
    options: dict[str, Any] = {"load_in_8bit": True}
    if workload.quantised == "load_in_4bit":
        compute = torch.bfloat16 if workload.bf16 else torch.float32
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": compute,
        }
    if workload.assignment is not None:
        full = [layer.name for layer in workload.assignment.full]
        options["llm_int8_skip_modules"] = [*full, "lm_head"]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=transformers.BitsAndBytesConfig(**options),
            dtype=getattr(torch, workload.dtype),
            device_map={"": workload.device},
        )
    keep_differentiable(loaded)
    return loaded


def make_optimizer(model: Any, workload: Workload) -> torch.optim.Optimizer:
    """Return the method's optimizer."""
    storage: dict[str, Any] = {
        "weight_rounding": workload.weight_rounding,
        "state_dtype": workload.state_dtype,
        "grad_accumulation_dtype": workload.grad_accumulation_dtype,
        "optimizer_in_backward": workload.optimizer_in_backward,
    }
    if workload.method in ("molf", "molf-e"):
        return molf.MoLFAdamW.from_model(model, workload.config, lr=5e-5, **storage)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_plain = workload.dtype == workload.state_dtype == "float32"
    if workload.assignment is not None and not is_plain:
        return molf.AdamW.from_assignment(model, workload.assignment, lr=5e-5, **storage)
    if workload.method == "fft" and (workload.optimizer_in_backward or not is_plain):
        return molf.AdamW(trained, lr=5e-5, **storage)
    return torch.optim.AdamW(trained, lr=5e-5, fused=True)


def train(model: Any, optimizer: torch.optim.Optimizer, workload: Workload) -> Iterator[None]:
    """Take the training steps; yield before each forward pass."""
    size = (workload.batch_size, workload.length)
    ids = torch.randint(0, model_config().vocab_size, size, device=workload.device)
    mask = torch.ones_like(ids)
    if workload.padded:
        mask[0, -workload.length // 8 :] = 0  # padding, as in batches of unequal lengths
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
        if not workload.optimizer_in_backward:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def measure(workload: Workload, tracker: str) -> int:
    """Return the measured peak in bytes."""
    model = make_model(workload).train()
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
                memory.reset_mod_stats()  # without it, a second forward pass fails
        return max(snapshot["Total"] for snapshot in memory.get_tracker_snapshot("peak").values())
    peak = PeakBytes(torch.device(workload.device), held_tensors(model))
    with peak:
        for _ in steps:
            pass
    return peak.bytes


def workloads(
    names: Sequence[str], device: str, shapes: list[tuple[int, int]]
) -> Iterator[tuple[str, Workload]]:
    """Yield the settings at every shape, with and without checkpointing."""
    for name in names:
        setting = SETTINGS[name]
        method = setting["method"]
        for batch_size, length in shapes:
            for checkpointing in (False, True):
                yield (
                    name,
                    Workload(
                        config=method_config(method, ranks=RANKS.get(method)),
                        assignment=assignment(method),
                        lora_dropout=0.05 if method == "hybrid" else 0.0,
                        batch_size=batch_size,
                        length=length,
                        checkpointing=checkpointing,
                        # One shape accumulates, so that gradients exist during the forward pass.
                        accumulates=batch_size == 1 and "optimizer_in_backward" not in setting,
                        bf16=device == "cuda",
                        device=device,
                        padded=batch_size > 1,
                        **setting,
                    ),
                )


def main() -> int:
    """Run the benchmark and print its table."""
    global LAYERS
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", default="1x128,2x256")
    parser.add_argument("--settings", help=f"separated by semicolons: {'; '.join(SETTINGS)}")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--tracker", choices=("profiler", "mem_tracker"), default="profiler")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    LAYERS = options.layers

    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    names = options.settings.split(";") if options.settings else list(SETTINGS)
    if options.tracker == "mem_tracker":
        names = [name for name in names if name in ("fft", "molf")]
    width = max(map(len, names))
    planner = Planner(model_config())
    rows = []
    print(
        f"{'setting':<{width}} {'batch':>8} {'checkpointing':>13} {'planned':>12} "
        f"{'measured':>12}  ratio"
    )
    for name, workload in workloads(names, options.device, [(b, n) for b, n in shapes]):
        planned = planner.memory(workload)
        measured = measure(workload, options.tracker)
        ratio = planned.peak / measured
        passed = abs(ratio - 1) <= BAR
        rows.append(
            {
                "setting": name,
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
            f"{name:<{width}} {f'{workload.batch_size}x{workload.length}':>8} "
            f"{'yes' if workload.checkpointing else 'no':>13} {binary_size(planned.peak):>12} "
            f"{binary_size(measured):>12}  {ratio:.4f} {'pass' if passed else 'FAIL'}",
            flush=True,
        )
    if options.json:
        results = {
            "settings": {k: v for k, v in vars(options).items() if k != "json"},
            "parameters": sum(p.numel() for p in skeleton(model_config()).parameters()),
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
