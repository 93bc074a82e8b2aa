"""Print planned memory peaks of known models, and the smallest GPU for each model and mode.

Nothing is downloaded or trained: peaks are computed as by `molf plan` from the published shapes,
for one sequence at a time, with gradient checkpointing and bfloat16 autocast. Finished plans are
saved in the JSON file; a later call computes only the missing ones.

    python benchmarks/plan_models.py [--models Qwen2.5-0.5B,...] [--max_length 1024] --json FILE
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from molf.planning.devices import DEVICES, GIB
from molf.planning.memory import Planner
from molf.planning.workload import Workload
from plan_memory import method_config


def _qwen(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Any:
    sizes = {"vocab_size": 151936, "tie_word_embeddings": True, **more}
    return transformers.Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **sizes,
    )


MODELS: dict[str, Any] = {
    "Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2),
    "Qwen2.5-3B": _qwen(2048, 11008, 36, 16, 2),
    "Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "Llama-3-8B": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    ),
}
_SMALL = {
    "dtype": "bfloat16",
    "weight_rounding": "stochastic",
    "state_dtype": "8bit",
    "optimizer_in_backward": True,
    "accumulates": False,
}
MODES: dict[str, dict[str, Any]] = {
    **{
        f"{method}{words}": {"method": method, **options}
        for method in ("fft", "molf")
        for words, options in (
            ("", {}),
            (", bfloat16 exact", {"dtype": "bfloat16"}),
            (", bfloat16 stochastic, 8-bit, in backward", _SMALL),
            (", the same, state in host memory", {**_SMALL, "state_offload": True}),
        )
    },
    **{
        f"{method}{words}": {"method": method, **options}
        for method in ("lora", "molf-e")
        for words, options in (
            ("", {}),
            (", bfloat16 base", {"dtype": "bfloat16"}),
            (", 4-bit base", {"quantised": "load_in_4bit"}),
        )
    },
}


def workload(mode: str, length: int) -> Workload:
    """Return the workload to plan."""
    options = {"accumulates": True, **MODES[mode]}
    return Workload(
        config=method_config(options["method"]),
        batch_size=1,
        length=length,
        checkpointing=True,
        bf16=True,
        padded=False,
        **options,
    )


def table(peaks: dict[str, dict[str, int]]) -> str:
    """Return a Markdown table of peaks in GiB, each with the smallest GPU that fits."""
    lines = [f"| | {' | '.join(peaks)} |", f"|---|{'---|' * len(peaks)}"]
    for mode in MODES:
        cells = [_cell(found.get(mode)) for found in peaks.values()]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(peak: int | None) -> str:
    if peak is None:
        return ""
    device = next((device.name for device in DEVICES if device.fits(peak)), "none")
    return f"{peak / GIB:.1f}: {device}"


def main() -> None:
    """Compute missing plans, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "max_length": options.max_length,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
        "peak_bytes": {},
    }
    if options.json.exists():
        kept = json.loads(options.json.read_text())
        if any(kept[name] != record[name] for name in ("max_length", "versions")):
            sys.exit(f"{options.json} was planned with other lengths or versions.")
        record = kept
    for name in options.models.split(","):
        planner = Planner(MODELS[name])
        peaks = record["peak_bytes"].setdefault(name, {})
        for mode in MODES:
            if mode not in peaks:
                peaks[mode] = planner.memory(workload(mode, options.max_length)).peak
                options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(
        table({name: record["peak_bytes"][name] for name in MODELS if name in record["peak_bytes"]})
    )


if __name__ == "__main__":
    main()
