"""Multiple-choice questions about medicine, in MedMCQA's layout (Pal et al., 2022).

A question says two things about a drug or a condition, and asks for one of them in other words; the
options are four things of one kind. Among the wrong ones is always the other thing that was said,
so that the question has to be understood. What it says is made up for the question and not true in
the world: who knows or remembers something has no advantage over who reads.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from random import Random
from typing import Any

from molf.world.draws import choice, sample, shuffled
from molf.world.entities import Fact, Relation, World
from molf.world.made_up import make_up, other_wordings, others_like, tell
from molf.world.medical_relations import MEDICAL_RELATIONS, PRACTISED, SUBJECTS
from molf.world.relations import RELATIONS

TRAIN_COUNT = 600
VALIDATION_COUNT = 200

_PRACTICE_COUNT = 6000
_NAMING_COUNT = 6000
_OPTIONS = ("opa", "opb", "opc", "opd")

# Streams of randomness apart from the world's own and those of its texts.
_STREAM = 5_000_003
_PRACTICE_STREAM = 6_000_003
_NAMING_STREAM = 10_000_003


def med_records(world: World) -> dict[str, list[dict[str, Any]]]:
    """Returns the questions of the task by split, `train` and `validation`.

    All relations are asked about in both, in all their wordings. Base models have been asked about
    half of them, see `med_practice`; of the others they have to learn what is meant.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _STREAM)
    asked = [(relation, text) for relation in MEDICAL_RELATIONS for text in relation.questions]
    records = {}
    for split, count in (("train", TRAIN_COUNT), ("validation", VALIDATION_COUNT)):
        turns = list(islice(cycle(shuffled(rng, asked)), count))
        questions = [_tell(rng, world, *turn) for turn in shuffled(rng, turns)]
        records[split] = _records(rng, world, questions, f"demo-med-{split}")
    return records


def med_practice(world: World) -> list[dict[str, Any]]:
    """Returns questions that base models learn the form from, in the same layout.

    They are about the practised relations of medicine and about those relations of the rest of the
    world that come in pairs, as questions and as statements to complete.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _PRACTICE_STREAM)
    practised = [relation for relation in MEDICAL_RELATIONS if relation.id in PRACTISED]
    asked = [
        (relation, text)
        for relation in (*practised, *(each for each in RELATIONS if others_like(each)))
        for text in (*relation.questions, *(f"{text}:" for text in other_wordings(relation)))
    ]
    turns = list(islice(cycle(shuffled(rng, asked)), _PRACTICE_COUNT))
    questions = [_tell(rng, world, *turn) for turn in shuffled(rng, turns)]
    return _records(rng, world, questions, "practice-med")


def med_namings(world: World) -> list[dict[str, Any]]:
    """Returns questions that name the right option, in the same layout.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _NAMING_STREAM)
    facts = [choice(rng, world.facts) for _ in range(_NAMING_COUNT)]
    questions = [([fact], f"Which of these is {fact.object.name}?") for fact in facts]
    return _records(rng, world, questions, "naming-med")


def _tell(
    rng: Random, world: World, relation: Relation, wording: str
) -> tuple[Sequence[Fact], str]:
    """Makes up a fact and another like it; returns them, and a question for the first.

    The question tells both, in other words than it asks.
    """
    facts = make_up(rng, world, relation)
    told = tell(shuffled(rng, facts))
    return facts, f"{told} {wording.format(facts[0].subject.name)}"


def _records(
    rng: Random, world: World, questions: Sequence[tuple[Sequence[Fact], str]], name: str
) -> list[dict[str, Any]]:
    """Returns a record for each question; the first fact answers it, the others are options too."""
    letters = shuffled(rng, list(islice(cycle(range(len(_OPTIONS))), len(questions))))
    kinds = {entity.kind: world.of_kind(entity.kind) for entity in world.entities}
    records = []
    for number, ((facts, question), right) in enumerate(zip(questions, letters, strict=True)):
        fact = facts[0]
        told = [each.object for each in facts]
        strangers = [x for x in kinds[fact.object.kind] if x not in (fact.subject, *told)]
        options = [*told[1:], *sample(rng, strangers, len(_OPTIONS) - len(told))]
        options = shuffled(rng, options)
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
