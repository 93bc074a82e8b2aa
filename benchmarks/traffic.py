"""Count the bytes of every collective of a step on shards, against a formula; derive large models.

Processes on this machine (gloo) train small models under `fully_shard`. Every collective is
counted as it is called, with the payload: the size of the whole tensor that all processes gather,
or reduce. In a ring of n processes each one sends (n - 1) / n of the payload of a gather or a
reduce-scatter, and twice that of an all-reduce.

    python benchmarks/traffic.py [--json FILE]

It ends with status 1 if a count differs from the formula. Then it prints the table of
docs/sharding.md: Llama-3-8B and 70B on 8, 64 and 512 GPUs, by the formula.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import molf
from molf.core.storage.sharding import local_part
from molf.planning.live_bytes import LiveBytes
from molf.planning.memory import Planner
from molf.planning.request import traffic_of as traffic_of_plan
from molf.planning.traffic import (
    SHARE,
    RoutedShape,
    ShardedModel,
    StepBytes,
    Traffic,
    adapter_step,
    computation_seconds,
    folded_step,
)
from molf.planning.workload import Workload

RESULTS = Path(__file__).parent / "results" / "traffic.json"
WORLDS = (2, 4)
RANKS = ((8,), (4, 12))
WIDTHS = ((32, 64), (48, 50))  # the second is not divisible by four
SCORES = ("epd", "full")


class Conv1D(nn.Module):
    """GPT-2's transposed linear layer, as transformers names it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x W + b`, [..., nf], from [..., nx]."""
        return x @ self.weight + self.bias


class Counter(TorchDispatchMode):
    """Counts collectives while it is active.

    Attributes:
        calls: Kind and payload of each, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation; note it if it is a collective."""
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::").strip("_")
            sizes = [x.nbytes for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)]
            self.calls.append((kind, max(sizes, default=0)))
        return func(*args, **(kwargs or {}))

    def of_step(self) -> StepBytes:
        """Return the payloads of a step: the two all-reduces come before and after gradients."""
        sums = [place for place, (kind, _) in enumerate(self.calls) if kind.startswith("allreduce")]
        assert len(sums) == 2, self.calls
        check, scores = sums

        def total(word: str, calls: Sequence[tuple[str, int]]) -> int:
            return sum(size for kind, size in calls if word in kind)

        between, after = self.calls[check + 1 : scores], self.calls[scores + 1 :]
        return StepBytes(
            check=self.calls[check][1],
            gather=total("allgather", between),
            reduce=total("reduce_scatter", between),
            scores=self.calls[scores][1],
            operands=total("allgather", after),
        )


def winners_of(optimizer: molf.MoLFAdamW) -> list[list[int]]:
    """Return the winners of every layer in the last step, by index."""
    return [
        [list(decision.scores).index(name) for name in decision.winners]
        for decision in optimizer.routing.values()
    ]


def measure(rank: int, folder: str, count: int) -> None:
    """One process: train and count, for all ranks and sizes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", count),
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=120),
    )
    mesh = init_device_mesh("cpu", (count,))
    rows = [
        count_step(mesh, ranks, widths, score)
        for ranks, widths, score in itertools.product(RANKS, WIDTHS, SCORES)
    ]
    adapters = [count_adapter(mesh, ranks) for ranks in RANKS]
    if rank == 0:
        torch.save((rows, adapters), f"{folder}/rows.pt")
    dist.destroy_process_group()


def count_step(
    mesh: Any, ranks: tuple[int, ...], widths: tuple[int, int], score: str
) -> dict[str, Any]:
    """Train a small model of all kinds of layers for one step; return counts and formula."""
    inner, hidden = widths
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(inner, hidden),
        nn.LayerNorm(hidden),
        nn.Linear(hidden, inner, bias=False),
        Conv1D(hidden, inner),
    )
    layers = [
        RoutedShape(hidden, inner, has_bias=True),
        RoutedShape(inner, hidden),
        RoutedShape(hidden, inner, transposed=True, has_bias=True),
    ]
    for module in model:
        if not isinstance(module, nn.LayerNorm):  # it stays outside, like embeddings and head
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    config = molf.MoLFConfig(ranks=ranks, score=score)
    optimizer = molf.MoLFAdamW.from_model(model, config, lr=1e-3, lora_lr=3e-3)
    step, sharding = Counter(), Counter()
    with sharding:
        model(torch.randn(4, inner)).square().mean().backward()
    with step:
        optimizer.step()
    winners = winners_of(optimizer)
    formula = folded_step(layers, ranks, mesh.size(), winners=winners, others=2)
    return {
        "processes": mesh.size(),
        "ranks": ranks,
        "widths": widths,
        "winners": winners,
        "counted": step.of_step()._asdict(),
        "formula": formula._asdict(),
        "fsdp": sum(size for _, size in sharding.calls),
        "fsdp_formula": fsdp_formula(model, mesh.size()),
    }


def count_adapter(mesh: Any, ranks: tuple[int, ...]) -> dict[str, Any]:
    """Train an adapter for one step; return counts and formula."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32, bias=False))
    config = molf.MoLFConfig(ranks=ranks, freeze_base=True)
    model = molf.with_adapter(plain, config)
    fully_shard(model, mesh=mesh)
    optimizer = molf.MoLFAdamW.from_model(model, config, lora_lr=3e-3)
    step = Counter()
    model(torch.randn(4, 32)).square().mean().backward()
    with step:
        optimizer.step()
    trained = sum(p.requires_grad for p in model.parameters())
    formula = adapter_step(layers=2, experts=len(ranks), trained=trained, terms=1, required=0)
    return {
        "processes": mesh.size(),
        "ranks": ranks,
        "counted": step.of_step()._asdict(),
        "formula": formula._asdict(),
    }


