"""Multiple-choice questions about medicine, in MedMCQA's layout (Pal et al., 2022).

A question makes two statements about a drug or a condition, and asks for the role of the object of
one of them; the options are four of the twelve roles in the world's medicine. The wrong options
always include the other role of objects of that kind, and the role of the other statement's object,
so that both statements must be read. The statements are made up and not true in the world, so that
learned facts give no advantage.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from random import Random
from typing import Any

from molf.world.draws import choice, sample, shuffled
from molf.world.entities import Entity, Relation, World
from molf.world.medical_relations import MEDICAL_RELATIONS, ROLES, SUBJECTS

TRAIN_COUNT = 600
VALIDATION_COUNT = 200

# Number of first phrasings of each relation that base models practise.
_PRACTISED = 3
_PRACTICE_COUNT = 40_000
_NAMING_COUNT = 16_000
# Share of practice questions with a single statement; share of naming questions about roles.
_SINGLE_SHARE = 0.3
_ROLE_SHARE = 0.25

_ASKED = ("What is {} here?", "Which role has {}?", "How is {} classified?")
_OPTIONS = ("opa", "opb", "opc", "opd")

# Seed offsets, different from those of the world and its texts.
_STREAM = 5_000_003
_PRACTICE_STREAM = 6_000_003
_NAMING_STREAM = 10_000_003

# A relation, and one of its phrasings.
_Wording = tuple[Relation, str]


def med_records(world: World) -> dict[str, list[dict[str, Any]]]:
    """Return the questions of the task by split, `train` and `validation`.

    Both use all phrasings of all relations, with new entities in each question. Base models have
    practised half of the phrasings, see `is_practised`; they must learn the meaning of the others.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _STREAM)
    wordings = [(relation, text) for relation in MEDICAL_RELATIONS for text in relation.phrasings]
    records = {}
    for split, count in (("train", TRAIN_COUNT), ("validation", VALIDATION_COUNT)):
        turns = list(islice(cycle(shuffled(rng, wordings)), count))
        records[split] = [
            _question(rng, world, turn, wordings, f"demo-med-{split}-{number}")
            for number, turn in enumerate(shuffled(rng, turns))
        ]
    return records


def med_practice(world: World) -> list[dict[str, Any]]:
    """Return practice questions for base models, in the same layout; some have one statement.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _PRACTICE_STREAM)
    wordings = [
        (relation, text)
        for relation in MEDICAL_RELATIONS
        for text in relation.phrasings[:_PRACTISED]
    ]
    return [
        _question(
            rng,
            world,
            choice(rng, wordings),
            wordings,
            f"practice-med-{number}",
            is_single=rng.random() < _SINGLE_SHARE,
        )
        for number in range(_PRACTICE_COUNT)
    ]


def med_namings(world: World) -> list[dict[str, Any]]:
    """Return practice questions that name the right option, in the same layout.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _NAMING_STREAM)
    names = {
        kind: [entity.name for entity in world.of_kind(kind)]
        for kind in {entity.kind for entity in world.entities}
    }
    kinds = sorted(names)
    records = []
    for number in range(_NAMING_COUNT):
        is_role = rng.random() < _ROLE_SHARE
        options = sample(rng, list(ROLES.values()) if is_role else names[choice(rng, kinds)], 4)
        right = choice(rng, options)
        text = f"Which of these is {right}?"
        records.append(_record(f"naming-med-{number}", text, options, right, right, "Naming"))
    return records


def is_practised(record: dict[str, Any]) -> bool:
    """Return whether base models practise the phrasing that answers a question.

    Args:
        record: One of `med_records`.
    """
    statement: str = record["exp"]
    return any(
        statement.startswith(before) and after in statement
        for relation in MEDICAL_RELATIONS
        for text in relation.phrasings[:_PRACTISED]
        for before, _, after in [text.partition("{}")]
    )


def _question(
    rng: Random,
    world: World,
    asked: _Wording,
    wordings: Sequence[_Wording],
    name: str,
    *,
    is_single: bool = False,
) -> dict[str, Any]:
    """Make a question from two made-up statements with objects of different kinds."""
    relation, wording = asked
    others = [each for each in wordings if _leads_elsewhere(each[0], relation)]
    other, other_wording = choice(rng, others)
    subject = choice(rng, world.of_kind(relation.subject_kind))
    statement, thing = _state(rng, world, wording, subject, relation)
    said = [statement]
    if not is_single:
        said.append(_state(rng, world, other_wording, subject, other)[0])
    text = " ".join([*shuffled(rng, said), choice(rng, _ASKED).format(thing)])
    wrong = [ROLES[_twin(relation).id], ROLES[other.id]]
    strangers = [role for role in ROLES.values() if role not in (ROLES[relation.id], *wrong)]
    options = shuffled(rng, [ROLES[relation.id], *wrong, choice(rng, strangers)])
    subject_name = SUBJECTS[relation.subject_kind, relation.object_kind]
    return _record(name, text, options, ROLES[relation.id], statement, subject_name)


def _state(
    rng: Random, world: World, wording: str, subject: Entity, relation: Relation
) -> tuple[str, str]:
    """Return a made-up statement, and the name of its object."""
    things = [thing for thing in world.of_kind(relation.object_kind) if thing != subject]
    thing = choice(rng, things).name
    return f"{wording.format(subject.name)} {thing}.", thing


def _leads_elsewhere(other: Relation, relation: Relation) -> bool:
    """Return whether `other` has the same kind of subject and another kind of object."""
    return other.subject_kind == relation.subject_kind and other.object_kind != relation.object_kind


def _twin(relation: Relation) -> Relation:
    """Return the other relation with the same kinds of subject and object."""
    kinds = relation.subject_kind, relation.object_kind
    (twin,) = [
        other
        for other in MEDICAL_RELATIONS
        if (other.subject_kind, other.object_kind) == kinds and other.id != relation.id
    ]
    return twin


def _record(
    name: str, text: str, options: Sequence[str], right: str, why: str, subject_name: str
) -> dict[str, Any]:
    return {
        "id": name,
        "question": text,
        **dict(zip(_OPTIONS, options, strict=True)),
        "cop": list(options).index(right),
        "choice_type": "single",
        "exp": why,
        "subject_name": subject_name,
        "topic_name": None,
    }
