"""Start torch's process group of a launched command, also when `torchrun` has restarted it."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

from molf.ranks import launched_count

_POLL_SECONDS = 0.02


def start_group(backend: str, timeout: timedelta) -> None:
    """Start torch's process group; a no-op for one process, and if there is a group.

    `torchrun` keeps one store for all starts of its processes, with the addresses of those that
    have ended (https://github.com/pytorch/pytorch/issues/135712). So each start has its own names
    in the store.

    Args:
        backend: Such as gloo or nccl.
        timeout: Longest wait for another process, here and in a training step.

    Raises:
        RuntimeError: A process did not come in time.
    """
    if launched_count() == 1:
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        return
    store, rank, count = next(rendezvous("env://", timeout=timeout))
    name = fresh_name(store, rank, count, timeout)
    dist.init_process_group(
        backend, store=dist.PrefixStore(name, store), rank=rank, world_size=count, timeout=timeout
    )


def fresh_name(store: Any, rank: int, count: int, timeout: timedelta) -> str:
    """Return a name on which the processes of this start agree, and no earlier ones.

    Args:
        store: A `torch.distributed.Store`, which may hold entries of earlier starts.
        rank: Number of this process.
        count: Number of processes.
        timeout: Longest wait.

    Raises:
        RuntimeError: A process did not come in time.
    """
    own = uuid.uuid4().hex
    until = time.monotonic() + timeout.total_seconds()

    def pause(waiting_for: str) -> None:
        if time.monotonic() > until:
            raise RuntimeError(f"Timed out waiting for {waiting_for}")
        time.sleep(_POLL_SECONDS)  # not `Store.wait`, which holds back signals

    if rank:
        # Rank 0 may read an entry of an earlier start first; its answer has that entry's key.
        store.set(f"molf/here/{rank}", own)
        while not store.check([f"molf/name/{own}"]):
            pause("rank 0")
        name: str = store.get(f"molf/name/{own}").decode()
        store.set(f"molf/ready/{name}/{rank}", "")
        return name
    told: dict[int, str] = {}
    waiting = set(range(1, count))
    while True:
        for other in sorted(waiting):
            if not store.check([f"molf/here/{other}"]):
                continue
            theirs = store.get(f"molf/here/{other}").decode()
            if told.get(other) != theirs:
                store.set(f"molf/name/{theirs}", own)
                told[other] = theirs
            elif store.check([f"molf/ready/{own}/{other}"]):
                waiting.remove(other)
        if not waiting:
            return own
        pause(f"rank {min(waiting)}")
