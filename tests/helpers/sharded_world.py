"""Four processes (gloo) that run all scenarios of sharded training in one start.

Every process writes what it has come to into a file; tests read the files.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
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
import traffic
from core_helpers import as_on_an_accelerator, tiny_model
from forked import start_forked
from molf import AdamW, MoLFConfig
from molf.core.step import exchange
from sharded_models import (
    FORMS,
    batch,
    build,
    feed_whole,
    is_in,
    local_values,
    loss_of,
    same,
    shard,
    train,
    trained,
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
# With `thorough` a world has all of these, without it the first few.
SCORES = {
    False: ["gsnr", "fresh", "share:0.5:epd", "shuffled:epd", "random:0.5"],
    True: ["pfn", "descent", "epd-balanced", "epd-corrected", "shape", "random", "full", "lora"],
}
# Form, storage, options of the optimizer.
SUBJECTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: ("folded", name, {"score": "fresh"}) for name in STORAGES},
    "conv": ("folded-conv", "float32", {}),
    "explicit": ("explicit", "exact", {}),
    "frozen": ("frozen", "float32", {"score": "fresh"}),
}
CHECKPOINTS = {
    False: ["exact 8bit", "conv", "frozen"],
    True: ["float32", "exact", "stochastic", "8bit", "explicit"],
}
# Shards of the checkpoint, and of the training that loads it; "1" is one process.
RESHARDED = [("4", "3"), ("4", "2"), ("3", "4"), ("2x2", "3"), ("1", "4"), ("1", "3")]
SHARDS = {"2": 2, "3": 3, "4": 4, "2x2": 2}
SOME_FORMS = ["folded-conv", "explicit", "frozen"]
# Form, processes, micro-batches.
PARITY = {
    False: [
        *(("folded", name, 1) for name in ("2", "3", "4", "2x2", "ddp 2", "ddp 4")),
        *(("folded", name, micro) for name, micro in (("2", 4), ("4", 2), ("ddp 4", 2))),
        *(
            (form, name, 1)
            for form in ("folded-conv", "explicit", "frozen")
            for name in ("3", "2x2")
        ),
    ],
    True: [
        *((form, name, 1) for form in FORMS for name in ("2", "3", "4", "2x2", "ddp 2", "ddp 4")),
        *((form, name, m) for form in FORMS for name, m in (("2", 4), ("4", 2), ("ddp 2", 4))),
    ],
}


class World:
    """A process of the world.

    Attributes:
        rank: Its number.
        folder: Where results and checkpoints are.
        meshes: Meshes of FSDP2 by name: "2", "3" and "4" shards, "2x2" for two replicas of two.
        pair: Group of processes 0 and 1.
        thorough: Whether it is the world of the slow tests.
    """

    def __init__(self, rank: int, folder: str, thorough: bool) -> None:
        self.rank, self.folder, self.thorough = rank, folder, thorough
        self.meshes = {str(n): DeviceMesh("cpu", list(range(n))) for n in (2, 3, 4)}
        self.meshes["2x2"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        self.pair = dist.new_group([0, 1])


def message_of(function: Callable[[], Any]) -> str:
    """The message of the error that a function raises; "" if it raises none."""
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def winner_parity(world: World) -> dict[Any, Any]:
    """Trainings under FSDP2, HSDP and DDP, with accumulation and clipping."""
    found: dict[Any, Any] = {}
    for form, name, micro in PARITY[world.thorough]:
        if name.startswith("ddp"):
            count = int(name.split()[1])
            on = {"group": world.pair if count == 2 else dist.group.WORLD}
            takes_part = world.rank < count
        else:
            mesh = world.meshes[name]
            count, on, takes_part = mesh.size(), {"mesh": mesh}, is_in(mesh)
        if takes_part:
            found[form, name, micro] = trained(form, world.rank, count, micro=micro, **on)
    return found


def scores(world: World) -> dict[str, Any]:
    mesh = world.meshes["3"]
    names = SCORES[world.thorough] if is_in(mesh) else []
    return {score: trained("folded", world.rank, 3, mesh=mesh, score=score) for score in names}


def same_gradients(world: World) -> dict[Any, Any]:
    """Steps with given whole gradients, for every storage and number of shards."""
    found: dict[Any, Any] = {}
    for storage in STORAGES:
        for conv in (False, True):
            for name, mesh in world.meshes.items():
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


def on_an_accelerator(world: World) -> dict[str, Any]:
    """The order of operations of a device that the host does not read without waiting."""
    found = {}
    for form in ("folded", "frozen"):
        change = as_on_an_accelerator
        found[form] = trained(form, world.rank, 4, mesh=world.meshes["4"], change=change)
    return found


def traffic_of_a_step(world: World) -> list[dict[str, Any]]:
    """Bytes of the collectives, counted and by the formula."""
    mesh = world.meshes["4"]
    return [
        traffic.count_step(mesh, ranks, traffic.WIDTHS[1], score)
        for ranks, score in zip(traffic.RANKS, traffic.SCORES, strict=True)
    ] + [traffic.count_adapter(mesh, traffic.RANKS[1])]


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
            for reaction in ("raise", "skip", "late"):
                found[form, kind, reaction] = refused(world, form, mesh, kind, reaction)
    return found


def refused(world: World, form: str, mesh: Any, kind: str, reaction: str) -> dict[str, Any]:
    is_late = reaction == "late"  # as on an accelerator: moments are updated before the host reads
    model, optimizer = build(form, mesh, nonfinite="raise" if is_late else reaction)
    if is_late:
        as_on_an_accelerator(optimizer)
    train(model, optimizer, world.rank, 4, steps=1)
    reasons: list[str] = []
    optimizer.on_skipped = reasons.append
    before = local_values(model, optimizer)
    feed_whole(model, 7)
    # In a row that process 1 has: the second part of A or of a weight of 9 rows.
    part = "lora_B" if form == "frozen" else "up.w"
    target = next(p for name, p in model.named_parameters() if part in name)
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


def frozen_whole(world: World) -> dict[str, Any]:
    """Trained shards beside frozen parts that stay whole."""
    mesh = world.meshes["2"]
    forms = ("folded", "fft") if is_in(mesh) else ()
    return {form: trained(form, world.rank, 2, model=partly_frozen(mesh)) for form in forms}


def partly_frozen(mesh: Any = None) -> nn.Module:
    """A model with a frozen embedding and a frozen linear layer; a mesh shards the others."""
    model = tiny_model()
    model.embed.requires_grad_(False)
    model.down.requires_grad_(False)
    for part in (model.up, model.norm, model.lm_head) if mesh is not None else ():
        fully_shard(part, mesh=mesh)
    return model


def buckets(world: World) -> dict[str, Any]:
    """Layers in buckets of one, and all in one bucket."""
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
                    columns = p.dim() > 1
                    cut = [one if columns or one != Shard(1) else Replicate() for one in placements]
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

    # An evaluation between the backward pass and the step leaves the root's parameters gathered.
    model, optimizer = build("folded", mesh)
    loss_of(model, batch(0)).backward()
    with torch.no_grad():
        model(batch(0))
    found["unsharded"] = message_of(optimizer.step)
    model.reshard()
    found["sharded again"] = message_of(optimizer.step)

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
    other.load_state_dict(other.state_dict())
    again = local_values(sharded, other)
    return {"state": own, "again": again, "whole": local_values(model, optimizer)}


def subject(name: str, mesh: Any = None) -> tuple[nn.Module, AdamW]:
    """The model and optimizer of a checkpoint."""
    form, storage, options = SUBJECTS[name]
    dtype, how = STORAGES[storage]
    return build(form, mesh, wide_model(dtype, conv=form == "folded-conv"), **how, **options)


def advance(model: nn.Module, optimizer: AdamW) -> None:
    for step in range(2):
        feed_whole(model, step)
        optimizer.step()


def save(path: str, model: nn.Module, optimizer: AdamW, group: Any = None) -> dict[str, Any]:
    """Write the tensors by name; return the numbers of the states."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    numbers: dict[str, Any] = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            kept = tensors if torch.is_tensor(value) else numbers
            kept[f"optimizer.{name}.{key}"] = value
    quietly(dcp.save, tensors, storage_writer=FileSystemWriter(path), process_group=group)
    torch.save(numbers, f"{path}/numbers.pt")
    return numbers


