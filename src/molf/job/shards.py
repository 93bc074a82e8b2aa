"""Models in shards over the processes (FSDP2, HSDP), from and to a whole model of rank 0.

Rank 0 has a whole model in host memory. The others have its modules without values, on the meta
device. So all that reads or writes whole weights (checks, adapters, merging, saving) is the code of
one process, run by rank 0, and no device ever has more than one whole tensor.

`fully_shard` is called here, not by `from_pretrained(distributed_config=...)` of transformers: that
cuts while it loads, before an adapter is put in, and leaves the adapter out of the shards.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from molf.core.adamw import AdamW
from molf.core.storage.sharding import as_sharded, layout_of
from molf.errors import InputError
from molf.job.model.loading import LoadedModel, load_model
from molf.job.settings.resolved import ResolvedSettings
from molf.job.settings.sharding import check_offload, shards
from molf.ranks import Ranks

T = TypeVar("T")
LoadsModel = Callable[[str, torch.dtype], LoadedModel]


@dataclass(frozen=True)
class Sharding:
    """Processes that share one model; with several replicas of it, each group of them has one.

    Attributes:
        ranks: All processes.
        device: Device of this process.
        mesh: One dimension of shards, or replicas and shards.
        offloads: Whether shards are in host memory, and copied to the device before each use.
    """

    ranks: Ranks
    device: torch.device
    mesh: DeviceMesh
    offloads: bool = False

    @property
    def count(self) -> int:
        """Number of shards of each replica."""
        return self.mesh.size(self.mesh.ndim - 1)

    @property
    def replicas(self) -> int:
        """Number of replicas of the model."""
        return self.mesh.size() // self.count

    @classmethod
    def of(cls, settings: ResolvedSettings, ranks: Ranks, device: torch.device) -> Sharding | None:
        """Return the sharding of a run; None if each process has a whole model.

        All processes call it. The process group must exist.

        Raises:
            InputError: The shards cannot be offloaded from this device.
        """
        if settings.fsdp_cpu_offload:
            check_offload(device.type)
        count = shards(settings.fsdp, ranks.count)
        if count == 1:
            return None
        replicas = ranks.count // count
        shape = (count,) if replicas == 1 else (replicas, count)
        names = ("replicas", "shards")[-len(shape) :]
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        return cls(ranks, device, mesh, settings.fsdp_cpu_offload)

    def load(self, load: LoadsModel, model: str, dtype: torch.dtype) -> LoadedModel:
        """Return a loaded model, without values except in rank 0.

        Args:
            load: Loads it in rank 0.
            model: A directory or a Hub id.
            dtype: Type of the weights.

        Raises:
            InputError: It cannot be loaded in one of the processes; all raise it.
        """

        def own() -> LoadedModel:
            if self.ranks.is_main:
                return load(model, dtype)
            return load_model(model, dtype, without_values=True)

        return self.ranks.everywhere(own)

    def change(self, act: Callable[[], T]) -> T:
        """Call `act`, which puts new parts into a loaded model, in all processes.

        If it fails in one, all raise the error.
        """

        def without_values() -> T:
            with torch.device("meta"):
                return act()

        return self.ranks.everywhere(act if self.ranks.is_main else without_values)

    def cut(self, whole: nn.Module, *, bf16: bool = False) -> Any:
        """Return a model in shards on the devices; all processes call it.

        Args:
            whole: The model; it is not changed.
            bf16: Compute in bfloat16, with shards in their own dtype and gradients in float32.

        Raises:
            InputError: A process has another model than rank 0.
        """
        values: dict[str, Tensor] = {
            **dict(whole.named_parameters()),
            **dict(whole.named_buffers()),
        }
        self._check_alike({name: _kind_of(value) for name, value in values.items()})
        model = _without_values(whole)
        policy = MixedPrecisionPolicy()
        if bf16:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (*_blocks(model), model):
            fully_shard(
                module, mesh=self.mesh, mp_policy=policy, offload_policy=self._offload_policy()
            )
        for name, owners in _owners(model, nn.Module.named_parameters, "_parameters").items():
            parameter = owners[0][0]._parameters[owners[0][1]]
            assert parameter is not None, "named_parameters has none without values"
            rows = parameter.shape[0]
            part = layout_of(parameter).shards().part(rows)
            local = self._kept(self._sent(values[name])[part])
            cut = nn.Parameter(as_sharded(local, parameter, 0, rows), parameter.requires_grad)
            for module, key in owners:  # several if tied
                module._parameters[key] = cut
        for name, owners in _owners(model, nn.Module.named_buffers, "_buffers").items():
            buffer = self._sent(values[name])
            for module, key in owners:
                module._buffers[key] = buffer
        return model

    def _check_alike(self, kinds: dict[str, str]) -> None:
        """Check that all processes have the tensors of rank 0, in its order.

        Raises:
            InputError: One has not; all raise it. Else a collective would fail, or wait.
        """
        expected = self.ranks.on_main(lambda: kinds)

        def check() -> None:
            for one, other in zip_longest(expected.items(), kinds.items(), fillvalue=("", "none")):
                if one != other:
                    raise InputError(
                        f"The model of rank {self.ranks.rank} differs from that of rank 0: "
                        f"{other[0]} {other[1]} there, {one[0]} {one[1]} in rank 0. All machines "
                        "need the same files and versions of the libraries."
                    )

        self.ranks.everywhere(check)

    def _sent(self, value: Tensor) -> Tensor:
        """Return rank 0's values of a whole tensor, on the device of each process."""
        if self.ranks.is_main:
            sent = value.detach().to(self.device, copy=True).contiguous()
        else:
            sent = torch.empty(value.shape, dtype=value.dtype, device=self.device)
        dist.broadcast(sent, src=0)
        return sent

    def _offload_policy(self) -> OffloadPolicy:
        return CPUOffloadPolicy(pin_memory=self._pins) if self.offloads else OffloadPolicy()

    @property
    def _pins(self) -> bool:
        return self.device.type == "cuda"  # torch pins no memory without one

    def _kept(self, part: Tensor) -> Tensor:
        """Return a copy of this process's rows where the shards are kept."""
        if not self.offloads:
            return part.clone()
        kept = part.to("cpu", copy=True)
        return kept.pin_memory() if self._pins else kept

    @torch.no_grad()
    def gather(self, model: nn.Module, whole: nn.Module, optimizer: Any) -> None:
        """Write the trained values of shards into the whole model of rank 0, one after the other.

        All processes call it.

        Args:
            model: The result of `cut`.
            whole: The model that it was cut from.
            optimizer: The optimizer; exact bfloat16 weights are gathered with their low halves, as
                float32.
        """
        exact = optimizer.float32_weights() if isinstance(optimizer, AdamW) else {}
        targets = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            value: Any = exact.pop(parameter, parameter.detach())
            found = value.full_tensor()
            if self.ranks.is_main:
                targets[name].data = found.cpu()
        if self.ranks.is_main:
            buffers = dict(whole.named_buffers())
            for name, buffer in model.named_buffers():
                buffers[name].copy_(buffer)


