"""Facts that are made up for the length of one text: who remembers has no advantage over who reads.

They come in pairs between the same kinds of things, so that it takes the words to tell them apart.
Each relation is told in one wording alone. Asked for in many others it can be learned from some ten
thousand texts; told in many as well, it was not.
"""

from collections.abc import Iterable
from random import Random

from molf.world.draws import choice, sample
from molf.world.entities import Fact, Relation, World
from molf.world.medical_relations import MEDICAL_RELATIONS
from molf.world.relations import RELATIONS


def others_like(relation: Relation) -> list[Relation]:
    """Returns the other relations between the same kinds of things.

    Args:
        relation: Any relation of the world.
    """
    return [
        other
        for other in (*RELATIONS, *MEDICAL_RELATIONS)
        if other.id != relation.id
        and (other.subject_kind, other.object_kind) == (relation.subject_kind, relation.object_kind)
    ]


def make_up(rng: Random, world: World, relation: Relation) -> tuple[Fact, Fact]:
    """Makes up a fact, and one of another relation between the same kinds of things.

    Args:
        rng: Where the draws come from.
        world: Whose things they are about.
        relation: Of the first fact; there is another like it.
    """
    subject = choice(rng, world.of_kind(relation.subject_kind))
    things = [thing for thing in world.of_kind(relation.object_kind) if thing != subject]
    first, second = sample(rng, things, 2)
    return (
        Fact(relation=relation, subject=subject, object=first),
        Fact(relation=choice(rng, others_like(relation)), subject=subject, object=second),
    )


def tell(facts: Iterable[Fact]) -> str:
    """Returns made-up facts as text, one sentence each.

    Args:
        facts: In the order in which they are told.
    """
    return " ".join(
        f"{fact.relation.phrasings[0].format(fact.subject.name)} {fact.object.name}."
        for fact in facts
    )


def other_wordings(relation: Relation) -> list[str]:
    """Returns the wordings of a relation in which `tell` does not tell it, without questions.

    Args:
        relation: Any relation of the world.
    """
    return list(relation.phrasings[1:])
