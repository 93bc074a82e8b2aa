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

import molf

RESULTS = Path(__file__).parent / "results" / "traffic.json"
WORLDS = (2, 4)
RANKS = ((8,), (4, 12))
WIDTHS = ((32, 64), (48, 50))  # the second is not divisible by four
SCORES = ("epd", "full")


class Layer(NamedTuple):
    """A routed linear layer.

    Attributes:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        transposed: Whether it is stored as [in, out].
        has_bias: Whether a bias is trained.
    """

    out_features: int
    in_features: int
    transposed: bool = False
    has_bias: bool = False

    @property
    def far(self) -> int:
        """Features of the far factor: those that are no rows of the stored weight."""
        return self.out_features if self.transposed else self.in_features


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


class Bytes(NamedTuple):
    """Payloads of the collectives of one step, in bytes.

    Attributes:
        check: Squares of all gradients and factors, one all-reduce.
        gather: Far factors, all-gathers.
        reduce: Gradients of the far factors, reduce-scatters.
        scores: Sums of score terms, one all-reduce.
        operands: Far operands of the products, all-gathers.
    """

    check: int
    gather: int
    reduce: int
    scores: int
    operands: int

    @property
    def exchanged(self) -> int:
        """Payloads of gathers and reduce-scatters."""
        return self.gather + self.reduce + self.operands


def expected(
    layers: Sequence[Layer],
    ranks: Sequence[int],
    shards: int,
    *,
    winners: Sequence[Sequence[int]],
    others: int = 0,
    terms: int = 1,
    decay: bool = True,
) -> Bytes:
    """Return the payloads of one step of the folded form, by the formula; float32 factors.

    Args:
        layers: The routed layers.
        ranks: Ranks of the LoRA experts.
        shards: Number of shards.
        winners: Winners of each layer; 0 is `full`, 1 the first LoRA expert.
        others: Number of other trained tensors.
        terms: Number of terms of the score.
        decay: Whether weights decay: `full` then needs the LoRA product.
    """
    total = sum(ranks)
    far = [-(-layer.far // shards) * shards for layer in layers]  # padded to equal parts
    dense = [1 + layer.has_bias for layer in layers]
    operands = 0
    for size, won in zip(far, winners, strict=True):
        width = sum(2 * ranks[expert - 1] for expert in won if expert)
        operands += 4 * size * (width + (total if 0 in won and decay else 0))
    return Bytes(
        check=8 * (sum(dense) + 2 * len(layers) + others),
        gather=4 * total * sum(far),
        reduce=4 * total * sum(far),
        scores=8 * terms * (sum(dense) + 2 * len(ranks) * len(layers)),
        operands=operands,
    )


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

    def of_step(self) -> Bytes:
        """Return the payloads of a step: the two all-reduces come before and after gradients."""
        sums = [place for place, (kind, _) in enumerate(self.calls) if kind.startswith("allreduce")]
        assert len(sums) == 2, self.calls
        check, scores = sums

        def total(word: str, calls: Sequence[tuple[str, int]]) -> int:
            return sum(size for kind, size in calls if word in kind)

        between, after = self.calls[check + 1 : scores], self.calls[scores + 1 :]
        return Bytes(
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
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")
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
        Layer(hidden, inner, has_bias=True),
        Layer(inner, hidden),
        Layer(hidden, inner, transposed=True, has_bias=True),
    ]
    for module in model:
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
    formula = expected(layers, ranks, mesh.size(), winners=winners, others=2)
    return {
        "processes": mesh.size(),
        "ranks": ranks,
        "widths": widths,
        "winners": winners,
        "counted": step.of_step()._asdict(),
        "formula": formula._asdict(),
        "fsdp": sum(size for _, size in sharding.calls),
    }


class Shape(NamedTuple):
    """A published model.

    Attributes:
        layers: Number of decoder layers.
        hidden: Width.
        inner: Width of the MLP.
        kv: Width of keys and values.
        parameters: Number of parameters.
    """

    layers: int
    hidden: int
    inner: int
    kv: int
    parameters: float

    def linears(self) -> list[Layer]:
        """Return q, k, v, o, gate, up and down of all decoder layers."""
        h, i, k = self.hidden, self.inner, self.kv
        sides = ((h, h), (k, h), (k, h), (h, h), (i, h), (i, h), (h, i))
        return [Layer(*pair) for pair in sides] * self.layers


MODELS = {
    "Llama-3-8B": Shape(32, 4096, 14336, 1024, 8.03e9),
    "Llama-3-70B": Shape(80, 8192, 28672, 1024, 70.6e9),
}
RANK = 128
GPUS = (8, 64, 512)


def derived() -> list[dict[str, Any]]:
    """Return the traffic and memory of large models, by the formula."""
    rows = []
    for name, shape in MODELS.items():
        layers = shape.linears()
        norms = 2 * shape.layers + 3  # and embedding, head, last norm
        for count in GPUS:
            bytes_of = {
                word: expected(
                    layers, (RANK,), count, winners=[[expert]] * len(layers), others=norms
                )
                for word, expert in (("lora", 1), ("full", 0))
            }
            # Two gathers of bfloat16 weights, one reduce-scatter of float32 gradients.
            fsdp = shape.parameters * (2 + 2 + 4)
            ring = (count - 1) / count
            lora = bytes_of["lora"]
            rows.append(
                {
                    "model": name,
                    "gpus": count,
                    "sent_fsdp_gb": fsdp * ring / 1e9,
                    "sent_lora_gb": lora.exchanged * ring / 1e9,
                    "sent_full_gb": bytes_of["full"].exchanged * ring / 1e9,
                    "share": lora.exchanged / fsdp,
                    "check_kb": lora.check / 1e3,
                    "scores_kb": lora.scores / 1e3,
                    "far_state_gb": 3 * lora.gather / count / 1e9,
                    "far_state_whole_gb": 3 * lora.gather / 1e9,
                }
            )
    return rows


def print_derived(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of docs/sharding.md."""
    print("| model | GPUs | FSDP2 | MoLF: LoRA wins | MoLF: full wins | share | far factors |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['model']} | {row['gpus']} | {row['sent_fsdp_gb']:.1f} GB | "
            f"{row['sent_lora_gb']:.2f} GB | {row['sent_full_gb']:.2f} GB | {row['share']:.1%} | "
            f"{row['far_state_gb']:.3f} of {row['far_state_whole_gb']:.2f} GB |"
        )


def main() -> int:
    """Count, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for count in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                measure, (folder, count), nprocs=count, start_method="spawn"
            )
            rows += torch.load(f"{folder}/rows.pt", weights_only=False)
    differing = [row for row in rows if row["counted"] != row["formula"]]
    for row in rows:
        print(
            f"{row['processes']} processes, ranks {row['ranks']}, widths {row['widths']}, "
            f"winners {row['winners']}: {row['counted']}; FSDP2 {row['fsdp']}"
            f"{'' if row not in differing else '; formula ' + str(row['formula'])}"
        )
    print(f"{len(rows) - len(differing)} of {len(rows)} steps have the bytes of the formula.\n")
    large = derived()
    print_derived(large)
    text = json.dumps({"torch": torch.__version__, "counted": rows, "derived": large}, indent=1)
    args.json.write_text(text + "\n", encoding="utf-8")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
