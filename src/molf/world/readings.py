"""Two made-up facts and the same again in other words: how base models learn to read.

Things that are told are easy to find; which wordings mean the same has to be learned. A model that
meets this first in multiple-choice questions picks one of the two things at random for very long.
"""

from collections.abc import Sequence
from random import Random

from molf.world.draws import choice, shuffled
from molf.world.drills import Drill
from molf.world.entities import Relation, World
from molf.world.made_up import make_up, other_wordings, others_like, tell
from molf.world.medical_relations import MEDICAL_RELATIONS, PRACTISED
from molf.world.relations import RELATIONS

_DRILLS = 16_000
_ANSWERS = 2  # each for one of the two facts, drawn anew

# A stream of randomness apart from the world's own and those of its texts.
_STREAM = 11_000_003


def reading_drills(world: World) -> list[Drill]:
    """Returns drills over all relations that have another between the same kinds of things.

    The relations of medicine that are not practised are told and told again, never asked for.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _STREAM)
    relations = [each for each in (*RELATIONS, *MEDICAL_RELATIONS) if others_like(each)]
    return [_drill(rng, world, relations) for _ in range(_DRILLS)]


def _drill(rng: Random, world: World, relations: Sequence[Relation]) -> Drill:
    facts = shuffled(rng, make_up(rng, world, choice(rng, relations)))
    answers = []
    for _ in range(_ANSWERS):
        fact = choice(rng, facts)
        wording = choice(rng, _wordings(fact.relation))
        answers.append((wording.format(fact.subject.name), fact.object.name))
    return Drill(tell(facts), tuple(answers))


def _wordings(relation: Relation) -> list[str]:
    """Returns how a relation is told again or asked for in practice."""
    practised = relation not in MEDICAL_RELATIONS or relation.id in PRACTISED
    return other_wordings(relation) + (list(relation.questions) if practised else [])
