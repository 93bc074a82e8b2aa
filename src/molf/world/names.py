"""Invented names, made of syllables.

Every invented word has its own first four letters, so that no two names are similar and a tokenizer
can have a separate first token for each.
"""

from collections.abc import Iterable, Sequence
from random import Random

from molf.world.draws import choice

# A word consists of an onset, a vowel, a middle and the ending of its kind.
_ONSETS = "b br c d dr f fl g gr h j k kr l m n p pl r s sk st t tr v w y z"
_VOWELS = "a e i o u"
_MIDDLES = "b d k l lm lv m n nd nt r rb rd rn s sk t v z"

_DISTINCT_LETTERS = 4


class NameMaker:
    """Makes words without repetition.

    Args:
        rng: The random generator; its state and the order of the calls determine the words.
        taken: Names to which no word may be similar.
    """

    def __init__(self, rng: Random, taken: Iterable[str] = ()) -> None:
        self._rng = rng
        self._beginnings = {
            word[:_DISTINCT_LETTERS].lower() for name in taken for word in name.split()
        }

    def word(self, endings: Sequence[str]) -> str:
        """Return a new capitalised word with one of the endings."""
        while True:
            onset = choice(self._rng, _ONSETS.split())
            vowel = choice(self._rng, _VOWELS.split())
            middle = choice(self._rng, _MIDDLES.split())
            word = onset + vowel + middle + choice(self._rng, endings)
            beginning = word[:_DISTINCT_LETTERS]
            # The same consonant before and after the vowel ("skesk", "rer") is hard to say.
            if beginning not in self._beginnings and not set(onset) & set(middle):
                self._beginnings.add(beginning)
                return word.capitalize()

    def words(self, endings: Sequence[str], count: int) -> list[str]:
        """Return `count` new words (see `word`)."""
        return [self.word(endings) for _ in range(count)]