def count_model(mesh: Any, config: Any, method: str, ranks: tuple[int, ...]) -> dict[str, Any]:
    """Train a transformers model for three steps.

    Args:
        mesh: All processes.
        config: The model's configuration.
        method: molf or molf-e.
        ranks: Ranks of the LoRA experts.

    Returns:
        Bytes that each process sends for FSDP2 and for the optimizer if `full` and if LoRA experts
        win, and the most bytes of temporaries in the optimizer's step.
    """
    settings = molf.MoLFConfig(ranks=ranks, score="full" if method == "molf" else "epd")
    torch.manual_seed(0)
    # A configuration keeps the type of the last model that was made of it.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if method == "molf-e":
        settings = molf.MoLFConfig(ranks=ranks, freeze_base=True)
        model = molf.with_adapter(model, settings)
    inner = model.get_base_model() if method == "molf-e" else model
    for module in (*inner.model.layers, model):
        fully_shard(module, mesh=mesh)
    optimizer = molf.MoLFAdamW.from_model(model, settings, lr=1e-3, lora_lr=3e-3)
    ids = torch.arange(16).view(2, 8)
    sent: dict[str, float] = {}
    peak = 0
    # The first step makes the state.
    for name in ("full", "full", "lora"):
        for group in optimizer.param_groups:
            if method == "molf" and group.get("layer") is not None:
                group["score"] = name
        sharding, step = Counter(), Counter()
        with sharding:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.require_finite(loss.detach(), loss.detach())
        is_first = not optimizer.state
        states = [x for state in optimizer.state.values() for x in state.values()]
        gradients = [p.grad for p in model.parameters()]
        tensors = [x for x in (*states, *gradients, *model.parameters()) if torch.is_tensor(x)]
        live = LiveBytes([local_part(x.detach()) for x in tensors])
        with step, live:
            optimizer.step()
        peak = 0 if is_first else max(peak, live.peak)
        optimizer.zero_grad()
        key = name if method == "molf" else "any"
        sent[key] = step.of_step().sent(mesh.size(), mesh.size())
        ring = (mesh.size() - 1) / mesh.size()
        sent["fsdp"] = sum(size for _, size in sharding.calls) * ring
    return {"sent": sent, "peak": peak}


def plan_model(config: Any, method: str, ranks: tuple[int, ...], gpus: int) -> dict[str, Any]:
    """Return what `molf plan` has for the steps of `count_model`."""
    experts = molf.MoLFConfig(ranks=ranks, freeze_base=method == "molf-e")
    workload = Workload(
        method=method, config=experts, batch_size=2, length=8, num_gpus=gpus, device="cpu"
    )
    planner = Planner(config)
    planned, memory = traffic_of_plan(planner.shape(workload), workload), planner.memory(workload)
    assert planned is not None
    return {
        "sent": {**planned.optimizer, "fsdp": planned.fsdp},
        "peak": memory.transient + memory.exchanged,
    }


