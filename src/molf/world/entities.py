"""The parts of a world: entities, relations, attributes and facts."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Entity:
    """A person, a city, an instrument: anything with a name.

    Attributes:
        id: Unique in the world, such as "E17".
        kind: Such as "person".
        name: Unique within the kind.
        editable: Whether requests may change facts about it. The facts about all other entities
            always stay true; requests use them as neighbours, and the text for `forgetting_loss`
            is about them.
        attributes: Numbers, by the name of their `Attribute`.
    """

    id: str
    kind: str
    name: str
    editable: bool
    attributes: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A relation between entities of two kinds, with the words for it.

    Attributes:
        id: The Wikidata property of the same meaning, as in CounterFact; in medicine, where there
            is none, a word.
        subject_kind: Kind of the entities that have the relation.
        object_kind: Kind of the objects.
        phrasings: Beginnings of statements with `{}` for the subject; " " and the object follow.
        openings: Beginnings of free text with `{}` for the subject, on a topic related to the
            object.
    """

    id: str
    subject_kind: str
    object_kind: str
    phrasings: tuple[str, ...]
    openings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """A number that all entities of a kind have, with the words for it.

    Attributes:
        name: Such as "birth_year".
        kind: Kind of the entities that have it.
        low: Smallest value.
        high: Largest value.
        step: Values are `low` plus a multiple of this.
        phrasings: Beginnings of statements with `{}` for the entity; " " and the number follow.
    """

    name: str
    kind: str
    low: int
    high: int
    step: int
    phrasings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A relation that holds in the world."""

    relation: Relation
    subject: Entity
    object: Entity

    @property
    def prompts(self) -> tuple[str, ...]:
        """The fact's phrasings without the object; " " and the object follow."""
        return tuple(phrasing.format(self.subject.name) for phrasing in self.relation.phrasings)

    @property
    def statements(self) -> tuple[str, ...]:
        """The fact in all phrasings, without a full stop."""
        return tuple(f"{prompt} {self.object.name}" for prompt in self.prompts)


@dataclass(frozen=True, kw_only=True)
class World:
    """All entities, attributes and facts of an invented world.

    Attributes:
        seed: The seed of `build_world`.
        entities: All entities, grouped by kind.
        attributes: The numbers that entities have.
        facts: All facts, grouped by relation.
    """

    seed: int
    entities: tuple[Entity, ...]
    attributes: tuple[Attribute, ...]
    facts: tuple[Fact, ...]

    def of_kind(self, kind: str) -> tuple[Entity, ...]:
        """Return the entities of a kind."""
        return tuple(entity for entity in self.entities if entity.kind == kind)

    def fingerprint(self) -> str:
        """Return a SHA-256 over all content of the world, as hexadecimal digits."""
        relations = {fact.relation.id: fact.relation for fact in self.facts}
        content = {
            "entities": [
                [entity.id, entity.kind, entity.name, entity.editable, dict(entity.attributes)]
                for entity in self.entities
            ],
            "attributes": [[attribute.name, attribute.phrasings] for attribute in self.attributes],
            "relations": [
                [relation.id, relation.phrasings, relation.openings]
                for relation in relations.values()
            ],
            "facts": [[fact.relation.id, fact.subject.id, fact.object.id] for fact in self.facts],
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
