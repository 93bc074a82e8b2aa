import json
from collections import Counter

import pytest

from molf.measure.nearest import nearest
from molf.world import build_world, is_practised, med_namings, med_practice, med_records
from molf.world.medical_relations import MEDICAL_RELATIONS, ROLES, SUBJECTS
from molf.world.medicine import MEDICAL_KINDS

WORLD = build_world()
RECORDS = med_records(WORLD)
PRACTICE = med_practice(WORLD)[:2000]
NAMINGS = med_namings(WORLD)
SPLITS = [*RECORDS.values(), PRACTICE]
KINDS = {entity.name: entity.kind for entity in WORLD.entities}
FIELDS = (
    *("id", "question", "opa", "opb", "opc", "opd", "cop", "choice_type", "exp"),
    *("subject_name", "topic_name"),
)


def options(record: dict) -> list[str]:
    return [record[field] for field in ("opa", "opb", "opc", "opd")]


def answer(record: dict) -> str:
    return options(record)[record["cop"]]


def said(record: dict) -> dict[str, tuple]:
    """Per thing that a question says something about, the relation, its wording, the subject."""
    result = {}
    for sentence in record["question"].split(". ")[:-1]:
        ((thing, *rest),) = [
            (thing, relation, text, subject)
            for relation in MEDICAL_RELATIONS
            for text in relation.phrasings
            for before, after in [text.split("{}")]
            if sentence.startswith(before)
            for subject, between, thing in [sentence.removeprefix(before).partition(f"{after} ")]
            if between and KINDS.get(subject) == relation.subject_kind and thing in KINDS
        ]
        result[thing] = tuple(rest)
    return result


def asked(record: dict) -> str:
    """The thing whose role is asked for."""
    (thing,) = [thing for thing in said(record) if thing in record["question"].split(". ")[-1]]
    return thing


class TestRelations:
    def test_lead_in_pairs_to_the_same_kind(self):
        kinds = Counter((each.subject_kind, each.object_kind) for each in MEDICAL_RELATIONS)
        assert set(kinds) == set(SUBJECTS)
        assert set(kinds.values()) == {2}

    def test_each_has_a_role_of_its_own(self):
        assert ROLES.keys() == {each.id for each in MEDICAL_RELATIONS}
        assert len(set(ROLES.values())) == len(ROLES)

    def test_a_subject_has_no_object_twice_nor_itself(self):
        pairs = [(f.subject, f.object) for f in WORLD.facts if f.subject.kind in MEDICAL_KINDS]
        assert len(set(pairs)) == len(pairs)
        assert not any(subject == found for subject, found in pairs)


class TestRecords:
    def test_counts(self):
        assert {split: len(records) for split, records in RECORDS.items()} == {
            "train": 600,
            "validation": 200,
        }

    @pytest.mark.parametrize("records", SPLITS)
    def test_have_the_fields_of_the_original(self, records):
        for record in records:
            assert tuple(record) == FIELDS
            assert record["choice_type"] == "single"
            assert all(text == text.strip() for text in [record["question"], *options(record)])

    def test_survive_json_and_are_deterministic(self):
        assert json.loads(json.dumps(RECORDS)) == RECORDS == med_records(WORLD)
        assert med_practice(WORLD)[:2000] == PRACTICE
        assert med_records(build_world(1)) != RECORDS

    def test_ids_are_unique(self):
        ids = [record["id"] for records in SPLITS for record in records]
        assert len(set(ids)) == len(ids)

    @pytest.mark.parametrize("records", SPLITS)
    def test_the_answer_is_the_role_in_what_is_said(self, records):
        for record in records:
            relation, *_ = said(record)[asked(record)]
            assert answer(record) == ROLES[relation.id]
            assert len(set(options(record))) == 4
            assert set(options(record)) < set(ROLES.values())

    @pytest.mark.parametrize("records", list(RECORDS.values()))
    def test_wrong_options_are_the_other_role_of_the_kind_and_that_of_the_other_thing(
        self, records
    ):
        for record in records:
            relation, *_ = said(record)[asked(record)]
            (first, _, subject), (second, _, same) = said(record).values()
            assert subject == same
            assert first.object_kind != second.object_kind
            twins = {
                ROLES[each.id]
                for each in MEDICAL_RELATIONS
                if (each.subject_kind, each.object_kind)
                == (relation.subject_kind, relation.object_kind)
            }
            assert twins | {ROLES[first.id], ROLES[second.id]} < set(options(record))

    @pytest.mark.parametrize("records", SPLITS)
    def test_every_letter_is_right_about_equally_often(self, records):
        counts = Counter(record["cop"] for record in records)
        assert set(counts) == {0, 1, 2, 3}
        assert max(counts.values()) < 1.5 * min(counts.values())

    @pytest.mark.parametrize("records", list(RECORDS.values()))
    def test_either_place_is_asked_for(self, records):
        first = [asked(record) == next(iter(said(record))) for record in records]
        assert 0.4 < sum(first) / len(first) < 0.6

    def test_all_wordings_are_asked_for_about_equally_often(self):
        for records in RECORDS.values():
            counts = Counter(said(record)[asked(record)][:2] for record in records)
            assert len(counts) == 6 * len(MEDICAL_RELATIONS)
            assert max(counts.values()) - min(counts.values()) <= 1


class TestSplits:
    def test_no_question_of_validation_occurs_elsewhere(self):
        questions = [record["question"] for split in RECORDS.values() for record in split]
        assert len(set(questions)) == len(questions)
        assert not {record["question"] for record in med_practice(WORLD)}.intersection(questions)

    def test_what_is_true_in_the_world_does_not_help(self):
        facts = {(f.relation, f.subject.name, f.object.name) for f in WORLD.facts}
        true = [
            (relation, subject, thing) in facts
            for record in RECORDS["validation"]
            for thing, (relation, _, subject) in said(record).items()
        ]
        assert sum(true) / len(true) < 0.1

    def test_the_nearest_training_answer_is_a_poor_one(self):
        train, validation = RECORDS["train"], RECORDS["validation"]
        found = nearest([r["question"] for r in train], [r["question"] for r in validation])
        same = [
            answer(train[position]) == answer(record)
            for position, record in zip(found, validation, strict=True)
        ]
        assert sum(same) / len(same) < 0.6

    def test_practice_is_in_half_of_the_wordings(self):
        practised = {wording for record in PRACTICE for wording in wordings(record)}
        assert len(practised) == 3 * len(MEDICAL_RELATIONS)
        assert {is_practised(record) for record in PRACTICE} == {True}
        for record in RECORDS["validation"]:
            assert is_practised(record) == (said(record)[asked(record)][:2] in practised)

    def test_some_practice_says_one_thing_alone(self):
        counts = Counter(len(said(record)) for record in PRACTICE)
        assert 0.25 < counts[1] / len(PRACTICE) < 0.35
        assert counts[1] + counts[2] == len(PRACTICE)


def wordings(record: dict) -> set[tuple]:
    return {(relation, text) for relation, text, _ in said(record).values()}


class TestNamings:
    def test_name_the_right_option_and_no_other(self):
        for record in NAMINGS:
            named = record["question"].removeprefix("Which of these is ").removesuffix("?")
            assert options(record).count(named) == 1
            assert answer(record) == named

    def test_are_about_everything(self):
        named = {answer(record) for record in NAMINGS}
        assert named >= set(ROLES.values())
        assert {KINDS[name] for name in named - set(ROLES.values())} == set(KINDS.values())

    def test_are_deterministic(self):
        assert med_namings(WORLD) == NAMINGS
