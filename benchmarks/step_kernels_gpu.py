"""Time the fused kernels on a GPU against torch's fused AdamW and the bandwidth of a copy.

NOT YET RUN ON A GPU: the script was tested on a machine without one, where it prints one line and
ends. No figure of this repository comes from it.

The tensors are the linear layers of a decoder with Qwen2.5-1.5B's shapes. For each operation, and
for whole steps of MoLFAdamW and AdamW with and without the kernels, it prints the median time of a
call, the bytes that the call must move (docs/kernels.md), and the time to copy those bytes on the
same device as a share of the call's time.

    python benchmarks/step_kernels_gpu.py [--layers 8] [--rank 128] [--rounds 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HIDDEN, KEY_VALUE, INNER = 1536, 256, 8960
SHAPES = [  # [out, in] of q, k, v, o, gate, up, down
    (HIDDEN, HIDDEN),
    (KEY_VALUE, HIDDEN),
    (KEY_VALUE, HIDDEN),
    (HIDDEN, HIDDEN),
    (INNER, HIDDEN),
    (INNER, HIDDEN),
    (HIDDEN, INNER),
]
BETAS = (0.9, 0.999)
STORAGES = ("float32", "bfloat16 exact", "bfloat16 stochastic")


class Model:
    """Weights, gradients and state of all layers, for one storage of weights."""

    def __init__(self, layers: int, rank: int, storage: str) -> None:
        from molf.core.execute.triton import Weight
        from molf.core.storage.rounding import RoundingKey, split_float32

        shapes = SHAPES * layers
        dtype = torch.float32 if storage == "float32" else torch.bfloat16
        self.count = sum(rows * cols for rows, cols in shapes)
        self.factor_count = sum((rows + cols) * rank for rows, cols in shapes)
        self.grads = [self._normal(*shape).to(dtype) for shape in shapes]
        self.exp_avgs = [self._normal(*shape) for shape in shapes]
        self.exp_avg_sqs = [self._normal(*shape).square_() for shape in shapes]
        self.lefts = [self._normal(rows, rank) for rows, _ in shapes]
        self.rights = [self._normal(rank, cols) for _, cols in shapes]
        self.weights = []
        for number, shape in enumerate(shapes):
            values = self._normal(*shape)
            if storage == "float32":
                weight = Weight(values)
            elif storage == "bfloat16 exact":
                weight = Weight(*split_float32(values))
            else:
                weight = Weight(values.to(dtype), key=RoundingKey.of(0, str(number), 1))
            self.weights.append(weight)

    @staticmethod
    def _normal(*shape: int) -> Tensor:
        return 1e-2 * torch.randn(shape, device="cuda")


def operations(model: Model) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return each operation with the fewest bytes that it must move."""
    from molf.core.arithmetic.adam import AdamWStep
    from molf.core.arithmetic.weight_step import Product
    from molf.core.execute.triton import AdamW, Kernels, LowRank, Moments

    kernels = Kernels(torch.device("cuda"))
    finite = torch.ones((), dtype=torch.bool, device="cuda")
    step = AdamWStep(1e-5, 0.1, BETAS, 1e-8, 10)
    rows = list(zip(model.weights, model.grads, model.exp_avgs, model.exp_avg_sqs, strict=True))
    products = list(zip(model.lefts, model.rights, strict=True))
    moments = [Moments(g, m, v, BETAS) for _, g, m, v in rows]
    full = [AdamW(w, m, v, step) for w, _, m, v in rows]
    one_pass = [AdamW(w, m, v, step, g, BETAS) for w, g, m, v in rows]
    lora = [
        LowRank(row[0], Product(*factors, 1.0)) for row, factors in zip(rows, products, strict=True)
    ]
    both = [
        LowRank(w, Product(*factors, 1.0), (m, v, step))
        for (w, _, m, v), factors in zip(rows, products, strict=True)
    ]
    grad = model.grads[0].element_size()
    weight = model.weights[0].values.element_size() + 2 * (model.weights[0].low is not None)
    n, factors = model.count, 4 * model.factor_count
    return {
        "squares": (lambda: kernels.squares(model.grads), n * grad),
        "moments": (lambda: kernels.moments(moments, finite, "epd"), n * (grad + 16)),
        "write, full": (lambda: kernels.adamw(full, finite), n * (2 * weight + 8)),
        "write, lora": (lambda: kernels.low_rank(lora, finite), n * 2 * weight + factors),
        "write, full with decay": (
            lambda: kernels.low_rank(both, finite),
            n * (2 * weight + 8) + factors,
        ),
        "adamw in one pass": (
            lambda: kernels.adamw(one_pass, finite),
            n * (grad + 2 * weight + 16),
        ),
    }


