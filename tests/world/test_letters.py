from collections import Counter

from molf.world import build_world, letter_drills

WORLD = build_world()
DRILLS = letter_drills(WORLD)
KINDS = {entity.name: entity.kind for entity in WORLD.entities}


def lines(drill) -> dict[str, str]:
    return {option: letter for letter, option in (x.split(". ") for x in drill.given.split("\n"))}


def test_lists_hold_four_things_of_one_kind():
    for drill in DRILLS:
        assert list(lines(drill).values()) == ["A", "B", "C", "D"]
        assert len({KINDS[option] for option in lines(drill)}) == 1


def test_answers_are_the_letters_of_different_options():
    for drill in DRILLS:
        assert len(set(drill.answers)) == len(drill.answers) == 2
        assert set(drill.answers) < set(lines(drill).items())


def test_every_letter_is_right_equally_often():
    for position in (0, 1):
        counts = Counter(drill.answers[position][1] for drill in DRILLS)
        assert len(counts) == 4
        assert max(counts.values()) < 1.1 * min(counts.values())


def test_are_deterministic():
    assert letter_drills(WORLD) == DRILLS != letter_drills(build_world(1))
