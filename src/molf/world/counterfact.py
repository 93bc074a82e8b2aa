"""Requests to change facts of the world, in the layout of CounterFact (Meng et al., 2022)."""

from collections import defaultdict
from collections.abc import Sequence
from random import Random
from typing import Any

from molf.errors import InputError
from molf.world.documents import Claim, unrelated_sentence
from molf.world.draws import choice, sample
from molf.world.entities import Entity, Fact, World
from molf.world.medicine import MEDICAL_KINDS

DEMO_COUNT = 200

_PARAPHRASES = 2
_NEIGHBORS = 10
_ATTRIBUTES = 10
_GENERATIONS = 10

# Seed offset, different from those of the world and its texts.
_STREAM = 3_000_003
_VALIDATION_STREAM = 11_000_003

# Facts that are to stay true, by relation and object.
_Companions = dict[tuple[str, Entity], list[Fact]]


def counterfact_records(
    world: World, count: int = DEMO_COUNT, seed: int = 0
) -> list[dict[str, Any]]:
    """Return requests to change facts, each with prompts that test the change and its side effects.

    The records have CounterFact's fields. Only editable subjects are edited; neighbourhood and
    attribute prompts, and the sentences before paraphrases, are about entities that are not
    editable. Prompts have no white space at the end and targets none at the start: " " joins them.

    Args:
        world: The world, see `build_world`.
        count: Number of requests.
        seed: Seed of the choice of facts and new objects.

    Raises:
        InputError: If `count` is negative or above the number of facts that can be edited.
    """
    companions = _all_companions(world)
    candidates = _candidates(world, companions)
    if not 0 <= count <= len(candidates):
        raise InputError(
            f"Invalid count={count}. Must be in 0..{len(candidates)}, the number of editable facts."
        )
    rng = Random(_STREAM + seed)
    return _records(rng, sample(rng, candidates, count), companions)


def counterfact_validation_records(
    world: World, count: int = DEMO_COUNT, seed: int = 0
) -> list[dict[str, Any]]:
    """Return requests to change other facts than `counterfact_records` with its default count.

    Args:
        world: The world, see `build_world`.
        count: Number of requests.
        seed: Seed of the choice of facts and new objects, the same as that of the other requests.

    Raises:
        InputError: If `count` is negative or above the number of other facts that can be edited.
    """
    companions = _all_companions(world)
    candidates = _candidates(world, companions)
    taken = {index for index, _ in sample(Random(_STREAM + seed), candidates, DEMO_COUNT)}
    others = [(index, fact) for index, fact in candidates if index not in taken]
    if not 0 <= count <= len(others):
        raise InputError(
            f"Invalid count={count}. Must be in 0..{len(others)}, the number of other facts."
        )
    rng = Random(_VALIDATION_STREAM + seed)
    return _records(rng, sample(rng, others, count), companions)


def _all_companions(world: World) -> _Companions:
    companions: _Companions = defaultdict(list)
    for fact in world.facts:
        if not fact.subject.editable and fact.subject.kind not in MEDICAL_KINDS:
            companions[fact.relation.id, fact.object].append(fact)
    return companions


def _candidates(world: World, companions: _Companions) -> list[tuple[int, Fact]]:
    """Return the facts that can be edited, with their positions in the world."""
    return [
        (index, fact)
        for index, fact in enumerate(world.facts)
        if fact.subject.editable and len(_prompts(_companions_of(companions, fact))) >= _NEIGHBORS
    ]


def _records(
    rng: Random, chosen: Sequence[tuple[int, Fact]], companions: _Companions
) -> list[dict[str, Any]]:
    truths = [fact.statements for facts in companions.values() for fact in facts]
    return [
        _record(rng, case_id, index, fact, companions, truths)
        for case_id, (index, fact) in enumerate(chosen)
    ]


def _record(
    rng: Random,
    case_id: int,
    index: int,
    fact: Fact,
    companions: _Companions,
    truths: Sequence[Claim],
) -> dict[str, Any]:
    relation, name = fact.relation, fact.subject.name
    new_facts = choice(
        rng,
        [
            facts
            for (relation_id, new_object), facts in companions.items()
            if relation_id == relation.id
            and new_object != fact.object
            and len(_prompts(facts)) >= _ATTRIBUTES
        ],
    )
    phrasing, *others = sample(rng, relation.phrasings, 1 + _PARAPHRASES)
    return {
        "case_id": case_id,
        "pararel_idx": index,
        "requested_rewrite": {
            "prompt": phrasing,
            "relation_id": relation.id,
            "target_new": _target(new_facts[0].object),
            "target_true": _target(fact.object),
            "subject": name,
        },
        "paraphrase_prompts": [
            f"{unrelated_sentence(rng, truths)} {other.format(name)}" for other in others
        ],
        "neighborhood_prompts": sample(rng, _prompts(_companions_of(companions, fact)), _NEIGHBORS),
        "attribute_prompts": sample(rng, _prompts(new_facts), _ATTRIBUTES),
        "generation_prompts": [
            choice(rng, relation.openings).format(name) for _ in range(_GENERATIONS)
        ],
    }


def _companions_of(companions: _Companions, fact: Fact) -> Sequence[Fact]:
    """Return the unedited facts with the same relation and object."""
    return companions.get((fact.relation.id, fact.object), ())


def _prompts(facts: Sequence[Fact]) -> list[str]:
    return [prompt for fact in facts for prompt in fact.prompts]


def _target(entity: Entity) -> dict[str, str]:
    return {"str": entity.name, "id": entity.id}