def load(path: str, model: nn.Module, optimizer: AdamW, group: Any = None) -> None:
    """Read a checkpoint in place, into the parameters and into new tensors of the states."""
    reader = FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    targets: dict[str, Any] = {}
    for name, p in model.named_parameters():
        targets[f"model.{name}"] = p.detach()
        for full, item in stored.items():
            owner, _, key = full.removeprefix("optimizer.").rpartition(".")
            if full.startswith("optimizer.") and owner == name:
                room = optimizer.room(p, key, item.size, item.properties.dtype)
                optimizer.state[p][key] = targets[full] = room
    quietly(dcp.load, targets, storage_reader=reader, process_group=group)
    for full, value in torch.load(f"{path}/numbers.pt").items():
        owner, _, key = full.removeprefix("optimizer.").rpartition(".")
        optimizer.state[dict(model.named_parameters())[owner]][key] = value


def quietly(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        function(*args, **options, no_dist=not dist.is_initialized())


def checkpoints(world: World) -> dict[Any, Any]:
    """Save on some shards and load on others; tests load in one process, and have saved there."""
    found: dict[Any, Any] = {}
    groups = {
        name: mesh.get_group()
        for name, mesh in world.meshes.items()
        if mesh.ndim == 1 and is_in(mesh)
    }
    groups["2x2"] = dist.group.WORLD
    names = CHECKPOINTS[world.thorough]
    for name in names:
        for saved in dict.fromkeys(source for source, _ in RESHARDED if source != "1"):
            mesh = world.meshes[saved]
            if is_in(mesh):
                model, optimizer = subject(name, mesh)
                advance(model, optimizer)
                found[name, "saved", saved] = local_values(model, optimizer)
                save(f"{world.folder}/{name} {saved}", model, optimizer, groups[saved])
    dist.barrier()
    for name in names:
        for source, target in RESHARDED:
            mesh = world.meshes[target]
            if is_in(mesh):
                model, optimizer = subject(name, mesh)
                load(f"{world.folder}/{name} {source}", model, optimizer, groups[target])
                found[name, source, target] = local_values(model, optimizer)
    return found


THOROUGH = [winner_parity, scores, checkpoints]
SCENARIOS = [
    *THOROUGH,
    same_gradients,
    on_an_accelerator,
    traffic_of_a_step,
    fidelity,
    nonfinite,
    policies,
    factors,
    frozen_whole,
    buckets,
    refusals,
    meeting,
]


def start(folder: str, *, thorough: bool = False) -> list[dict[str, Any]]:
    """Run a world; return the results of every process, by scenario."""
    for name in CHECKPOINTS[thorough]:
        model, optimizer = subject(name)
        advance(model, optimizer)
        save(f"{folder}/{name} 1", model, optimizer)
    start_forked(run, (folder, thorough), WORLD)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(WORLD)]


