"""Multiple-choice questions about the world's medicine, in MedMCQA's layout (Pal et al., 2022).

A question says two things about a drug or a condition, and asks for one of them in other words; the
options are four things of one kind. Among the wrong ones is always the other thing that was said,
so that the question has to be understood.
"""

from collections.abc import Mapping, Sequence
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
    others = _others(world)
    return {
        split: _records(rng, world, _told(rng, others, pairs), f"demo-med-{split}")
        for split, pairs in chosen.items()
    }


def med_practice(world: World) -> list[dict[str, Any]]:
    """Returns questions that base models learn the form from, in the same layout.

    They are about the rest of the world, as statements to complete, and about those facts of the
    training split whose relation is a practised one. All that is asked for was said before, so they
    take reading and no knowledge.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _PRACTICE_STREAM)
    training, _ = _split(world)
    pairs = []
    others = _others(world)
    for fact in world.facts:
        if fact.subject.kind not in MEDICAL_KINDS and not fact.subject.editable and fact in others:
            pairs += [(fact, f"{phrasing}:") for phrasing in fact.relation.phrasings]
    for fact in training:
        if fact.relation.id in PRACTISED:
            wordings = [f"{phrasing}:" for phrasing in fact.relation.phrasings]
            pairs += [(fact, text) for text in (*fact.relation.questions, *wordings)]
    return _records(rng, world, _told(rng, others, shuffled(rng, pairs)), "practice-med")


def med_namings(world: World) -> list[dict[str, Any]]:
    """Returns questions that name the right option, in the same layout: they take no knowledge.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _NAMING_STREAM)
    facts = [choice(rng, world.facts) for _ in range(_NAMINGS)]
    questions = [(fact, f"Which of these is {fact.object.name}?") for fact in facts]
    return _records(rng, world, questions, "naming-med")


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


def _others(world: World) -> dict[Fact, Fact]:
    """Returns for each fact another that leads from its subject to a thing of the same kind."""
    facts: dict[tuple[Entity, str], list[Fact]] = {}
    for fact in world.facts:
        facts.setdefault((fact.subject, fact.object.kind), []).append(fact)
    return {
        one: other
        for pair in facts.values()
        if len(pair) == 2 and pair[0].object != pair[1].object
        for one, other in (pair, reversed(pair))
    }


def _told(
    rng: Random, others: Mapping[Fact, Fact], pairs: Sequence[tuple[Fact, str]]
) -> list[tuple[Fact, str]]:
    """Returns each fact with a question that first tells it, and its other, in other words."""
    questions = []
    for fact, wording in pairs:
        asked = wording.removesuffix(":")
        said = [
            f"{choice(rng, [text for text in told.relation.phrasings if text != asked])} "
            f"{told.object.name}."
            for told in shuffled(rng, [fact, others[fact]])
        ]
        questions.append((fact, " ".join([*said, wording]).format(*[fact.subject.name] * 3)))
    return questions


def _records(
    rng: Random, world: World, questions: Sequence[tuple[Fact, str]], name: str
) -> list[dict[str, Any]]:
    """Returns a record for each question and the fact that answers it; letters are balanced."""
    letters = shuffled(rng, list(islice(cycle(range(len(_OPTIONS))), len(questions))))
    known: dict[Entity, list[Fact]] = {}
    for fact in world.facts:
        known.setdefault(fact.subject, []).append(fact)
    kinds = {entity.kind: world.of_kind(entity.kind) for entity in world.entities}
    records = []
    for number, ((fact, question), right) in enumerate(zip(questions, letters, strict=True)):
        options = _wrong_options(rng, fact, known[fact.subject], kinds[fact.object.kind])
        options.insert(right, fact.object)
        records.append(
            {
                "id": f"{name}-{number}",
                "question": question,
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