def torch_operations(model: Model) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return torch's fused AdamW on float32, and the matrix products of `low_rank`."""
    parameters = [torch.nn.Parameter(weight.values) for weight in model.weights]
    for parameter, grad in zip(parameters, model.grads, strict=True):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def products() -> None:
        for weight, left, right in zip(model.weights, model.lefts, model.rights, strict=True):
            weight.values.addmm_(left, right)

    n = model.count
    return {
        "torch: fused AdamW": (optimizer.step, n * 28),
        "torch: one addmm_ per layer": (products, n * 8 + 4 * model.factor_count),
    }


def floor_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the fewest bytes that the last step of molf.AdamW or MoLFAdamW had to move.

    The count has the passes over weights, gradients and moments of docs/kernels.md, which depend on
    each layer's winner, and the factors' moments and gradients. Reads by the low-rank products are
    not counted, so they lower the printed share.
    """
    total = 0
    for group in optimizer.param_groups:
        full, routed = True, group["layer"] is not None
        if routed:
            full = "full" in optimizer.routing[group["layer"]].winners  # type: ignore[attr-defined]
            total += 20 * sum(group["ranks"]) * sum(group["params"][0].shape)
        for parameter in group["params"]:
            grad = parameter.dtype.itemsize
            is_exact = "low" in optimizer.state[parameter]
            weight = 4 if is_exact else parameter.dtype.itemsize
            per_element = grad + 2 * weight + 16
            if routed:  # the finite check is a separate pass; the winner's moments are read again
                is_written = full or parameter.dim() > 1
                per_element = 2 * grad + 16 + 2 * weight * is_written + 8 * full
            total += parameter.numel() * per_element
    return total


def whole_steps(
    shapes: list[tuple[int, int]], rank: int, storage: str, device: torch.device
) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """Yield (name, optimizer) with gradients set, one at a time to save memory.

    `full` and `lora` in a name tell the winner of all layers.
    """
    from molf import AdamW, MoLFAdamW, MoLFConfig

    rounding = None if storage == "float32" else storage.removeprefix("bfloat16 ")
    dtype = torch.float32 if rounding is None else torch.bfloat16
    for winner in ("full", "lora", "adamw"):
        for kernels in ("eager", "triton"):
            with device:
                linears = [torch.nn.Linear(cols, rows, False, dtype=dtype) for rows, cols in shapes]
            model = torch.nn.ModuleList(linears)
            for parameter in model.parameters():
                parameter.grad = 1e-2 * torch.randn_like(parameter)
            options: dict[str, Any] = {"weight_rounding": rounding, "kernels": kernels}
            if winner == "adamw":
                yield f"adamw, {kernels}", AdamW(model.named_parameters(), lr=1e-5, **options)
            else:
                config = MoLFConfig(ranks=(rank,), score=winner)
                optimizer = MoLFAdamW.from_model(model, config, lr=1e-5, **options)
                yield f"molf, {winner} wins, {kernels}", optimizer


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """Measure the median time of a call on the device, in milliseconds."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(rounds: int) -> float:
    """Measure bytes per second, read and written, of copying one GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), rounds) * 1e3


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=128, help="K of the low-rank products")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("step_kernels_gpu: needs a CUDA device, and there is none.")
    if importlib.util.find_spec("triton") is None:
        sys.exit('step_kernels_gpu: needs triton (pip install "molf[triton]").')

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # as in the optimizer's products
    bandwidth = copy_bandwidth(options.rounds)
    name = torch.cuda.get_device_name()
    print(f"{name}: a copy moves {bandwidth / 1e9:.0f} GB/s")
    results: dict[str, Any] = {
        "settings": {k: v for k, v in vars(options).items() if k != "json"},
        "device": name,
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "milliseconds": {},
    }
    for storage in STORAGES:
        model = Model(options.layers, options.rank, storage)
        count = model.count
        print(f"\n{storage}, {model.count / 1e6:.0f}M weights, K = {options.rank}")
        print("operation                        ms   bytes/weight   share of bandwidth")
        calls = operations(model)
        if storage == "float32":
            calls |= torch_operations(model)
        for operation, (call, moved) in calls.items():
            taken = milliseconds(call, options.rounds)
            share = moved / bandwidth * 1e3 / taken
            results["milliseconds"][f"{storage}: {operation}"] = taken
            print(f"{operation:<28} {taken:7.2f} {moved / model.count:14.1f} {share:20.0%}")
        del model, calls
        torch.cuda.empty_cache()
        shapes, device = SHAPES * options.layers, torch.device("cuda")
        for name, optimizer in whole_steps(shapes, options.rank, storage, device):
            taken = milliseconds(optimizer.step, options.rounds)
            moved = floor_bytes(optimizer)
            share = moved / bandwidth * 1e3 / taken
            results["milliseconds"][f"{storage}: step of {name}"] = taken
            print(f"{name:<28} {taken:7.2f} {moved / count:14.1f} {share:20.0%}")
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
