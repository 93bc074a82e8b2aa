"""Choose the training of each layer: by evidence, at random, or by shape. Imports no torch."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from molf.core.assignment.assigned import (
    FROZEN,
    FULL,
    LORA,
    AssignedLayer,
    Evidence,
    Treatment,
    weights_of,
)
from molf.core.config import MoLFConfig
from molf.core.scores.score import Expert
from molf.core.scores.shape import shape as expected_score


def by_wins(
    evidence: Mapping[str, Evidence], adapters: Mapping[str, Treatment]
) -> dict[str, Treatment]:
    """Return the treatment that the expert with the most wins stands for, by layer.

    Args:
        evidence: Decisions by layer; at least one each.
        adapters: Treatment of each LoRA expert, by name.
    """
    return {
        name: Treatment(FULL) if one.most == FULL else adapters[one.most]
        for name, one in evidence.items()
    }


def by_score(
    evidence: Mapping[str, Evidence], adapters: Mapping[str, Treatment]
) -> dict[str, Treatment]:
    """Return `full` where its score leads on the mean of the steps, also if it won fewer of them.

    The other layers get the LoRA expert with the most wins, or the first if none won.

    Args:
        evidence: Decisions by layer; at least one each.
        adapters: Treatment of each LoRA expert, by name.

    Raises:
        ValueError: There is no `full` expert.
    """
    if any(one.margin is None for one in evidence.values()):
        raise ValueError("Invalid by='score': there is no full expert to be compared.")
    leading = [name for name, one in evidence.items() if (one.margin or 0.0) > 0]
    return _full_in(leading, evidence, adapters)


def by_share(
    evidence: Mapping[str, Evidence], adapters: Mapping[str, Treatment], share: float
) -> dict[str, Treatment]:
    """Return `full` for the share of layers in which it leads most, by the mean margin.

    The other layers get the LoRA expert with the most wins, or the first if none won.

    Args:
        evidence: Decisions by layer; at least one each.
        adapters: Treatment of each LoRA expert, by name.
        share: Share of layers, above 0 and below 1, rounded to whole layers.

    Raises:
        ValueError: The share is out of range, or there is no `full` expert.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"Invalid share={share!r}. Must be above 0 and below 1.")
    if any(one.margin is None for one in evidence.values()):
        raise ValueError(f"Invalid share={share:g}: there is no full expert to be compared.")
    ranking = sorted(evidence, key=lambda name: -(evidence[name].margin or 0.0))  # stable
    return _full_in({*ranking[: round(share * len(ranking))]}, evidence, adapters)


def _full_in(
    chosen: Collection[str], evidence: Mapping[str, Evidence], adapters: Mapping[str, Treatment]
) -> dict[str, Treatment]:
    """Return `full` for the chosen layers, and the best LoRA expert for the others."""
    made = {}
    for name, one in evidence.items():
        lora = {expert: count for expert, count in one.wins if expert in adapters}
        best = max(lora, key=lambda expert: lora[expert])
        made[name] = Treatment(FULL) if name in chosen else adapters[best]
    return made


def at_random(layers: Sequence[AssignedLayer], seed: int) -> dict[str, Treatment]:
    """Draw layers for `full` with as many weights in all as before; frozen layers stay.

    Every set of layers with this number of weights is equally likely. A layer that was `full` and
    becomes `lora` gets the rank and alpha of one of the others, drawn too.

    Args:
        layers: The layers with their treatment.
        seed: Seed of the draw.
    """
    generator = random.Random(f"molf/random_like/{seed}")
    movable = [layer for layer in layers if layer.train != FROZEN]
    adapters = [Treatment(LORA, one.r, one.alpha) for one in movable if one.train == LORA]
    by_size: defaultdict[int, list[str]] = defaultdict(list)
    for layer in movable:
        by_size[layer.weights].append(layer.name)
    wanted = weights_of(layer for layer in movable if layer.train == FULL)
    full: set[str] = set()
    for size, count in _draw_counts(by_size, wanted, generator).items():
        full |= set(generator.sample(by_size[size], count))
    made = {}
    for layer in movable:
        if layer.name in full:
            made[layer.name] = Treatment(FULL)
        elif layer.train == LORA:
            made[layer.name] = Treatment(LORA, layer.r, layer.alpha)
        else:
            made[layer.name] = generator.choice(adapters)
    return made