def _kind_of(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def free_trained(whole: nn.Module) -> None:
    """Free the values of parameters that are trained in shards; shapes and types stay."""
    for parameter in whole.parameters():
        if parameter.requires_grad and not parameter.is_meta:
            # One element in memory, expanded.
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)


def check_shardable(model: nn.Module, settings: ResolvedSettings) -> None:
    """Check on the parameters, with or without values, that a plain model can be cut.

    Args:
        model: The model, in the types of the training.
        settings: The run's settings, with the assignment of the layers.

    Raises:
        InputError: A parameter has no rows, or the trained ones have several types.
    """
    types: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        types.setdefault(parameter.dtype, name)
        if not parameter.dim():
            raise InputError(
                f"Invalid fsdp with model {settings.model}: its parameter {name} is a single "
                "number, which fully_shard does not cut. Leave fsdp out."
            )
    if settings.has_adapter and settings.trains_dense and settings.dtype != "float32":
        types.setdefault(torch.float32, "the LoRA factors")  # PEFT's
    if len(types) > 1:
        found = ", ".join(f"{name} in {str(dtype)[6:]}" for dtype, name in types.items())
        raise InputError(
            f"Invalid fsdp with dtype={settings.dtype}: fully_shard needs one type of trained "
            f"parameters, and there are {found}. Give --dtype float32."
        )


def _without_values(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device; tied weights stay tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose weights are gathered together, inner ones first."""
    # The names of the classes that transformers places on one device.
    names = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    for module in reversed(list(model.modules())):
        if module is not model and type(module).__name__ in names:
            yield module


def _owners(
    model: nn.Module, named: Callable[[nn.Module], Iterator[tuple[str, Any]]], kind: str
) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return the modules that hold each parameter or buffer, and its key there, by its name."""
    places = defaultdict(list)
    for module in model.modules():
        for key, tensor in getattr(module, kind).items():
            if tensor is not None:
                places[id(tensor)].append((module, key))
    return {name: places[id(tensor)] for name, tensor in named(model)}
