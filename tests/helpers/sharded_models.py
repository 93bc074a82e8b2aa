"""Small models in one process, under DDP and under FSDP2, and what a training comes to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import molf
from core_helpers import tiny_model
from molf import AdamW, MoLFAdamW, MoLFConfig
from molf.core.storage.sharding import cut_like, is_sharded, local_part

ROWS = 24  # of a global batch; 2, 3, 4 and 8 processes and micro-batches divide it
STEPS = 4
FORMS = ["folded", "folded-conv", "explicit", "explicit-conv", "frozen", "fft"]


def conv1d() -> type[nn.Module]:
    """The class that PEFT knows; imported late, because transformers takes seconds."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def conv_model() -> nn.Module:
    model, Conv1D = tiny_model(), conv1d()
    torch.manual_seed(1)
    model.up, model.down = Conv1D(9, 6), Conv1D(6, 9)
    for layer in (model.up, model.down):
        nn.init.normal_(layer.weight, std=0.5)
    return model


class Wide(nn.Module):
    """Rows of whole vectors, so that a shard ends nowhere inside of one; uneven and empty shards.

    `up` has 65 rows of 64 and 8-bit moments, `few` has three rows: one of four shards is empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(67, 64)
        self.up = nn.Linear(64, 65)
        self.few = nn.Linear(64, 3, bias=False)
        self.norm = nn.LayerNorm(64)


def wide_model(dtype: torch.dtype, *, conv: bool = False) -> nn.Module:
    """`Wide`; with `conv`, `up` is stored as [in, out]: 65 rows again."""
    torch.manual_seed(0)
    model = Wide()
    if conv:
        model.up = conv1d()(64, 65)
    return model.to(dtype)


def shard(model: nn.Module, mesh: Any, **policy: Any) -> None:
    """Apply `fully_shard` to the linear layers and to the rest, as one does with blocks."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) or hasattr(module, "nf"):
            fully_shard(module, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)


def build(
    form: str, mesh: Any = None, model: nn.Module | None = None, *, policy: Any = None, **options
) -> tuple[nn.Module, AdamW]:
    """A model in one of `FORMS` and its optimizer, sharded over a mesh if there is one."""
    if model is None:
        model = conv_model() if form.endswith("conv") else tiny_model()
    form = form.removesuffix("-conv")
    fields = MoLFConfig.__dataclass_fields__
    chosen = {name: options.pop(name) for name in list(options) if name in fields}
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings: dict[str, Any] = {"ranks": (2, 3), "alpha": 4.0}
        if form in ("explicit", "frozen"):
            settings |= {"freeze_base": form == "frozen", "freeze_rest": False}
        config = MoLFConfig(**{**settings, **chosen})
        if form in ("explicit", "frozen"):
            torch.manual_seed(2)
            model = molf.with_adapter(model, config)
        if mesh is not None:
            shard(model, mesh, **(policy or {}))
        if form == "fft":
            return model, AdamW(model.named_parameters(), **options)
        return model, MoLFAdamW.from_model(
            model, config, **{"lora_lr": (1.3e-2, 1.6e-2), **options}
        )


def batch(step: int) -> Tensor:
    return torch.randint(11, (ROWS, 5), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.roll(1, 1).flatten())


def train(
    model: nn.Module,
    optimizer: AdamW,
    rank: int = 0,
    count: int = 1,
    *,
    micro: int = 1,
    steps: int = STEPS,
    clip: float | None = 1.0,
) -> list[dict[str, Any]]:
    """Train on this process's rows of every batch; return the decisions of every step."""
    decisions = []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(steps):
        optimizer.zero_grad()
        for ids in batch(step).chunk(count)[rank].chunk(micro):
            (loss_of(model, ids) / micro).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        decisions.append(dict(getattr(optimizer, "routing", {})))
    return decisions


def trained(
    form: str,
    rank: int = 0,
    count: int = 1,
    *,
    mesh: Any = None,
    group: Any = None,
    micro: int = 1,
    change: Callable[[AdamW], Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a training comes to: decisions and whole weights and factors.

    Args:
        form: One of `FORMS`.
        rank: Index of this process's rows.
        count: Number of processes.
        mesh: Of FSDP2.
        group: Of DDP.
        micro: Number of micro-batches.
        change: Changes the optimizer before the first step.
        **options: Those of `build`.
    """
    model, optimizer = build(form, mesh, **options)
    if change is not None:
        change(optimizer)
    wrapped = model if group is None else DistributedDataParallel(model, process_group=group)
    decisions = train(wrapped, optimizer, rank, count, micro=micro)
    factors = {}
    if isinstance(optimizer, MoLFAdamW):
        factors = {layer: optimizer.lora_factors(layer) for layer in decisions[-1]}
    return {"decisions": decisions, "weights": whole_weights(model), "factors": factors}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if is_sharded(p) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def feed_whole(model: nn.Module, seed: int) -> None:
    """Give every parameter a whole random gradient, of which a sharded one gets its part."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if is_sharded(parameter):
            grad = cut_like(grad, parameter, 0)
        parameter.grad = grad


def local_values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of this process's part of every weight and state, by name, with its dimension.

    Returns:
        (values, dimension that is cut) for tensors; numbers as they are.
    """
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        entries = {"": parameter, **optimizer.state.get(parameter, {})}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                cut = (
                    [p.dim for p in value.placements if p.is_shard()] if is_sharded(value) else [0]
                )
                value = local_part(value.detach()).clone(), cut[0], tuple(value.shape)
            found[f"{name}/{key}"] = value
    return found


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole weights and states, from the `local_values` of all shards in order."""
    whole: dict[str, Any] = {}
    for name, first in parts[0].items():
        own = [part[name] for part in parts]
        if not isinstance(first, tuple):
            assert own == [first] * len(own), name
            whole[name] = first
            continue
        _, dim, shape = first
        tensors = [values for values, _, _ in own]
        whole[name] = torch.cat(tensors, dim) if tensors[0].dim() else tensors[0]
        assert tuple(whole[name].shape) == shape, name
    return whole


def is_in(mesh: Any) -> bool:
    return dist.get_rank() in mesh.mesh.flatten().tolist()


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two `local_values` have the same bits."""
    return one.keys() == two.keys() and all(
        torch.equal(value[0], two[name][0]) if isinstance(value, tuple) else value == two[name]
        for name, value in one.items()
    )
