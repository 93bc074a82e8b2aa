"""Time training steps on a GPU: full fine-tuning, LoRA, MoLF and MoLF-Efficient at 1.5B and 3B.

NOT YET RUN ON A GPU: the script was tested on a machine without one (`--smoke` runs all its code
with tiny models on a CPU). Without a GPU it prints one line and ends. No figure of this repository
comes from it.

Models have the shapes of Qwen2.5-1.5B and -3B, random bfloat16 weights, gradient checkpointing, and
8,192 tokens a step. In each round, each method is built, warmed up, timed for some steps and freed,
so that other load on the machine affects all equally and only one method uses memory at a time. The
table has medians; the median of the per-round ratios to full fine-tuning with its 95% bootstrap
interval; tokens per second; the model's operations as a share of the device's peak (MFU, without
recomputation); the peak of allocated memory; and the time to copy the bytes that an optimizer step
must move, as a share of the step's time.

- fft: molf.AdamW, exact bfloat16 weights, Triton kernels.
- fft-torch: torch's fused AdamW on bfloat16 weights, moments in bfloat16.
- lora: PEFT, rank 128, float32 factors, torch's fused AdamW.
- molf, molf-eager: rank 128, exact bfloat16 weights, with the Triton kernels and without.
- molf-e: ranks 32 and 128, one PEFT adapter, eager.

Finally, models of 3B and 8B are trained with stochastic rounding, 8-bit states and optimizer steps
in the backward pass, with torch limited to 24 GB; a model that does not fit is measured without it.

    python benchmarks/gpu.py [--models 1.5b,3b] [--methods fft,molf] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from step_kernels_gpu import floor_bytes

STEP_BAR = 1.03  # largest ratio of molf's training step to fft's
FLOOR_BAR = 0.70  # smallest ratio of the copy time to molf's optimizer step
RESULT = Path(__file__).parent / "results" / "gpu.json"
RANK = 128
LR = 1e-5
CAP = 24e9
CAP_TOKENS = 1024
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # bfloat16, dense
METHODS = ("fft", "fft-torch", "lora", "molf", "molf-eager", "molf-e")


class Shape(NamedTuple):
    """A decoder's shape: layers, width, inner width, heads, key-value heads, vocabulary."""

    layers: int
    width: int
    inner: int
    heads: int
    key_values: int
    vocabulary: int
    is_tied: bool = True


SHAPES = {
    "1.5b": Shape(28, 1536, 8960, 12, 2, 151_936),
    "3b": Shape(36, 2048, 11_008, 16, 2, 151_936),
    "8b": Shape(32, 4096, 14_336, 32, 8, 128_256, is_tied=False),
    "tiny": Shape(2, 64, 128, 4, 2, 128),
}


class Run(NamedTuple):
    """Device, kernels and sizes of a run."""

    device: torch.device
    kernels: str
    tokens: int
    length: int
    steps: int


class Round(NamedTuple):
    """A method's result in a round: seconds of a step and of its optimizer, bytes, shares."""

    step: float
    optimizer: float
    peak_bytes: int | None
    floor_bytes: int | None
    shares: dict[str, float]


def make_model(shape: Shape, run: Run) -> nn.Module:
    """Return a Qwen2 with random bfloat16 weights and checkpointing, made on the device."""
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_values,
        max_position_embeddings=run.length,
        tie_word_embeddings=shape.is_tied,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with run.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    name = next(
        x for x in ("activation", "gradient") if hasattr(model, f"{x}_checkpointing_enable")
    )
    enable = getattr(model, f"{name}_checkpointing_enable")
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    return model.train()


def make_method(
    method: str, model: nn.Module, run: Run
) -> tuple[nn.Module, torch.optim.Optimizer, str]:
    """Return a method's model and optimizer, and the name of the kernels that it uses."""
    import peft

    import molf

    config = molf.MoLFConfig(ranks=(RANK,))
    fused = run.device.type == "cuda"
    if method == "fft":
        named = model.named_parameters()
        return model, molf.AdamW(named, lr=LR, kernels=run.kernels), run.kernels
    if method == "fft-torch":
        return model, torch.optim.AdamW(model.parameters(), lr=LR, fused=fused), "torch"
    if method == "lora":
        targets = {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 32}
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, **targets))
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        return adapted, torch.optim.AdamW(trained, lr=LR, fused=fused), "torch"
    if method == "molf-e":
        config = molf.MoLFConfig(ranks=(32, RANK), freeze_base=True)
        adapted = molf.with_adapter(model, config)
        return adapted, molf.MoLFAdamW.from_model(adapted, config, lr=LR), "eager"
    kernels = run.kernels if method == "molf" else "eager"
    return model, molf.MoLFAdamW.from_model(model, config, lr=LR, kernels=kernels), kernels


