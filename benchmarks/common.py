"""Parts shared by the benchmarks: models, timed steps, rounds, ratios with intervals, records."""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers

import molf

LENGTH = 256  # tokens per sequence
RESULTS = Path(__file__).parent / "results"
LR = 5e-5

Step = Callable[[], float]
"""Takes one step and returns its duration in seconds."""

clock: Callable[[], float] = time.perf_counter
"""Times the steps. `time.process_time` of one thread does not count waiting for other processes."""


def make_model(dtype: torch.dtype = torch.float32, **shape: int) -> Any:
    """Return a Qwen2 with random weights, with 20M parameters unless `shape` changes it."""
    defaults = {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": LENGTH,
    }
    config = transformers.Qwen2Config(**(defaults | shape), tie_word_embeddings=True)
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config).to(dtype)


def make_batch(tokens: int) -> torch.Tensor:
    """Return random tokens in sequences of `LENGTH`."""
    torch.manual_seed(0)
    return torch.randint(0, 4096, (max(1, tokens // LENGTH), min(tokens, LENGTH)))


def make_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor
) -> Step:
    """Return one training step: forward, backward, optimizer."""
    model.train()

    def step() -> float:
        start = clock()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return clock() - start

    return step


def fused_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return torch's fused AdamW over a model's trainable parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, fused=True)


def fft_step(model: Any, batch: torch.Tensor) -> Step:
    """Return a step of full fine-tuning with torch's fused AdamW, on a copy of the model."""
    model = copy.deepcopy(model)
    return make_step(model, fused_adamw(model), batch)


def lora_step(model: Any, batch: torch.Tensor, rank: int) -> Step:
    """Return a step of PEFT's LoRA with torch's fused AdamW, on a copy of the model."""
    config = peft.LoraConfig(r=rank, lora_alpha=32, use_rslora=True, target_modules="all-linear")
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    return make_step(adapted, fused_adamw(adapted), batch)


def molf_step(model: Any, batch: torch.Tensor, ranks: Sequence[int], *, moved: bool = True) -> Step:
    """Return a step of MoLF, on a copy of the model.

    At equal rates, `full` wins in all layers here. A LoRA expert that has never won has `B = 0`,
    and a step skips products with it; `moved` makes all `B` nonzero, as after a win of each expert.
    """
    model = copy.deepcopy(model)
    config = molf.MoLFConfig(ranks=tuple(ranks))
    optimizer = molf.MoLFAdamW.from_model(model, config, lr=LR)
    if moved:
        move_experts(optimizer)
    return make_step(model, optimizer, batch)


def move_experts(optimizer: molf.MoLFAdamW) -> None:
    """Make all LoRA factors nonzero, as after a win of every expert."""
    for group in optimizer.param_groups:
        if group["layer"] is not None:
            factors = optimizer.lora_factors(group["layer"])
            moved = [(A, torch.full_like(B, 1e-4)) for A, B in factors]
            optimizer.set_lora_factors(group["layer"], moved)


def interleave(
    steps: Mapping[str, Step], rounds: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Take steps of all methods in turn, so that other load on the machine affects all equally.

    Returns:
        The seconds of every round, by method.
    """
    for step in steps.values():  # warm-up: creates state and allocates memory
        for _ in range(warm_up):
            step()
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    order = list(steps)
    for index in range(rounds):
        turn = index % len(order)
        for method in order[turn:] + order[:turn]:
            seconds[method].append(steps[method]())
    return seconds


class Bar(NamedTuple):
    """A limit of a measurement, and the measured value.

    Attributes:
        name: Name of the measurement.
        limit: Largest allowed value.
        value: Measured value.
        low: Lower end of its 95% interval; the value itself for counts.
        high: Upper end.
    """

    name: str
    limit: float
    value: float
    low: float
    high: float

    @classmethod
    def of_ratios(
        cls, name: str, limit: float, taken: Sequence[float], base: Sequence[float]
    ) -> Bar:
        """Build from the seconds of two methods in the same rounds, as their ratio."""
        return cls(name, limit, *ratio_interval([a / b for a, b in zip(taken, base, strict=True)]))

    @classmethod
    def exact(cls, name: str, limit: float, value: float) -> Bar:
        """Build from a count."""
        return cls(name, limit, value, value, value)

    @property
    def verdict(self) -> str:
        """Whether the interval is within the limit, beyond it, or on both sides."""
        return (
            "pass" if self.high <= self.limit else "fail" if self.low > self.limit else "undecided"
        )

    def record(self) -> dict[str, Any]:
        """Return the fields and the verdict for a JSON file."""
        return {**self._asdict(), "verdict": self.verdict}


def show_bar(name: str, limit: float, value: float, low: float, high: float, verdict: str) -> str:
    """Format one line from a bar's record."""
    interval = "" if low == high else f" ({low:.3f}-{high:.3f})"
    return f"{verdict:<9} {value:.3f}{interval}  bar {limit:g}  {name}"


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of per-round ratios and its 95% percentile-bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return statistics.median(ratios), float(low), float(high)


def copy_bandwidth(size: int = 1 << 28) -> float:
    """Measure bytes per second, read and written, of copying a large tensor on the CPU."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(_seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * size / best


def product_speed(size: int = 2048) -> float:
    """Measure operations per second of a large float32 matrix product on the CPU."""
    left, right = torch.ones(size, size), torch.ones(size, size)
    torch.mm(left, right)
    return 2 * size**3 / min(_seconds(lambda: torch.mm(left, right)) for _ in range(5))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def environment() -> dict[str, Any]:
    """Return versions and device for a record."""
    modules = (molf, torch, transformers, peft)
    return {
        "versions": {module.__name__: module.__version__ for module in modules},
        "device": f"{platform.machine()}, {_cpu_name()}",
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def report(
    settings: Mapping[str, Any], bars: Sequence[Bar], json_file: Path | None, **results: Any
) -> None:
    """Print the bars; write settings, environment and bars to `json_file`, if given."""
    for bar in bars:
        print(show_bar(**bar.record()), flush=True)
    if json_file:
        record = {
            "settings": {k: v for k, v in settings.items() if k != "json"},
            **environment(),
            "bars": [bar.record() for bar in bars],
            **results,
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(record, indent=2) + "\n")
