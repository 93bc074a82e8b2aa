"""What trainings on shards must agree with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import sharded_world
from sharded_models import joined, local_values

NEAR = 1e-4  # relative margin of scores below which rounding may choose


def winners_of(found: dict[str, Any]) -> list[dict[str, tuple[str, ...]]]:
    """The winners of every step, by layer."""
    return [{name: d.winners for name, d in step.items()} for step in found["decisions"]]


def assert_as_one_process(found: Sequence[dict[str, Any]], expected: dict[str, Any]) -> None:
    """All processes have the winners, weights and factors of one; among each other, the bits."""
    first = found[0]
    for other in found[1:]:
        assert other["decisions"] == first["decisions"]
        for name, value in first["weights"].items():
            assert torch.equal(other["weights"][name], value), name
    for step, (got, own) in enumerate(zip(first["decisions"], expected["decisions"], strict=True)):
        assert got.keys() == own.keys()
        for layer, decision in own.items():
            if got[layer].winners != decision.winners:
                best, second = sorted(decision.scores.values())[-2:][::-1]
                assert best - second < NEAR * abs(best), (step, layer, got[layer], decision)
            if "random" not in layer:
                torch.testing.assert_close(
                    list(got[layer].scores.values()),
                    list(decision.scores.values()),
                    rtol=1e-3,
                    atol=1e-9,
                )
    assert first["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=0, atol=1e-6)
    for layer, pairs in expected["factors"].items():
        for got, own in zip(first["factors"][layer], pairs, strict=True):
            torch.testing.assert_close(got, own, rtol=0, atol=1e-6)


def assert_resharded(
    found: Sequence[dict[Any, Any]], folder: str, name: str, source: str, target: str
) -> None:
    """A checkpoint of `source` shards, loaded on `target`, has the same bits."""
    shards = sharded_world.SHARDS
    if source == "1":
        model, optimizer = sharded_world.subject(name)
        sharded_world.advance(model, optimizer)
        saved = joined([local_values(model, optimizer)])
    else:
        saved = joined([one[name, "saved", source] for one in found[: shards[source]]])
    if target == "1":
        model, optimizer = sharded_world.subject(name)
        sharded_world.load(f"{folder}/{name} {source}", model, optimizer)
        got = joined([local_values(model, optimizer)])
    else:
        got = joined([one[name, source, target] for one in found[: shards[target]]])
    assert got.keys() == saved.keys()
    assert any(key.endswith("/step") and value == 2 for key, value in got.items())
    for key, value in saved.items():
        same = torch.equal(got[key], value) if torch.is_tensor(value) else got[key] == value
        assert same, key
