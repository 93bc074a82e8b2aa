"""The world's medicine: drugs, conditions, and their effects.

Requests do not change its facts. It has its own random generator, so that the rest of the world is
the same with and without it.
"""

from collections.abc import Iterable, Mapping, Sequence
from random import Random

from molf.world.draws import balanced
from molf.world.entities import Entity, Fact, Relation
from molf.world.medical_relations import MEDICAL_RELATIONS
from molf.world.names import NameMaker
from molf.world.words import ORGANS, SYMPTOMS

# Endings of each kind of invented name, and the number of names.
_INVENTED = {
    "drug": (("azol", "mycin", "oprin", "idone"), 48),
    "condition": (("itis", "emia", "opathy", "oma"), 48),
    "enzyme": (("ase", "ysin"), 24),
}
_WORDS = {"symptom": SYMPTOMS, "organ": ORGANS}

MEDICAL_KINDS = frozenset({*_INVENTED, *_WORDS})
"""The kinds of entities that occur only in medicine."""

_STREAM = 4_000_003


def medical_random(seed: int) -> Random:
    """Return the random generator of a world's medicine."""
    return Random(seed + _STREAM)


def medical_names(rng: Random, taken: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of each kind, none of them similar to a taken name."""
    maker = NameMaker(rng, taken)
    invented = {kind: maker.words(endings, count) for kind, (endings, count) in _INVENTED.items()}
    return invented | {kind: list(words) for kind, words in _WORDS.items()}


def medical_facts(rng: Random, entities: Mapping[str, Sequence[Entity]]) -> list[Fact]:
    """Return the facts; two relations of one kind never share both subject and object."""
    facts: list[Fact] = []
    taken = {(entity, entity) for kind in entities.values() for entity in kind}
    for relation in MEDICAL_RELATIONS:
        new = _relate(rng, relation, entities)
        while any((fact.subject, fact.object) in taken for fact in new):
            new = _relate(rng, relation, entities)
        taken.update((fact.subject, fact.object) for fact in new)
        facts += new
    return facts


def _relate(
    rng: Random, relation: Relation, entities: Mapping[str, Sequence[Entity]]
) -> list[Fact]:
    subjects = entities[relation.subject_kind]
    drawn = balanced(rng, entities[relation.object_kind], len(subjects))
    return [
        Fact(relation=relation, subject=subject, object=drawn_object)
        for subject, drawn_object in zip(subjects, drawn, strict=True)
    ]
