"""Steps on the shards of one process, compared with steps on whole parameters.

One process has all rows, but takes the code of many: DTensors, lent local parts, every collective.
`scripts/first_gpu_run.sh` runs it over NCCL, `python scripts/world_of_one.py gloo` on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from molf import MoLFAdamW, MoLFConfig

STEPS = 6
BOUND = 1e-6  # largest difference of a weight
STORAGES: dict[str, dict[str, Any]] = {"float32": {}, "8-bit moments": {"state_dtype": "8bit"}}


def make_model(device: str) -> nn.Module:
    """Return two linear layers between norms, with the same weights in every call."""
    torch.manual_seed(0)
    layers = [nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.LayerNorm(256)]
    return nn.Sequential(*layers).to(device)


def train(
    device: str, storage: str, *, is_cut: bool, offloads: bool = False
) -> dict[str, torch.Tensor]:
    """Return the parameters after some steps, whole and on the CPU."""
    model = make_model(device)
    if is_cut:
        pins = device == "cuda"
        policy: dict[str, Any] = {}
        if offloads:
            policy["offload_policy"] = CPUOffloadPolicy(pin_memory=pins)
        fully_shard(model, mesh=init_device_mesh(device, (1,)), **policy)
    # Close rates, so that both kinds of experts win layers.
    config = MoLFConfig(ranks=(8, 4), alpha=16)
    optimizer = MoLFAdamW.from_model(model, config, lr=1e-3, lora_lr=2e-3, **STORAGES[storage])
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, y = torch.randn(2, 32, 256, generator=generator).to(device)
        loss = (model(x) - y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) != is_cut:
            raise SystemExit(f"{name}: expected a DTensor: {is_cut}")
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name] = whole.detach().cpu()
    return found


def main() -> None:
    """Compare both, and end with exit code 1 if they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("backend", choices=("nccl", "gloo"))
    backend = parser.parse_args().backend
    device = "cuda" if backend == "nccl" else "cpu"
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    # Gradients of offloaded shards are clipped in host memory, which NCCL does not read.
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    dist.init_process_group(backends, rank=0, world_size=1)
    worst = 0.0
    for storage in STORAGES:
        whole = train(device, storage, is_cut=False)
        for offloads in (False, True):
            cut = train(device, storage, is_cut=True, offloads=offloads)
            difference = max(float((whole[name] - cut[name]).abs().max()) for name in whole)
            kind = f"{storage}, offloaded" if offloads else storage
            print(f"{backend}, {kind}: largest difference of a weight {difference:.1e}")
            worst = max(worst, difference)
    dist.destroy_process_group()
    if not worst <= BOUND:
        sys.exit(f"Weights differ by {worst:.1e}. At most {BOUND:.0e} is allowed.")


if __name__ == "__main__":
    main()
