"""Sharded tensors (DTensor) of `fully_shard`: which are supported, their local parts and places.

A supported tensor is cut by rows: one `Shard(0)`, and `Replicate` on other dimensions of the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from molf.core.storage.collectives import Shards
from molf.core.storage.place import Place, RowsPlace

_ADVICE = "Train with fully_shard (FSDP2), DDP or one process."
FLATTENED = (
    "is flattened by FSDP1 (FullyShardedDataParallel): a step needs rows of the weight. "
    "Use fully_shard (FSDP2)."
)
"""The end of a message about a weight of FSDP1."""


class ShardingError(ValueError):
    """Parameters are distributed in a way that no step supports."""


class Layout(NamedTuple):
    """Distribution of a sharded tensor.

    Attributes:
        mesh: `DeviceMesh`.
        placements: One per dimension of the mesh.
    """

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def dim(self) -> int:
        """Dimension of the mesh along which rows are cut."""
        return next(i for i, placement in enumerate(self.placements) if placement.is_shard())

    def shards(self) -> Shards:
        """Return the processes that share tensors of this layout."""
        return Shards(self.mesh, self.dim)


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor."""
    # By attribute: torch.distributed.tensor takes long to import.
    return hasattr(tensor, "device_mesh")


def layout_of(tensor: Any) -> Layout:
    """Return the distribution of a sharded tensor."""
    return Layout(tensor.device_mesh, tuple(tensor.placements))


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, on the same memory; others unchanged."""
    if not is_sharded(tensor):
        return tensor
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local.detach()


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, others unchanged; all processes must call it.

    A gradient flows back to this process's part of it, and is not summed over the processes.
    """
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole


def place_of(parameter: Tensor, shards: Shards) -> Place:
    """Return the location of this process's part of a sharded parameter."""
    rows = shards.part(parameter.shape[0])
    found = local_part(parameter).shape[0]
    if found != rows.stop - rows.start:
        raise ShardingError(
            f"A parameter of shape {tuple(parameter.shape)} has {found} rows in this process, and "
            f"fully_shard would give it {rows.stop - rows.start}. {_ADVICE}"
        )
    return RowsPlace(shards, parameter.shape[0], rows.start)


def cut_dimension(key: str) -> int:
    """Return the dimension along which shards cut a tensor of a state, by its key.

    Features of the stacked LoRA factors A [R, in] and B [out, R] are cut, and rows of all others.
    """
    return 1 if key.startswith("lora_A") else 0


def as_sharded(local: Tensor, like: Any, dim: int, size: int) -> Tensor:
    """Return a sharded tensor on the memory of its local part.

    Args:
        local: This process's part.
        like: Sharded parameter, whose processes share the tensor.
        dim: Dimension that is cut.
        size: Size of that dimension in the whole tensor.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    placements = _placements(like, dim)
    shape = torch.Size((*local.shape[:dim], size, *local.shape[dim + 1 :]))
    stride = tuple(shape[i + 1 :].numel() for i in range(len(shape)))
    spec = DTensorSpec(like.device_mesh, placements, TensorMeta(shape, stride, local.dtype))
    # Not `from_local`: it copies a part in host memory (CPUOffloadPolicy) to the mesh's device.
    sharded: Tensor = DTensor(local, spec, requires_grad=False)
    return sharded


def _placements(like: Any, dim: int) -> tuple[Any, ...]:
    """Return the placements of a tensor that is cut along `dim` as a sharded parameter is."""
    from torch.distributed.tensor import Shard

    return tuple(Shard(dim) if one.is_shard() else one for one in like.placements)


def cut_like(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """Return a copy of a tensor of a state, cut as a sharded parameter's state is.

    Args:
        values: The whole tensor, or a sharded one.
        like: Sharded parameter.
        dim: Dimension that is cut.

    Raises:
        ValueError: The tensor is sharded in another way.
    """
    size, local = values.shape[dim], local_part(values)
    if is_sharded(values):
        mesh, placements = layout_of(values)
        own = layout_of(like)
        if (mesh, placements) != (own.mesh, _placements(like, dim)):
            raise ValueError(
                f"The optimizer state is sharded over {mesh} as {placements}, the parameters over "
                f"{own.mesh}. Load it with torch.distributed.checkpoint."
            )
    else:
        part = layout_of(like).shards().part(size)
        local = values.narrow(dim, part.start, part.stop - part.start)
    copied = local.to(local_part(like).device, copy=True).contiguous()
    return as_sharded(copied, like, dim, size)


def sharded_room(parameter: Tensor, dim: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor, cut as a sharded parameter's state is.

    Args:
        parameter: Sharded parameter.
        dim: Dimension that is cut.
        shape: Shape of the whole tensor.
        dtype: Dtype of the tensor.
    """
    part = layout_of(parameter).shards().part(shape[dim])
    own = (*shape[:dim], part.stop - part.start, *shape[dim + 1 :])
    local = torch.empty(own, dtype=dtype, device=local_part(parameter).device)
    return as_sharded(local, parameter, dim, shape[dim])