class Clock:
    """Records times on the device without waiting for it.

    Args:
        device: A CUDA device or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Record the time at which the device finishes all work queued so far."""
        if not self._on_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Wait for the device; return the seconds between consecutive marks."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._on_cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def batch_of(shape: Shape, run: Run) -> torch.Tensor:
    """Return random tokens, [sequences, length]."""
    size = (run.tokens // run.length, run.length)
    return torch.randint(0, shape.vocabulary, size, device=run.device)


def free(device: torch.device) -> None:
    """Free unused memory, and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def take_round(method: str, shape: Shape, run: Run) -> Round:
    """Build a method, warm it up, time it, and measure its memory."""
    free(run.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Rank")  # tiny layers are smaller than the rank
        model, optimizer, _ = make_method(method, make_model(shape, run), run)
    batch = batch_of(shape, run)
    whole, alone = [], []
    for number in range(2 + run.steps):  # two warm-up steps: create state, compile kernels
        clock = Clock(run.device)
        clock.mark()
        model(input_ids=batch, labels=batch).loss.backward()
        clock.mark()
        optimizer.step()
        clock.mark()
        optimizer.zero_grad()
        passes, step = clock.seconds()
        if number >= 2:
            whole.append(passes + step)
            alone.append(step)
    on_cuda = run.device.type == "cuda"
    is_dense = method in ("fft", "molf", "molf-eager")
    shares: dict[str, float] = {}
    decisions = getattr(optimizer, "routing", {}).values()
    for winner in (name for decision in decisions for name in decision.winners):
        shares[winner] = shares.get(winner, 0) + 1 / len(decisions)
    return Round(
        statistics.median(whole),
        statistics.median(alone),
        torch.cuda.max_memory_allocated(run.device) if on_cuda else None,
        floor_bytes(optimizer) if is_dense else None,
        shares,
    )


def model_operations(method: str, shape: Shape, run: Run) -> float:
    """Return the floating-point operations of a step, without recomputation.

    The forward pass has two per weight and token. The backward pass has as many for each of its two
    gradients, but a frozen base needs only one of them. Causal attention is added.
    """
    kv = shape.width // shape.heads * shape.key_values
    products = shape.layers * (
        2 * shape.width * shape.width + 2 * shape.width * kv + 3 * shape.width * shape.inner
    )
    products += shape.width * shape.vocabulary
    passes = 2 if method in ("lora", "molf-e") else 3
    attention = shape.layers * run.length * shape.width * 3  # half of the products are masked
    return 2 * run.tokens * (passes * products + attention)


def bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Measure bytes per second, read and written, of copying."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    for _ in range(13):
        clock.mark()
        target.copy_(source)
    clock.mark()
    return 2 * size / statistics.median(clock.seconds()[3:])


def compare(
    name: str, methods: list[str], rounds: int, run: Run, speed: float, peak: float
) -> dict[str, Any]:
    """Time all methods on one shape in interleaved rounds; print and return the results."""
    from common import ratio_interval

    shape = SHAPES[name]
    taken: dict[str, list[Round]] = {method: [] for method in methods}
    for index in range(rounds):
        shift = index % len(methods)
        for method in methods[shift:] + methods[:shift]:
            taken[method].append(take_round(method, shape, run))
    print(f"\n{name}, {run.tokens:,} tokens a step, {rounds} rounds of {run.steps} steps")
    print("method       s/step  x fft (95% interval)    tokens/s   MFU     GB  optimizer ms  floor")
    found: dict[str, Any] = {}
    for method, of_method in taken.items():
        seconds = [one.step for one in of_method]
        median = statistics.median(seconds)
        ratio = None
        if "fft" in taken:
            pairs = zip(seconds, (one.step for one in taken["fft"]), strict=True)
            ratio = ratio_interval([a / b for a, b in pairs])
        optimizer = statistics.median(one.optimizer for one in of_method)
        floors = [one.floor_bytes / speed / one.optimizer for one in of_method if one.floor_bytes]
        floor = ratio_interval(floors) if floors else None
        found[method] = {
            "seconds": seconds,
            "optimizer_seconds": [one.optimizer for one in of_method],
            "ratio": ratio,
            "tokens_per_second": run.tokens / median,
            "mfu": model_operations(method, shape, run) / median / peak if peak else None,
            "peak_bytes": max((one.peak_bytes or 0 for one in of_method), default=0) or None,
            "floor_bytes": of_method[-1].floor_bytes,
            "share_of_floor": floor,
            "winners": of_method[-1].shares,
        }
        print(_row(method, found[method], median, optimizer))
    if run.device.type == "cuda" and "molf" in found:
        _print_verdicts(found["molf"])
    return found


def _row(method: str, found: dict[str, Any], median: float, optimizer: float) -> str:
    ratio, floor = found["ratio"], found["share_of_floor"]
    columns = [
        f"{method:<11} {median:7.3f}",
        "{:.3f} ({:.3f}-{:.3f})".format(*ratio) if ratio else "-",
        f"{found['tokens_per_second']:12,.0f}",
        f"{found['mfu']:5.1%}" if found["mfu"] else "    -",
        f"{found['peak_bytes'] / 1e9:6.1f}" if found["peak_bytes"] else "     -",
        f"{1e3 * optimizer:12.1f}",
        f"{floor[0]:6.0%}" if floor else "     -",
    ]
    return f"{columns[0]}  {columns[1]:<20} " + " ".join(columns[2:])


def _print_verdicts(found: dict[str, Any]) -> None:
    from common import Bar, show_bar

    bars = []
    if found["ratio"]:
        bars.append(Bar("whole step: molf / fft", STEP_BAR, *found["ratio"]))
    share, low, high = found["share_of_floor"]
    name = "molf's optimizer step / its bytes at the device's bandwidth"
    bars.append(Bar(name, 1 / FLOOR_BAR, 1 / share, 1 / high, 1 / low))
    for bar in bars:
        print(show_bar(**bar.record()))


def capped(name: str, run: Run, cap: float) -> dict[str, Any]:
    """Train one model with all memory-saving options, with torch limited to `cap` bytes."""
    import molf

    shape = SHAPES[name]
    on_cuda = run.device.type == "cuda"

    def peak_of_steps() -> int | None:
        free(run.device)
        model = make_model(shape, run)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Rank")
            optimizer = molf.MoLFAdamW.from_model(
                model,
                molf.MoLFConfig(ranks=(RANK,)),
                lr=LR,
                weight_rounding="stochastic",
                state_dtype="8bit",
                optimizer_in_backward=True,
            )
        batch = batch_of(shape, run)
        for _ in range(2):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        return torch.cuda.max_memory_allocated(run.device) if on_cuda else None

    total = torch.cuda.get_device_properties(run.device).total_memory if on_cuda else 0
    found: dict[str, Any] = {"cap_bytes": cap, "fits": True}
    if on_cuda:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), run.device)
    try:
        found["peak_bytes"] = peak_of_steps()
    except torch.OutOfMemoryError:
        found["fits"] = False
    finally:
        if on_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, run.device)
    if not found["fits"]:
        try:
            found["peak_bytes"] = peak_of_steps()
        except torch.OutOfMemoryError:
            found["peak_bytes"] = None  # more than the device has
    skeleton = make_model(shape, run._replace(device=torch.device("meta")))
    count = sum(parameter.numel() for parameter in skeleton.parameters())
    found["parameters"] = count
    used = f"{found['peak_bytes'] / 1e9:.1f} GB" if found["peak_bytes"] else "not known"
    print(
        f"\n{name}, stochastic, 8-bit, in backward, {run.tokens:,} tokens, cap {cap / 1e9:.0f} GB: "
        f"{'fits' if found['fits'] else 'does not fit'}; peak {used}; weights and moments alone "
        f"are {4.03 * count / 1e9:.1f} GB"
    )
    return found


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="1.5b,3b")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--capped", default="3b,8b", help="models to fit into 24 GB; '' for none")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps per round")
    parser.add_argument("--peak_tflops", type=float, help="of the device in bfloat16, for MFU")
    parser.add_argument("--json", type=Path, help=f"default {RESULT.name} in benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="all paths, tiny models, on a CPU")
    options = parser.parse_args()
    if options.smoke:
        options.models, options.capped = (
            "tiny" if names else "" for names in (options.models, options.capped)
        )
        options.tokens, options.length, options.rounds, options.steps = 64, 32, 2, 1
    options.models = [name for name in options.models.split(",") if name]
    options.capped = [name for name in options.capped.split(",") if name]
    options.methods = options.methods.split(",")
    unknown = {*options.models, *options.capped} - {*SHAPES} | {*options.methods} - {*METHODS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Run the benchmark, print its tables and write its JSON."""
    options = parse()
    has_triton = importlib.util.find_spec("triton") is not None
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("gpu: needs a CUDA device, and there is none (--smoke runs tiny models on a CPU).")
    if not options.smoke and not has_triton:
        sys.exit('gpu: needs triton (pip install "molf[triton]").')
    import peft
    import transformers

    device = torch.device("cpu" if options.smoke else "cuda:0")
    kernels = "eager" if options.smoke else "triton"
    run = Run(device, kernels, options.tokens, options.length, options.steps)
    name = "smoke test on a CPU" if options.smoke else torch.cuda.get_device_name(device)
    peak = (options.peak_tflops or 0) * 1e12
    peak = peak or next((value for key, value in PEAKS.items() if key in name), 0.0)
    speed = bandwidth(device, 1 << 20 if options.smoke else 1 << 30)
    print(f"{name}: a copy moves {speed / 1e9:.0f} GB/s; kernels: {kernels}")
    results: dict[str, Any] = {
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
        "device": name,
        "kernels": kernels,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "cuda": torch.version.cuda,
        "copy_bytes_per_second": speed,
        "peak_operations_per_second": peak or None,
        "models": {},
        "capped": {},
    }
    small = run._replace(tokens=min(CAP_TOKENS, run.tokens))
    path = options.json or (None if options.smoke else RESULT)

    def keep(kind: str, model: str, found: dict[str, Any]) -> None:
        results[kind][model] = found
        if path:  # written after each part, in case the run is interrupted
            path.write_text(json.dumps(results, indent=2) + "\n")

    for model in options.models:
        found = compare(model, options.methods, options.rounds, run, speed, peak)
        keep("models", model, found)
    for model in options.capped:
        keep("capped", model, capped(model, small, CAP))


if __name__ == "__main__":
    main()
