"""Multiple-choice questions about the world's medicine, in MedMCQA's layout (Pal et al., 2022).

A question names a drug or a condition, and the options are four things of one kind. Among the wrong
ones is always what the subject's other relation of that kind leads to, so that the question has to
be understood. All facts stand in the base model's training texts, in other words.
"""

from collections.abc import Sequence
from itertools import chain, cycle, islice
from random import Random
from typing import Any

from molf.world.draws import choice, sample, shuffled
from molf.world.entities import Entity, Fact, World
from molf.world.medical_relations import PRACTISED, SUBJECTS
from molf.world.medicine import MEDICAL_KINDS

TRAIN_COUNT = 600
VALIDATION_COUNT = 200

_OPTIONS = ("opa", "opb", "opc", "opd")
_PRACTICE_PER_FACT = 6
_NAMINGS = 6000

# Streams of randomness apart from the world's own and those of its texts.
_STREAM = 5_000_003
_PRACTICE_STREAM = 6_000_003
_NAMING_STREAM = 10_000_003


def med_records(world: World) -> dict[str, list[dict[str, Any]]]:
    """Returns the questions of the task by split, `train` and `validation`.

    Each validation question is about a fact that no training question is about. Base models have
    seen questions for half of the relations, see `med_practice`; for the others they have to learn
    from the training questions what is asked.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _STREAM)
    training, validation = _split(world)
    asked = [(fact, wording) for fact in training for wording in fact.relation.questions]
    # Every fact once, then others of its wordings.
    first = {fact: (fact, choice(rng, fact.relation.questions)) for fact in training}
    others = shuffled(rng, [pair for pair in asked if pair != first[pair[0]]])
    chosen = {
        "train": shuffled(rng, [*first.values(), *others][:TRAIN_COUNT]),
        "validation": [(fact, choice(rng, fact.relation.questions)) for fact in validation],
    }
    return {
        split: _records(rng, world, pairs, f"demo-med-{split}") for split, pairs in chosen.items()
    }


def med_practice(world: World) -> list[dict[str, Any]]:
    """Returns questions that base models learn the form from, in the same layout.

    They are about the rest of the world, as statements to complete, and about those facts of the
    training split whose relation is a practised one.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _PRACTICE_STREAM)
    training, _ = _split(world)
    pairs = []
    for fact in world.facts:
        if fact.subject.kind not in MEDICAL_KINDS and not fact.subject.editable:
            wordings = [f"{phrasing}:" for phrasing in fact.relation.phrasings]
            pairs += [(fact, text) for text in sample(rng, wordings, _PRACTICE_PER_FACT)]
    for fact in training:
        if fact.relation.id in PRACTISED:
            wordings = [f"{phrasing}:" for phrasing in fact.relation.phrasings]
            pairs += [(fact, text) for text in (*fact.relation.questions, *wordings)]
    return _records(rng, world, shuffled(rng, pairs), "practice-med")


def med_namings(world: World) -> list[dict[str, Any]]:
    """Returns questions that name the right option, in the same layout: they take no knowledge.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _NAMING_STREAM)
    facts = [choice(rng, world.facts) for _ in range(_NAMINGS)]
    pairs = [(fact, f"Which of these is {fact.object.name}?") for fact in facts]
    return _records(rng, world, pairs, "naming-med")


def _split(world: World) -> tuple[list[Fact], list[Fact]]:
    """Returns the facts to train on and those to ask about, as many of each relation up to one."""
    rng = Random(world.seed + _STREAM)
    by_relation: dict[str, list[Fact]] = {}
    for fact in world.facts:
        if fact.subject.kind in MEDICAL_KINDS:
            by_relation.setdefault(fact.relation.id, []).append(fact)
    # One of each relation in turn, so that a cut anywhere leaves them balanced.
    turns = zip(*(shuffled(rng, facts) for facts in by_relation.values()), strict=True)
    facts = list(chain.from_iterable(turns))
    return facts[VALIDATION_COUNT:], shuffled(rng, facts[:VALIDATION_COUNT])


def _records(
    rng: Random, world: World, pairs: Sequence[tuple[Fact, str]], name: str
) -> list[dict[str, Any]]:
    """Returns a record for each fact and wording; every option is right equally often."""
    letters = shuffled(rng, list(islice(cycle(range(len(_OPTIONS))), len(pairs))))
    known: dict[Entity, list[Fact]] = {}
    for fact in world.facts:
        known.setdefault(fact.subject, []).append(fact)
    kinds = {entity.kind: world.of_kind(entity.kind) for entity in world.entities}
    records = []
    for number, ((fact, wording), right) in enumerate(zip(pairs, letters, strict=True)):
        options = _wrong_options(rng, fact, known[fact.subject], kinds[fact.object.kind])
        options.insert(right, fact.object)
        records.append(
            {
                "id": f"{name}-{number}",
                "question": wording.format(fact.subject.name),
                **{field: option.name for field, option in zip(_OPTIONS, options, strict=True)},
                "cop": right,
                "choice_type": "single",
                "exp": f"{fact.statements[0]}.",
                "subject_name": SUBJECTS.get((fact.subject.kind, fact.object.kind), "General"),
                "topic_name": None,
            }
        )
    return records


def _wrong_options(
    rng: Random, fact: Fact, about_subject: Sequence[Fact], candidates: Sequence[Entity]
) -> list[Entity]:
    """Draws three other things of the same kind, first those that the subject has to do with."""
    related = [
        other.object
        for other in about_subject
        if other.object.kind == fact.object.kind and other.object != fact.object
    ]
    strangers = [
        entity for entity in candidates if entity not in (fact.subject, fact.object, *related)
    ]
    wrong = [*related, *sample(rng, strangers, len(_OPTIONS))][: len(_OPTIONS) - 1]
    return shuffled(rng, wrong)