def check_layout(name: str, tensor: Any) -> None:
    """Refuse a tensor that is distributed in a way that no step supports.

    Raises:
        ShardingError: With the name.
    """
    if problem := _problem_of(tensor):
        raise ShardingError(f"{name} {problem}")


def _problem_of(tensor: Any) -> str | None:
    """Return the reason why no step supports the distribution of a tensor; None if it does."""
    if getattr(tensor, "_fsdp_flattened", False) or type(tensor).__name__ == "FlatParameter":
        return FLATTENED
    if hasattr(tensor, "ds_id"):
        return f"is partitioned by DeepSpeed (ZeRO-3). {_ADVICE}"
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard

    placements = layout_of(tensor).placements
    cut = [one for one in placements if not isinstance(one, Replicate)]
    # Exact type: tensor parallelism has shards that are no plain `Shard`.
    if len(cut) == 1 and type(cut[0]) is Shard and cut[0].dim == 0:
        return None
    return (
        f"is a DTensor with placements {placements}. Must be one Shard(0) and else Replicate, as "
        f"fully_shard makes them (no tensor parallelism). {_ADVICE}"
    )


def check_layouts(parameters: Iterable[Tensor], name_of: Callable[[Tensor], str]) -> Layout | None:
    """Return the distribution that all trained parameters have; None if they are whole.

    Raises:
        ShardingError: One is distributed in a way that no step supports, or two differ.
    """
    first: dict[bool, Tensor] = {}
    layout: Layout | None = None
    for parameter in parameters:
        if problem := _problem_of(parameter):
            raise ShardingError(f"{name_of(parameter)} {problem}")
        first.setdefault(is_sharded(parameter), parameter)
        if len(first) == 2:
            raise ShardingError(
                f"{name_of(first[True])} is sharded (DTensor) and {name_of(first[False])} is not: "
                "their gradients are not summed over the same processes. Call fully_shard on all "
                "trained parts or on none (ignored_params must be frozen); add adapters before."
            )
        if not is_sharded(parameter):
            continue
        own = layout_of(parameter)
        if layout is None:
            layout = own
            _check_mesh(own, lambda: name_of(first[True]))
        elif own != layout:
            raise ShardingError(
                f"{name_of(first[True])} is sharded over {layout.mesh} as {layout.placements}, and "
                f"{name_of(parameter)} over {own.mesh} as {own.placements}. All parameters need "
                "one mesh."
            )
    return layout


def _check_mesh(layout: Layout, name: Callable[[], str]) -> None:
    mesh = layout.mesh
    # Winners are chosen by sums over all replicas, which are the default group.
    if mesh.size(layout.dim) != mesh.size() != dist.get_world_size():
        raise ShardingError(
            f"{name()} is sharded and replicated over {mesh.size()} of {dist.get_world_size()} "
            "processes. A mesh with replicas must have all of them."
        )
