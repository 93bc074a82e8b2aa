"""Peak memory of a training step: full fine-tuning and MoLF, by precision and by when layers move.

    python benchmarks/memory.py [--tokens 32] [--rank 128] [--json FILE]

Counted are the bytes of all live tensors that operations have returned: weights, gradients,
optimizer state, activations and temporaries of the second training step of a 20M-parameter Qwen2 on
a CPU. What an operation allocates and frees inside is not seen. The sequence is short, so that
weights and states dominate.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import molf

LENGTH = 256
BF16 = {"dtype": torch.bfloat16}
SETTINGS: dict[str, dict[str, Any]] = {
    "fft, float32": {"method": "fft"},
    "fft, bfloat16 exact": {"method": "fft", **BF16},
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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak."""

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


def make_model(dtype: torch.dtype) -> torch.nn.Module:
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
    return transformers.Qwen2ForCausalLM(config).to(dtype)


def measure(
    tokens: int, rank: int, method: str, dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, float]:
    """Return bytes for each parameter: at the peak, and of the optimizer's state."""
    model = make_model(dtype)
    count = sum(p.numel() for p in model.parameters())
    optimizer: torch.optim.Optimizer
    if method == "fft":
        optimizer = molf.AdamW(model.named_parameters(), lr=2e-5, **more)
    else:
        config = molf.MoLFConfig(ranks=(rank,))
        optimizer = molf.MoLFAdamW.from_model(model, config, lr=2e-5, **more)
    batch = torch.arange(tokens).reshape(-1, min(tokens, LENGTH)) % 4096

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the state
    state = [
        value
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    ]
    live = LiveBytes()
    for tensor in (*model.parameters(), *model.buffers(), *state):
        live.add(tensor)
    with live:
        step()
    held = sum(tensor.numel() * tensor.element_size() for tensor in state)
    return {
        "peak_bytes_per_parameter": live.peak / count,
        "state_bytes_per_parameter": held / count,
    }


def main() -> None:
    """Measure every setting; print a table."""
    parser = argparse.ArgumentParser(description="Peak memory of a training step.")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    results = {}
    for name, setting in SETTINGS.items():
        results[name] = measure(options.tokens, options.rank, **setting)
        gc.collect()
        peak, state = results[name].values()
        print(f"{name:48} peak {peak:6.2f}  state {state:6.2f}  bytes per parameter", flush=True)
    if options.json:
        record = {
            "tokens": options.tokens,
            "rank": options.rank,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
