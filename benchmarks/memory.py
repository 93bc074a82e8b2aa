"""Measure the peak memory of a training step of full fine-tuning and MoLF, by storage options.

    python benchmarks/memory.py [--model small|wide] [--all] [--rank 128] [--json FILE]

The count includes all live tensors returned by operations: weights, gradients, optimizer state,
activations and temporaries of the second training step of a Qwen2 on a CPU. Memory that an
operation allocates and frees inside is not counted. The sequence is short, so that weights and
states dominate.

`small` is the 20M-parameter model of the other benchmarks. Its width is 512, so at rank 128 factors
and their moments take a third of the memory of weights and theirs; ratios of MoLF to full
fine-tuning do not hold for larger models. `wide`, the model of the bars, has two layers of
TinyLlama-1.1B's shape and a small vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import molf
from common import Bar, make_batch, make_model, move_experts, report

SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "wide": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
BF16 = {"dtype": torch.bfloat16}
SETTINGS: dict[str, dict[str, Any]] = {
    "fft, float32": {"method": "fft"},
    "fft, bfloat16 exact": {"method": "fft", **BF16},
    "fft, bfloat16 stochastic": {"method": "fft", **BF16, "weight_rounding": "stochastic"},
    "fft, bfloat16 exact, 8-bit": {"method": "fft", **BF16, "state_dtype": "8bit"},
    "fft, bfloat16 stochastic, 8-bit, in backward": {
        "method": "fft",
        **BF16,
        "state_dtype": "8bit",
        "weight_rounding": "stochastic",
        "optimizer_in_backward": True,
    },
    "molf, float32": {"method": "molf"},
    "molf, float32, in backward": {"method": "molf", "optimizer_in_backward": True},
    "molf, bfloat16 exact": {"method": "molf", **BF16},
    "molf, bfloat16 exact, in backward": {"method": "molf", **BF16, "optimizer_in_backward": True},
    "molf, bfloat16 exact, 8-bit": {"method": "molf", **BF16, "state_dtype": "8bit"},
    "molf, bfloat16 stochastic, 8-bit": {
        "method": "molf",
        **BF16,
        "state_dtype": "8bit",
        "weight_rounding": "stochastic",
    },
    "molf, bfloat16 stochastic, 8-bit, in backward": {
        "method": "molf",
        **BF16,
        "state_dtype": "8bit",
        "weight_rounding": "stochastic",
        "optimizer_in_backward": True,
    },
}


PRECISIONS = ("float32", "bfloat16 exact", "bfloat16 exact, 8-bit")  # for whole steps
TRANSIENTS = ("float32", "bfloat16 exact", "bfloat16 stochastic, 8-bit")
SMALLEST, ORDINARY = "molf, bfloat16 stochastic, 8-bit, in backward", "fft, bfloat16 stochastic"
NEEDED = {
    *(f"{method}, {precision}" for method in ("fft", "molf") for precision in PRECISIONS),
    *(f"molf, {precision}" for precision in TRANSIENTS),
    SMALLEST,
    ORDINARY,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and type(value) in _PLAIN:
                self.add(value)
        return result


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def measure(
    shape: Mapping[str, Any],
    tokens: int,
    rank: int,
    method: str,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> dict[str, float]:
    """Return bytes per parameter: at the peak, of the optimizer's state, and so on.

    The transient is the additional memory during the optimizer's step. One layer is the weight of
    the largest linear layer and its factors, in float32.
    """
    model = make_model(dtype, **shape)
    count = sum(p.numel() for p in model.parameters())
    optimizer: torch.optim.Optimizer
    if method == "fft":
        optimizer = molf.AdamW(model.named_parameters(), lr=2e-5, **more)
    else:
        config = molf.MoLFConfig(ranks=(rank,))
        optimizer = molf.MoLFAdamW.from_model(model, config, lr=2e-5, **more)
    batch = make_batch(tokens)

    def backward() -> None:
        model(input_ids=batch, labels=batch).loss.backward()

    backward()
    optimizer.step()  # creates the state
    optimizer.zero_grad()
    if isinstance(optimizer, molf.MoLFAdamW):
        move_experts(optimizer)  # nonzero factors, as late in a run: the largest peak
    named = [
        (key, value)
        for entry in optimizer.state.values()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    ]
    state = [value for _, value in named]
    live = LiveBytes()
    for tensor in (*model.parameters(), *model.buffers(), *state):
        live.add(tensor)
    with live:
        backward()
        before_step, peak = live.now, live.peak
        live.peak = live.now
        optimizer.step()
        transient = live.peak - before_step
        optimizer.zero_grad()
    peak = max(peak, live.peak)
    factors = sum(_bytes(value) for key, value in named if key.startswith("lora_"))
    largest = max(
        module.weight.numel() + rank * sum(module.weight.shape)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head
    )
    found = {
        "peak": peak,
        "state": sum(map(_bytes, state)),
        "factors": factors,
        "transient": transient,
        "one_layer": 4 * largest,
    }
    return {f"{key}_bytes_per_parameter": value / count for key, value in found.items()}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def bars_of(results: Mapping[str, Mapping[str, float]]) -> list[Bar]:
    """Return the bars of memory with the measured values."""
    bars = []
    for precision in PRECISIONS:
        fft, own = results[f"fft, {precision}"], results[f"molf, {precision}"]
        least = fft["peak_bytes_per_parameter"] + own["factors_bytes_per_parameter"]
        name = f"{precision}: MoLF's peak against full fine-tuning's and the factors' state"
        bars.append(Bar.exact(name, 1.02, own["peak_bytes_per_parameter"] / least))
    for precision in TRANSIENTS:
        own = results[f"molf, {precision}"]
        share = own["transient_bytes_per_parameter"] / own["one_layer_bytes_per_parameter"]
        name = f"{precision}: what MoLF's step takes for a while against one layer in float32"
        bars.append(Bar.exact(name, 1.0, share))
    name = "MoLF's peak, 8-bit and in backward, against full fine-tuning's in bfloat16"
    own_peak, fft_peak = (results[x]["peak_bytes_per_parameter"] for x in (SMALLEST, ORDINARY))
    return [*bars, Bar.exact(name, 0.6, own_peak / fft_peak)]


def main() -> None:
    """Measure every setting; print a table."""
    parser = argparse.ArgumentParser(description="Peak memory of a training step.")
    parser.add_argument("--model", choices=tuple(SHAPES), default="wide")
    parser.add_argument("--all", action="store_true", help="also settings without a bar")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    results = {}
    print(f"{options.model}, rank {options.rank}, {options.tokens} tokens; bytes per parameter")
    for name, setting in SETTINGS.items():
        if not (options.all or name in NEEDED):
            continue
        found = results[name] = measure(
            SHAPES[options.model], options.tokens, options.rank, **setting
        )
        gc.collect()
        shown = [f"{key.partition('_bytes')[0]} {value:6.2f}" for key, value in found.items()]
        print(f"{name:46} {'  '.join(shown)}", flush=True)
    bars = bars_of(results) if options.model == "wide" else []
    report(vars(options), bars, options.json, results=results)


if __name__ == "__main__":
    main()