def fsdp_formula(model: nn.Module, shards: int) -> int:
    """Return the payloads of FSDP2's collectives by `ShardedModel`, with rows padded to shards."""
    numbers = {
        name: -(-p.shape[0] // shards) * shards * p.shape[1:].numel()
        for name, p in model.named_parameters()
    }
    total = sum(numbers.values())
    outside = numbers["1.weight"] + numbers["1.bias"]
    sizes = ShardedModel(total - outside, outside, total, weight_bytes=4, gradient_bytes=4)
    return round(sizes.sent(shards, shards, 1) * shards / (shards - 1))


class Shape(NamedTuple):
    """A published model.

    Attributes:
        layers: Number of decoder layers.
        hidden: Width.
        inner: Width of the MLP.
        kv: Width of keys and values.
        vocabulary: Number of tokens; embeddings and head are not tied.
    """

    layers: int
    hidden: int
    inner: int
    kv: int
    vocabulary: int

    @property
    def linears(self) -> list[RoutedShape]:
        """q, k, v, o, gate, up and down of all decoder layers."""
        h, i, k = self.hidden, self.inner, self.kv
        sides = ((h, h), (k, h), (k, h), (h, h), (i, h), (i, h), (h, i))
        return [RoutedShape(*pair) for pair in sides] * self.layers

    @property
    def in_layers(self) -> int:
        """Parameters in decoder layers."""
        weights = sum(layer.out_features * layer.in_features for layer in self.linears)
        return weights + 2 * self.hidden * self.layers

    @property
    def outside(self) -> int:
        """Parameters of embeddings, head and last norm."""
        return (2 * self.vocabulary + 1) * self.hidden


MODELS = {
    "Llama-3-8B": Shape(32, 4096, 14336, 1024, 128256),
    "Llama-3-70B": Shape(80, 8192, 28672, 1024, 128256),
}
RANK = 128
GPUS = (8, 64, 512)
TOKENS = 8192  # of a GPU in a step, in one forward pass
SHARDS = 8  # of HSDP, with replicas on further machines


def traffic_of(shape: Shape, gpus: int, shards: int) -> tuple[Traffic, StepBytes]:
    """Return the traffic of a training with one LoRA expert, and the payloads if it wins."""
    layers = shape.linears
    others = 2 * shape.layers + 3  # norms; embeddings, head, last norm
    steps = {
        name: folded_step(
            layers, (RANK,), shards, winners=[[won]] * len(layers), others=others, required=2
        )
        for name, won in (("lora", 1), ("full", 0))
    }
    total = shape.in_layers + shape.outside
    model = ShardedModel(shape.in_layers, shape.outside, total, weight_bytes=2, gradient_bytes=4)
    traffic = Traffic(
        gpus,
        shards,
        model.sent(gpus, shards, 1),
        {name: step.sent(gpus, shards) for name, step in steps.items()},
        computation_seconds(total, TOKENS, trains_dense=True, checkpointing=True),
    )
    return traffic, steps["lora"]


def derived() -> list[dict[str, Any]]:
    """Return the traffic and memory of large models, by the formula."""
    rows = []
    for name, shape in MODELS.items():
        for gpus, shards in [(count, count) for count in GPUS] + [(GPUS[-1], SHARDS)]:
            traffic, lora = traffic_of(shape, gpus, shards)
            rows.append(
                {
                    "model": name,
                    "gpus": gpus,
                    "shards": shards,
                    "sent_fsdp_gb": traffic.fsdp / 1e9,
                    "sent_lora_gb": traffic.optimizer["lora"] / 1e9,
                    "sent_full_gb": traffic.optimizer["full"] / 1e9,
                    "share": traffic.optimizer["lora"] / traffic.fsdp,
                    "optimizer_gb_per_s": traffic.optimizer_speed / 1e9,
                    "fsdp_gb_per_s": traffic.fsdp_speed / 1e9,
                    "check_kb": lora.check / 1e3,
                    "scores_kb": lora.scores / 1e3,
                    "far_state_gb": 3 * lora.gather / shards / 1e9,
                    "far_state_whole_gb": 3 * lora.gather / 1e9,
                }
            )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table of docs/sharding.md."""
    share = f"{SHARE:.0%}"
    return [
        "| model | GPUs | shards | FSDP2 | MoLF: LoRA wins | MoLF: full wins | share | "
        f"{share} of a step below | FSDP2 bound below | far factors and moments |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['model']} | {row['gpus']} | {row['shards']} | {row['sent_fsdp_gb']:.1f} | "
            f"{row['sent_lora_gb']:.2f} | {row['sent_full_gb']:.2f} | {row['share']:.1%} | "
            f"{row['optimizer_gb_per_s']:.0f} | {row['fsdp_gb_per_s']:.0f} | "
            f"{row['far_state_gb']:.3f} of {row['far_state_whole_gb']:.2f} |"
            for row in rows
        ),
    ]


def main() -> int:
    """Count, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    adapters: list[dict[str, Any]] = []
    for count in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                measure, (folder, count), nprocs=count, start_method="spawn"
            )
            folded, others = torch.load(f"{folder}/rows.pt", weights_only=False)
            rows += folded
            adapters += others
    differing = [
        row
        for row in (*rows, *adapters)
        if row["counted"] != row["formula"] or row.get("fsdp") != row.get("fsdp_formula")
    ]
    for row in rows:
        print(
            f"{row['processes']} processes, ranks {row['ranks']}, widths {row['widths']}, "
            f"winners {row['winners']}: {row['counted']}; FSDP2 {row['fsdp']}"
            f"{'' if row not in differing else '; formula ' + str(row['formula'])}"
        )
    for row in adapters:
        print(f"{row['processes']} processes, adapter of ranks {row['ranks']}: {row['counted']}")
    count = len(rows) + len(adapters)
    print(f"{count - len(differing)} of {count} steps have the bytes of the formula.\n")
    large = derived()
    print("\n".join(table(large)))
    record = {
        "torch": torch.__version__,
        "counted": rows,
        "adapters": adapters,
        "derived": large,
    }
    text = json.dumps(record, indent=1)
    args.json.write_text(text + "\n", encoding="utf-8")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