def count_sets(layers: Sequence[AssignedLayer], wanted: int) -> int:
    """Return the number of sets of layers that have so many weights in all."""
    sizes = Counter(layer.weights for layer in layers)
    return _ways(sorted(sizes.items()), wanted)[-1].get(wanted, 0)


def _ways(sizes: Sequence[tuple[int, int]], wanted: int) -> list[dict[int, int]]:
    """Return, for the first k sizes, the number of sets of layers by their number of weights.

    Args:
        sizes: Each number of weights of a layer, and the number of layers that have it.
        wanted: The largest number of weights of a set.
    """
    ways: list[dict[int, int]] = [{0: 1}]
    for size, most in sizes:
        found: Counter[int] = Counter()
        for weights, sets in ways[-1].items():
            for count in range(min(most, (wanted - weights) // size) + 1):
                found[weights + count * size] += sets * math.comb(most, count)
        ways.append(dict(found))
    return ways


def _draw_counts(
    by_size: Mapping[int, Sequence[str]], wanted: int, generator: random.Random
) -> dict[int, int]:
    """Draw how many layers of each size are chosen, so that every set of layers is equally likely.

    Args:
        by_size: Names of the layers by their number of weights.
        wanted: Number of weights to choose; at least one set of layers has it.
        generator: The source of draws.
    """
    sizes = sorted((size, len(names)) for size, names in by_size.items())
    ways, counts = _ways(sizes, wanted), {}
    for (size, most), below in reversed(list(zip(sizes, ways, strict=False))):
        options = [
            below.get(wanted - count * size, 0) * math.comb(most, count)
            for count in range(min(most, wanted // size) + 1)
        ]
        draw = generator.randrange(sum(options))
        count = 0
        while draw >= options[count]:
            draw -= options[count]
            count += 1
        counts[size] = count
        wanted -= count * size
    return counts


def by_shape(
    layers: Sequence[AssignedLayer], config: MoLFConfig, lr: float, lora_lr: float
) -> dict[str, Treatment]:
    """Return the treatment by EPD's expectation for gradients of noise; frozen layers stay.

    `full` is chosen where `lr > lora_lr s / sqrt(3) * out / (in + out)` for every LoRA expert.

    Args:
        layers: The layers.
        config: Ranks and scalings of the LoRA experts.
        lr: Learning rate of `full`.
        lora_lr: Learning rate of the LoRA experts.
    """
    made = {}
    for layer in layers:
        if layer.train == FROZEN:
            continue
        experts = {Treatment(FULL): Expert("full", None, lr, 1.0, layer.shape, (), {})}
        for rank, alpha, scaling in zip(config.ranks, config.alphas, config.scalings, strict=True):
            own = Expert(f"r{rank}", rank, lora_lr, scaling, layer.shape, (), {})
            experts.setdefault(Treatment(LORA, rank, float(alpha)), own)
        made[layer.name] = max(experts, key=lambda one: expected_score(experts[one]))
    return made


def with_treatments(
    layers: Sequence[AssignedLayer], treatments: Mapping[str, Treatment], *, use_rslora: bool
) -> tuple[AssignedLayer, ...]:
    """Return the layers with other treatments, without evidence; those without one stay.

    Args:
        layers: The layers.
        treatments: The treatments by layer; a rank above the layer's smaller side becomes that.
        use_rslora: Whether their alpha is for rank-stabilised scaling.
    """
    made = []
    for layer in layers:
        treatment = treatments.get(layer.name, Treatment(layer.train))
        fitted = treatment.fitted(layer.shape, use_rslora=use_rslora)
        made.append(replace(layer, evidence=None, **fitted._asdict()))
    return tuple(made)
