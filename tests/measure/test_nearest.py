import random

import pytest

from molf.measure.nearest import nearest, similarity

WORDS = ["what", "is", "the", "height", "of", "tower", "River", "name", "list", "all"]


def test_the_nearest_is_that_of_a_plain_loop():
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(0, 7))) for _ in range(60)]
    training, asked = texts[:40], texts[40:]
    for text, position in zip(asked, nearest(training, asked), strict=True):
        likeness = [similarity(text, other) for other in training]
        assert position == likeness.index(max(likeness))


def test_similarity_is_the_share_of_words_in_common():
    assert similarity("The  river's name?", "the river") == pytest.approx(2 / 4)  # the river s name
    assert similarity("a b", "B a") == 1
    assert similarity("", "") == similarity("a", "") == 0


def test_without_a_word_in_common_the_first_answers():
    assert nearest(["a", "b"], ["c", ""]) == [0, 0]
    with pytest.raises(ValueError, match="no training text"):
        nearest([], ["c"])
