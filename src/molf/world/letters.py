"""Exercises that train base models to answer with the letter of an option.

A multiple-choice answer needs two skills: find the right option, and name its letter. A small model
that learns both from answers alone stays at chance for very long. These lists of a few words train
the second skill alone.
"""

from random import Random

from molf.world.draws import choice, sample
from molf.world.drills import Drill
from molf.world.entities import World

LETTERS = "ABCD"

_DRILLS = 8000
_ANSWERS = 2  # of the four options; the last answer could be inferred from the others
_KINDS = ("organ", "symptom")  # few and short names: with many, training takes far longer

# Seed offset, different from those of the world and its texts.
_STREAM = 9_000_003


def letter_drills(world: World) -> list[Drill]:
    """Return drills with words of the world's medicine.

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
