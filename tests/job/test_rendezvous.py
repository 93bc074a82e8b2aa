"""Processes that `torchrun` has restarted find each other in a store with old entries."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from molf.rendezvous import fresh_name

SOON = timedelta(seconds=10)


def names_of(store, ranks, count):
    found = {}
    threads = [
        threading.Thread(target=lambda r=r: found.update({r: fresh_name(store, r, count, SOON)}))
        for r in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_each_start_has_a_name_of_its_own():
    store = dist.HashStore()
    # A start that died before rank 2 had come, and after rank 1 had.
    store.set("molf/here/1", "dead")
    store.set("molf/name/dead", "gone")
    store.set("molf/ready/gone/1", "")
    first = names_of(store, (2, 0, 1), 3)
    second = names_of(store, (0, 1), 2)  # one process less
    assert len(set(first.values())) == len(set(second.values())) == 1
    assert len({"gone", first[0], second[0]}) == 3


def test_process_that_does_not_come():
    with pytest.raises(RuntimeError, match="Timed out waiting for rank 1"):
        fresh_name(dist.HashStore(), 0, 2, timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match="Timed out waiting for rank 0"):
        fresh_name(dist.HashStore(), 1, 2, timedelta(seconds=0.1))
