import json
import re
from collections import Counter
from functools import cache

import pytest

from molf.evaluate.nearest import nearest
from molf.world import Relation, build_world, med_namings, med_practice, med_records
from molf.world.medical_relations import MEDICAL_RELATIONS, PRACTISED, SUBJECTS
from molf.world.medicine import MEDICAL_KINDS
from molf.world.relations import RELATIONS

WORLD = build_world()
RECORDS = med_records(WORLD)
PRACTICE = med_practice(WORLD)
NAMINGS = med_namings(WORLD)
SPLITS = [*RECORDS.values(), PRACTICE]
KINDS = {entity.name: entity.kind for entity in WORLD.entities}
STATEMENTS = [
    (relation, re.compile(re.escape(text).replace(r"\{\}", "(.+?)") + r" ([^.]+)\. "))
    for relation in (*RELATIONS, *MEDICAL_RELATIONS)
    for text in relation.phrasings
]

FIELDS = (
    *("id", "question", "opa", "opb", "opc", "opd", "cop", "choice_type", "exp"),
    *("subject_name", "topic_name"),
)


def options(record: dict) -> list[str]:
    return [record[field] for field in ("opa", "opb", "opc", "opd")]


@cache
def read(question: str) -> tuple[dict[tuple[Relation, str], str], tuple[Relation, str]]:
    """What a question tells, objects by relation and subject, and which of it it asks for."""
    told, rest = {}, question
    while True:
        matches = [
            (relation, found) for relation, text in STATEMENTS if (found := text.match(rest))
        ]
        matches = [
            (relation, found)
            for relation, found in matches
            if KINDS.get(found[1]) == relation.subject_kind
        ]
        if not matches:
            break
        ((relation, found),) = matches
        told[relation, found[1]] = found[2]
        rest = rest[found.end() :]
    ((relation, subject),) = [
        (relation, subject) for relation, subject in told if rest in asking(relation, subject)
    ]
    return told, (relation, subject)


def asking(relation: Relation, subject: str) -> list[str]:
    """All questions and statements to complete that ask for a subject's relation."""
    wordings = (*relation.questions, *(f"{text}:" for text in relation.phrasings))
    return [text.format(subject) for text in wordings]


def asked(record: dict) -> Relation:
    return read(record["question"])[1][0]


class TestRelations:
    def test_lead_in_pairs_to_the_same_kind(self):
        kinds = Counter((each.subject_kind, each.object_kind) for each in MEDICAL_RELATIONS)
        assert set(kinds) == set(SUBJECTS)
        assert set(kinds.values()) == {2}

    def test_one_of_each_pair_is_practised(self):
        practised = [each for each in MEDICAL_RELATIONS if each.id in PRACTISED]
        kinds = {(each.subject_kind, each.object_kind) for each in practised}
        assert len(practised) == len(kinds) == len(SUBJECTS)

    def test_questions_differ_and_name_the_subject_once(self):
        questions = [question for each in MEDICAL_RELATIONS for question in each.questions]
        assert len(set(questions)) == len(questions) == 3 * len(MEDICAL_RELATIONS)
        assert all(question.count("{}") == 1 for question in questions)

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
        assert med_practice(WORLD) == PRACTICE
        assert med_records(build_world(1)) != RECORDS

    def test_ids_are_unique(self):
        ids = [record["id"] for records in SPLITS for record in records]
        assert len(set(ids)) == len(ids)

    @pytest.mark.parametrize("records", SPLITS)
    def test_the_answer_is_told_and_alone_right(self, records):
        for record in records:
            told, question = read(record["question"])
            relation, subject = question
            assert len(told) == 2
            assert options(record)[record["cop"]] == told[question]
            assert len(set(options(record))) == 4
            assert {KINDS[name] for name in options(record)} == {relation.object_kind}
            assert subject not in options(record)

    @pytest.mark.parametrize("records", SPLITS)
    def test_the_other_thing_told_is_an_option_of_another_relation(self, records):
        for record in records:
            told, question = read(record["question"])
            ((relation, subject),) = told.keys() - {question}
            assert subject == question[1]
            assert relation != question[0]
            assert told[relation, subject] in options(record)

    def test_what_is_told_first_is_right_as_often_as_not(self):
        for records in SPLITS:
            first = [
                next(iter(told)) == question
                for told, question in (read(r["question"]) for r in records)
            ]
            assert 0.4 < sum(first) / len(first) < 0.6

    @pytest.mark.parametrize("records", SPLITS)
    def test_every_letter_is_right_equally_often(self, records):
        counts = Counter(record["cop"] for record in records)
        assert set(counts) == {0, 1, 2, 3}
        assert max(counts.values()) - min(counts.values()) <= 1

    def test_questions_of_the_splits_are_balanced(self):
        for records in RECORDS.values():
            counts = Counter(map(asked, records))
            assert set(counts) == set(MEDICAL_RELATIONS)
            assert max(counts.values()) < 2 * min(counts.values())

    def test_no_question_is_asked_twice(self):
        questions = [record["question"] for split in RECORDS.values() for record in split]
        assert len(set(questions)) == len(questions)


class TestSplits:
    def test_no_question_of_validation_occurs_elsewhere(self):
        seen = {record["question"] for record in [*RECORDS["train"], *PRACTICE]}
        assert not seen & {record["question"] for record in RECORDS["validation"]}

    def test_what_is_true_in_the_world_does_not_help(self):
        facts = {(f.relation, f.subject.name): f.object.name for f in WORLD.facts}
        true = [
            told[question] == facts.get(question)
            for told, question in (read(r["question"]) for r in RECORDS["validation"])
        ]
        assert sum(true) / len(true) < 0.1

    def test_the_nearest_training_answer_is_no_answer(self):
        train, validation = RECORDS["train"], RECORDS["validation"]
        found = nearest([r["question"] for r in train], [r["question"] for r in validation])
        same = [
            options(train[position])[train[position]["cop"]] == options(record)[record["cop"]]
            for position, record in zip(found, validation, strict=True)
        ]
        assert sum(same) / len(same) < 0.25

    def test_all_wordings_are_trained_on(self):
        wordings = {wording_of(record) for record in RECORDS["train"]}
        assert wordings == {q for relation in MEDICAL_RELATIONS for q in relation.questions}

    def test_practice_has_half_of_the_relations_of_medicine(self):
        medical = {r.id for r in map(asked, PRACTICE) if r.subject_kind in MEDICAL_KINDS}
        assert medical == PRACTISED


def wording_of(record: dict) -> str:
    relation, subject = read(record["question"])[1]
    (wording,) = [
        text for text in relation.questions if record["question"].endswith(text.format(subject))
    ]
    return wording


class TestNamings:
    def test_name_the_right_option_and_no_other(self):
        assert len(NAMINGS) == 6000
        for record in NAMINGS:
            named = record["question"].removeprefix("Which of these is ").removesuffix("?")
            assert options(record).count(named) == 1
            assert options(record)[record["cop"]] == named

    def test_are_deterministic(self):
        assert med_namings(WORLD) == NAMINGS