def run(rank: int, folder: str, thorough: bool) -> None:
    """One process: all scenarios, in order."""
    with processes(rank, folder, WORLD):
        world = World(rank, folder, thorough)
        scenarios = THOROUGH if thorough else SCENARIOS
        found = {scenario.__name__: scenario(world) for scenario in scenarios}
        torch.save(found, f"{folder}/{rank}.pt")


def start_eight(folder: str) -> list[dict[str, Any]]:
    """Run eight processes with one micro-batch each; return what they have come to."""
    start_forked(run_eight, (folder,), 8)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(8)]


def run_eight(rank: int, folder: str) -> None:
    with processes(rank, folder, 8):
        mesh = DeviceMesh("cpu", list(range(8)))
        found = {
            "8": trained("folded", rank, 8, mesh=mesh),
            "ddp 8": trained("folded", rank, 8, group=dist.group.WORLD),
        }
        torch.save(found, f"{folder}/{rank}.pt")


@contextlib.contextmanager
def processes(rank: int, folder: str, count: int) -> Iterator[None]:
    """Join a group of processes on this machine."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if "MOLF_PLANTED_FAULT" in os.environ:  # `make faults`; its scripts are on the path
        importlib.import_module("faults").pytest_configure()
    store = dist.FileStore(f"{folder}/store", count)
    # The others of a process that fails end by this.
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
