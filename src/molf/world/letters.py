"""Lists of options, and which letter each one has: how base models learn to answer with a letter.

To answer a multiple-choice question takes two things: to know what is right, and to say where it
stands. A small model that has to learn both from answers alone stays at guessing for very long.
Lists of a few words that ask for nothing but letters get it past that.
"""

from random import Random

from molf.world.draws import choice, sample
from molf.world.drills import Drill
from molf.world.entities import World

LETTERS = "ABCD"

_DRILLS = 8000
_ANSWERS = 2  # of the four; a last one would follow from the others
_KINDS = ("organ", "symptom")  # few and short names: with many, the start takes far longer

# A stream of randomness apart from the world's own and those of its texts.
_STREAM = 9_000_003


def letter_drills(world: World) -> list[Drill]:
    """Returns drills over words of the world's medicine.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _STREAM)
    names = [[entity.name for entity in world.of_kind(kind)] for kind in _KINDS]
    drills = []
    for _ in range(_DRILLS):
        pairs = list(zip(sample(rng, choice(rng, names), len(LETTERS)), LETTERS, strict=True))
        options = "\n".join(f"{letter}. {option}" for option, letter in pairs)
        drills.append(Drill(options, tuple(sample(rng, pairs, _ANSWERS))))
    return drills
