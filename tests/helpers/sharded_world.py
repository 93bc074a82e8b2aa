"""Four processes (gloo) that run all scenarios of sharded training in one start.

Every process writes what it has come to into a file; tests read the files.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import molf
from core_helpers import tiny_model
from molf import AdamW, MoLFConfig
from sharded_models import (
    FORMS,
    build,
    feed_whole,
    is_in,
    local_values,
    loss_of,
    batch,
    ranks_of,
    shard,
    train,
    trained,
    whole_weights,
    wide_model,
)

WORLD = 4
BF16 = torch.bfloat16
# Name: dtype of the model, options of the optimizer.
STORAGES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "exact": (BF16, {}),
    "stochastic": (BF16, {"weight_rounding": "stochastic"}),
    "8bit": (torch.float32, {"state_dtype": "8bit"}),
    "exact 8bit": (BF16, {"state_dtype": "8bit"}),
}
SCORES = [
    "pfn",
    "gsnr",
    "fresh",
    "descent",
    "epd-balanced",
    "epd-corrected",
    "share:0.5:epd",
    "shuffled:epd",
    "random",
    "random:0.5",
    "lora",
]
CHECKPOINTS = {
    **{name: ("folded", name, {"score": "fresh"}) for name in STORAGES},
    "conv": ("folded-conv", "float32", {}),
    "explicit": ("explicit", "exact", {}),
    "frozen": ("frozen", "float32", {"score": "fresh"}),
}


class World:
    """A process of the world.

    Attributes:
        rank: Its number.
        folder: Where results and checkpoints are.
        meshes: Meshes of FSDP2 by name: "2", "3" and "4" shards, "2x2" for two replicas of two.
        pair: Group of processes 0 and 1.
    """

    def __init__(self, rank: int, folder: str) -> None:
        self.rank, self.folder = rank, folder
        self.meshes = {str(n): DeviceMesh("cpu", list(range(n))) for n in (2, 3, 4)}
        self.meshes["2x2"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        self.pair = dist.new_group([0, 1])


def message_of(function: Callable[[], Any], *kinds: type[Exception]) -> str:
    """The message of the error that a function raises; "" if it raises none."""
    try:
        function()
    except kinds or (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def winner_parity(world: World) -> dict[Any, Any]:
    """Trainings under FSDP2, HSDP and DDP, with accumulation and clipping."""
    found: dict[Any, Any] = {}
    for form in FORMS:
        for name, mesh in world.meshes.items():
            if is_in(mesh):
                found[form, name, 1] = trained(form, world.rank, mesh.size(), mesh=mesh)
        found[form, "ddp 4", 1] = trained(form, world.rank, 4, group=dist.group.WORLD)
        if world.rank < 2:
            found[form, "ddp 2", 1] = trained(form, world.rank, 2, group=world.pair)
    for name, micro in (("4", 2), ("2", 4)):
        mesh = world.meshes[name]
        if is_in(mesh):
            own = trained("folded", world.rank, mesh.size(), mesh=mesh, micro=micro)
            found["folded", name, micro] = own
    for name, group, micro in (("ddp 4", dist.group.WORLD, 2), ("ddp 2", world.pair, 4)):
        count = int(name[-1])
        if world.rank < count:
            own = trained("folded", world.rank, count, group=group, micro=micro)
            found["folded", name, micro] = own
    return found


def scores(world: World) -> dict[str, Any]:
    mesh = world.meshes["3"]
    if not is_in(mesh):
        return {}
    return {score: trained("folded", world.rank, 3, mesh=mesh, score=score) for score in SCORES}


def same_gradients(world: World) -> dict[Any, Any]:
    """Steps with given whole gradients, for every storage and number of shards."""
    found: dict[Any, Any] = {}
    for storage in STORAGES:
        for conv in (False, True):
            for name in ("2", "3", "4", "2x2"):
                mesh = world.meshes[name]
                if is_in(mesh):
                    found[storage, conv, name] = fed(storage, conv, mesh)
    return found


def fed(storage: str, conv: bool, mesh: Any = None, *, score: str = "full") -> dict[str, Any]:
    dtype, options = STORAGES[storage]
    model = wide_model(dtype, conv=conv)
    model, optimizer = build("folded", mesh, model, score=score, **options)
    for step in range(3):
        feed_whole(model, step)
        optimizer.step()
    return local_values(model, optimizer)


def fidelity(world: World) -> dict[str, Any]:
    """The share of updates that rounding loses, and its parts: rows and replicas."""
    found = {}
    for name in ("3", "2x2"):
        mesh = world.meshes[name]
        if is_in(mesh):
            found[name] = fidelity_on(mesh)
    return found


def fidelity_on(mesh: Any = None) -> list[Any]:
    model = wide_model(BF16)
    model, optimizer = build("folded", mesh, model, weight_rounding="nearest", lr=1e-4)
    optimizer.measure_updates = True
    found = []
    for step in range(2):
        feed_whole(model, step)
        optimizer.step()
        found.append(tuple(optimizer.update_fidelity))
    return found


def nonfinite(world: World) -> dict[str, Any]:
    """A NaN, or a number that is too large, on one process only."""
    mesh, found = world.meshes["4"], {}
    for form in ("folded", "frozen"):
        for kind in ("nan", "inf", "large", "loss"):
            for reaction in ("raise", "skip"):
                found[form, kind, reaction] = refused(world, form, mesh, kind, reaction)
    return found


def refused(world: World, form: str, mesh: Any, kind: str, reaction: str) -> dict[str, Any]:
    model, optimizer = build(form, mesh, nonfinite=reaction)
    train(model, optimizer, world.rank, 4, steps=1)
    reasons: list[str] = []
    optimizer.on_skipped = reasons.append
    before = local_values(model, optimizer)
    feed_whole(model, 7)
    # In a row that process 1 has: the second part of A or of a weight of 9 rows.
    target = next(p for n, p in model.named_parameters() if ("lora_B" if form == "frozen" else "up.w") in n)
    if world.rank == 1 and kind != "loss":
        value = {"nan": float("nan"), "inf": float("inf"), "large": 1e30}[kind]
        target.grad.to_local()[0, 0] = value
    if kind == "loss":
        optimizer.require_finite(torch.tensor(float("nan") if world.rank == 1 else 1.0))
    message = message_of(optimizer.step)
    return {
        "message": message,
        "reasons": reasons,
        "skipped": optimizer.skipped_steps,
        "same": same(before, local_values(model, optimizer)),
    }


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(value[0], two[name][0]) if isinstance(value, tuple) else value == two[name]
        for name, value in one.items()
    )


def policies(world: World) -> dict[str, Any]:
    """Policies of `fully_shard`."""
    mesh = world.meshes["4"]
    mixed = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    found = {
        "offload": trained(
            "folded", world.rank, 4, mesh=mesh, policy={"offload_policy": CPUOffloadPolicy(False)}
        ),
        "mixed": trained("folded", world.rank, 4, mesh=mesh, policy={"mp_policy": mixed}),
    }
    model, optimizer = build("folded", mesh, tiny_model(BF16), policy={"mp_policy": mixed})
    train(model, optimizer, world.rank, 4)
    exact = optimizer.float32_weights()
    found["exact"] = {
        "routing": [d.winners for d in optimizer.routing.values()],
        "weights": {n: exact[p].full_tensor() for n, p in model.named_parameters()},
        "high": {n: p.full_tensor() for n, p in model.named_parameters()},
        "restore": message_of(optimizer.restore_float32),
    }
    return found


def factors(world: World) -> dict[str, Any]:
    """Factors that are replaced and read; every process has whole ones."""
    found = {}
    for form in ("folded", "folded-conv", "frozen"):
        _, optimizer = build(form, world.meshes["4"])
        (layer, *_) = [g["layer"] for g in optimizer.param_groups if g["layer"] is not None]
        generator = torch.Generator().manual_seed(3)
        given = [
            tuple(torch.randn(x.shape, generator=generator) for x in pair)
            for pair in optimizer.lora_factors(layer)
        ]
        optimizer.set_lora_factors(layer, given)
        found[form] = given, optimizer.lora_factors(layer)
    return found


def buckets(world: World) -> dict[str, Any]:
    """Layers in buckets of one, and all in one bucket."""
    from molf.core.step import exchange

    found, size = {}, exchange.BUCKET_BYTES
    for name, nbytes in (("one", 1), ("all", size)):
        exchange.BUCKET_BYTES = nbytes
        found[name] = trained("folded", world.rank, 4, mesh=world.meshes["4"])["weights"]
    exchange.BUCKET_BYTES = size
    return found


def refusals(world: World) -> dict[str, str]:
    """The messages of all that is refused."""
    found: dict[str, str] = {}
    mesh, grid = world.meshes["4"], world.meshes["2x2"]

    def at_build(name: str, make: Callable[[], Any]) -> None:
        found[name] = message_of(make)

    def with_placements(placements: list[Any], on: Any) -> nn.Module:
        model = tiny_model()
        for module in model.modules():
            for key, p in list(module._parameters.items()):
                if p is not None:
                    cut = [Replicate() if p.dim() < 2 and one == Shard(1) else one for one in placements]
                    setattr(module, key, nn.Parameter(distribute_tensor(p.detach(), on, cut)))
        return model

    layouts = {
        "columns": ([Shard(1)], mesh),
        "replicated": ([Replicate()], mesh),
        "two shards": ([Shard(0), Shard(0)], grid),
    }
    for name, (placements, on) in layouts.items():
        model = with_placements(placements, on)
        at_build(name, lambda model=model: build("folded", None, model))
        at_build(f"{name} fft", lambda model=model: build("fft", None, model))

    def partly() -> nn.Module:
        model = tiny_model()
        fully_shard(model.up, mesh=mesh)
        return model

    at_build("mixed", lambda: build("folded", None, partly()))
    at_build("mixed fft", lambda: build("fft", None, partly()))

    def two_meshes() -> nn.Module:
        model = tiny_model()
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=grid)
        return model

    at_build("two meshes", lambda: build("folded", None, two_meshes()))
    for option in (
        {"optimizer_in_backward": True},
        {"state_offload": True},
        {"kernels": "triton"},
    ):
        at_build(next(iter(option)), lambda option=option: build("folded", mesh, **option))
    at_build(
        "grad_accumulation_dtype",
        lambda: build("folded", mesh, tiny_model(BF16), grad_accumulation_dtype="float32"),
    )

    def adapted_late() -> None:
        model = tiny_model()
        shard(model, mesh)
        config = MoLFConfig(ranks=(2, 3), freeze_rest=False)
        molf.MoLFAdamW.from_model(molf.with_adapter(model, config), config)

    at_build("adapted late", adapted_late)

    # Built first, sharded then: at the first step.
    for form in ("folded", "fft"):
        model, optimizer = build(form)
        shard(model, mesh)
        loss_of(model, batch(0)).backward()
        found[f"built before {form}"] = message_of(optimizer.step)

    # As accelerate does: the parameters of the groups are replaced by position.
    def swapped(options: dict[str, Any], *, columns: bool = False) -> str:
        model, optimizer = build("folded", None, **options)
        places = {p: n for n, p in model.named_parameters()}
        if columns:
            other = with_placements([Shard(1)], mesh)
        else:
            shard(model, mesh)
            other = model
        now = dict(other.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [now[places[p]] for p in group["params"]]
        for p in now.values():
            p.grad = p.detach().clone()
        return message_of(optimizer.step)

    found["swapped"] = swapped({})
    found["swapped with offload"] = swapped({"state_offload": True})
    found["swapped columns"] = swapped({}, columns=True)

    model, optimizer = build("folded", mesh)
    train(model, optimizer, world.rank, 4, steps=1)
    state = optimizer.state_dict()
    _, whole = build("folded")
    found["sharded state"] = message_of(lambda: whole.load_state_dict(state))
    return found


def meeting(world: World) -> dict[str, Any]:
    """A state of one process, by `torch.load`, and its loading into shards."""
    model, optimizer = build("folded")
    train(model, optimizer, steps=2)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    sharded, other = build("folded", world.meshes["4"])
    for p, values in zip(sharded.parameters(), saved["model"].values(), strict=True):
        p.to_local().detach().copy_(
            distribute_tensor(values, world.meshes["4"], [Shard(0)]).to_local()
        )
    other.load_state_dict(saved["optimizer"])
    own = local_values(sharded, other)
    before = {id(x) for state in other.state.values() for x in state.values()}
    other.load_state_dict(other.state_dict())
    kept = {id(x) for state in other.state.values() for x in state.values()}
    return {
        "state": own,
        "keeps tensors": all(i in before for i in kept),
        "whole": local_values(model, optimizer),
    }


def subject(name: str, mesh: Any = None) -> tuple[nn.Module, AdamW]:
    """The model and optimizer of a checkpoint."""
    form, storage, options = CHECKPOINTS[name]
    dtype, how = STORAGES[storage]
    return build(form, mesh, wide_model(dtype, conv=form == "folded-conv"), **how, **options)


def advance(model: nn.Module, optimizer: AdamW) -> None:
    for step in range(2):
        feed_whole(model, step)
        optimizer.step()


def save(path: str, model: nn.Module, optimizer: AdamW, group: Any = None) -> None:
    state = {"model": dict(model.named_parameters()), "optimizer": optimizer.state_dict()}
    quietly(dcp.save, state, storage_writer=FileSystemWriter(path), process_group=group)


def load(path: str, model: nn.Module, optimizer: AdamW, group: Any = None) -> None:
    """Read a checkpoint into the live tensors; counters and groups are written back."""
    optimizer.create_state()
    state = {"model": dict(model.named_parameters()), "optimizer": optimizer.state_dict()}
    quietly(dcp.load, state, storage_reader=FileSystemReader(path), process_group=group)
    optimizer.load_state_dict(state["optimizer"])


def quietly(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        function(*args, **options, no_dist=not dist.is_initialized())


def checkpoints(world: World) -> dict[Any, Any]:
    """Save on 4, load on 3, 2 and 2x2; save on 3, load on 4; load on 4 and 3 from one process."""
    found: dict[Any, Any] = {}
    groups = {name: mesh.get_group() for name, mesh in world.meshes.items() if mesh.ndim == 1 and is_in(mesh)}
    groups["2x2"] = dist.group.WORLD
    for name in CHECKPOINTS:
        for saved in ("4", "3", "2x2"):
            mesh = world.meshes[saved]
            if is_in(mesh):
                model, optimizer = subject(name, mesh)
                advance(model, optimizer)
                found[name, "saved", saved] = local_values(model, optimizer)
                save(f"{world.folder}/{name} {saved}", model, optimizer, groups[saved])
            dist.barrier()
        for source, target in (("4", "3"), ("4", "2"), ("3", "4"), ("4", "2x2"), ("2x2", "3"), ("1", "4"), ("1", "3")):
            mesh = world.meshes[target]
            if is_in(mesh):
                model, optimizer = subject(name, mesh)
                load(f"{world.folder}/{name} {source}", model, optimizer, groups[target])
                found[name, source, target] = local_values(model, optimizer)
            dist.barrier()
    return found


SCENARIOS = [
    winner_parity,
    scores,
    same_gradients,
    fidelity,
    nonfinite,
    policies,
    factors,
    buckets,
    refusals,
    meeting,
    checkpoints,
]


def run(rank: int, folder: str) -> None:
    """One process: all scenarios, in order."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", WORLD)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timeout)
    try:
        world = World(rank, folder)
        found = {scenario.__name__: scenario(world) for scenario in SCENARIOS}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


__all__ = ["CHECKPOINTS", "SCORES", "STORAGES", "ranks_of", "run", "whole_weights"]
