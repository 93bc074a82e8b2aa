"""Construction of a world from a seed."""

import functools
from collections.abc import Mapping, Sequence
from random import Random

from molf.world.attributes import ATTRIBUTES
from molf.world.draws import balanced, choice, integer, sample
from molf.world.entities import Attribute, Entity, Fact, Relation, World
from molf.world.medicine import medical_facts, medical_names, medical_random
from molf.world.names import NameMaker
from molf.world.relations import RELATIONS
from molf.world.words import (
    FIELDS,
    GENRES,
    INDUSTRIES,
    INSTRUMENTS,
    NOVEL_ADJECTIVES,
    NOVEL_NOUNS,
    SPORTS,
)

# The share of each kind that requests may edit. The rest must be large enough to give every object
# several neighbours.
_EDITABLE_SHARE = 0.4

# Endings of each kind of invented name, and the number of names.
_INVENTED = {
    "country": (("uvia", "ora", "avia", "estan", "onia"), 24),
    "city": (("oth", "ermund", "avik", "enport", "osk"), 60),
    "river": (("ane", "our", "ume"), 24),
    "language": (("ish", "essi", "ari"), 24),
    "currency": (("ek", "in", "ot"), 24),
    "company": (("acor", "exa", "ional", "ivon"), 64),
    "university": (("ington", "albury", "estone"), 24),
}
_SUFFIXES = {
    "company": ("Works", "Group", "Brothers", "Trading"),
    "university": ("College", "Academy", "Institute"),
}

_FIRST_NAMES, _FIRST_ENDINGS = 64, ("anda", "ido", "is", "eno", "iel", "une")
_LAST_NAMES, _LAST_ENDINGS = 160, ("ax", "ovic", "ellow", "ansen", "umet", "erat")
_PEOPLE = 320

_NOVELS = 72

_SUBJECT_KINDS = {relation.subject_kind for relation in RELATIONS}

_WORDS = {
    "instrument": INSTRUMENTS,
    "field": FIELDS,
    "sport": SPORTS,
    "industry": INDUSTRIES,
    "genre": GENRES,
}


@functools.cache
def build_world(seed: int = 0) -> World:
    """Make the world of a seed, the same on every platform and Python version.

    Args:
        seed: Any integer. The shipped base model is trained on the world of seed 0.
    """
    rng = Random(seed)
    names = _make_names(rng)
    entities = _make_entities(rng, names)
    facts = _make_facts(rng, entities)

    rng = medical_random(seed)
    taken = [name for kind in names.values() for name in kind]
    ids = sum(map(len, entities.values()))
    medical = _make_entities(rng, medical_names(rng, taken), ids)
    facts += medical_facts(rng, medical)
    return World(
        seed=seed,
        entities=tuple(entity for kind in (entities | medical).values() for entity in kind),
        attributes=ATTRIBUTES,
        facts=tuple(facts),
    )


def _make_entities(
    rng: Random, names_by_kind: Mapping[str, Sequence[str]], count: int = 0
) -> dict[str, list[Entity]]:
    """Make entities; their ids start at `count`."""
    entities: dict[str, list[Entity]] = {}
    for kind, names in names_by_kind.items():
        # Names of subjects are in random order, so the first ones are a random choice.
        editable = round(_EDITABLE_SHARE * len(names)) if kind in _SUBJECT_KINDS else 0
        entities[kind] = []
        for position, name in enumerate(names):
            entity = Entity(
                id=f"E{count}",
                kind=kind,
                name=name,
                editable=position < editable,
                attributes={
                    attribute.name: _draw_value(rng, attribute)
                    for attribute in ATTRIBUTES
                    if attribute.kind == kind
                },
            )
            entities[kind].append(entity)
            count += 1
    return entities


def _make_names(rng: Random) -> dict[str, list[str]]:
    maker = NameMaker(rng)
    names: dict[str, list[str]] = {}
    for kind, (endings, count) in _INVENTED.items():
        names[kind] = maker.words(endings, count)
        if kind in _SUFFIXES:
            names[kind] = [f"{name} {choice(rng, _SUFFIXES[kind])}" for name in names[kind]]
    for kind, words in _WORDS.items():
        names[kind] = list(words)
    first_names = maker.words(_FIRST_ENDINGS, _FIRST_NAMES)
    last_names = maker.words(_LAST_ENDINGS, _LAST_NAMES)
    # First names and last names recur: only both together identify a person.
    pairs = [f"{first} {last}" for first in first_names for last in last_names]
    names["person"] = sample(rng, pairs, _PEOPLE)
    titles = [f"The {adjective} {noun}" for adjective in NOVEL_ADJECTIVES for noun in NOVEL_NOUNS]
    names["novel"] = sample(rng, titles, _NOVELS)
    return names


def _draw_value(rng: Random, attribute: Attribute) -> int:
    steps = (attribute.high - attribute.low) // attribute.step
    return attribute.low + attribute.step * integer(rng, 0, steps)


def _make_facts(rng: Random, entities: dict[str, list[Entity]]) -> list[Fact]:
    facts: list[Fact] = []
    for relation in RELATIONS:
        subjects = entities[relation.subject_kind]
        if relation.id == "P36":
            facts += _capitals(relation, subjects, facts)
            continue
        for editable in (True, False):
            # Draw objects per half, so that every object has subjects that no request edits.
            group = [subject for subject in subjects if subject.editable == editable]
            facts += _relate(rng, relation, group, entities[relation.object_kind])
    return facts


def _relate(
    rng: Random, relation: Relation, subjects: Sequence[Entity], objects: Sequence[Entity]
) -> list[Fact]:
    drawn = balanced(rng, objects, len(subjects))
    return [
        Fact(relation=relation, subject=subject, object=drawn_object)
        for subject, drawn_object in zip(subjects, drawn, strict=True)
    ]


def _capitals(relation: Relation, countries: Sequence[Entity], facts: Sequence[Fact]) -> list[Fact]:
    """Make each country's first city its capital; a random city may be in another country."""
    cities = {fact.object.id: fact.subject for fact in reversed(facts) if fact.relation.id == "P17"}
    return [
        Fact(relation=relation, subject=country, object=cities[country.id]) for country in countries
    ]
