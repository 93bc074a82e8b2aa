import json
from collections import Counter

import pytest

from molf.world import build_world, med_namings, med_practice, med_records, training_documents
from molf.world.medical_relations import MEDICAL_RELATIONS, PRACTISED, SUBJECTS
from molf.world.medicine import MEDICAL_KINDS

WORLD = build_world()
RECORDS = med_records(WORLD)
PRACTICE = med_practice(WORLD)
NAMINGS = med_namings(WORLD)
SPLITS = [*RECORDS.values(), PRACTICE]

# What each question is about; a statement to complete is a question too.
FACT_OF_QUESTION = {
    question: fact
    for fact in WORLD.facts
    for question in (
        *(f"{prompt}:" for prompt in fact.prompts),
        *(wording.format(fact.subject.name) for wording in fact.relation.questions),
    )
}

FIELDS = (
    *("id", "question", "opa", "opb", "opc", "opd", "cop", "choice_type", "exp"),
    *("subject_name", "topic_name"),
)


def options(record: dict) -> list[str]:
    return [record[field] for field in ("opa", "opb", "opc", "opd")]


def facts(records: list[dict]) -> set:
    return {FACT_OF_QUESTION[record["question"]] for record in records}


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
    def test_the_answer_is_true_and_alone_right(self, records):
        kinds = {entity.name: entity.kind for entity in WORLD.entities}
        for record in records:
            fact = FACT_OF_QUESTION[record["question"]]
            assert options(record)[record["cop"]] == fact.object.name
            assert len(set(options(record))) == 4
            assert {kinds[name] for name in options(record)} == {fact.object.kind}
            assert fact.subject.name not in options(record)

    @pytest.mark.parametrize("records", SPLITS)
    def test_every_letter_is_right_equally_often(self, records):
        counts = Counter(record["cop"] for record in records)
        assert set(counts) == {0, 1, 2, 3}
        assert max(counts.values()) - min(counts.values()) <= 1

    def test_the_other_relation_of_the_kind_is_among_the_options(self):
        for record in [*RECORDS["train"], *RECORDS["validation"]]:
            asked = FACT_OF_QUESTION[record["question"]]
            others = [
                fact.object.name
                for fact in WORLD.facts
                if fact.subject == asked.subject and fact.object.kind == asked.object.kind
            ]
            assert len(others) == 2
            assert set(others) < set(options(record))

    def test_questions_of_the_splits_are_balanced(self):
        for records in RECORDS.values():
            counts = Counter(FACT_OF_QUESTION[record["question"]].relation for record in records)
            assert set(counts) == set(MEDICAL_RELATIONS)
            assert max(counts.values()) < 2 * min(counts.values())

    def test_no_question_is_asked_twice(self):
        questions = [record["question"] for split in RECORDS.values() for record in split]
        assert len(set(questions)) == len(questions)


class TestSplits:
    def test_facts_asked_for_in_validation_are_asked_for_nowhere_else(self):
        validation = facts(RECORDS["validation"])
        assert len(validation) == 200
        assert not validation & facts(RECORDS["train"])
        assert not validation & facts(PRACTICE)

    def test_they_are_stated_in_the_training_texts_in_other_words(self):
        documents = set(training_documents(WORLD))
        for record in RECORDS["validation"]:
            fact = FACT_OF_QUESTION[record["question"]]
            assert documents.issuperset(fact.statements)
            assert not any(record["question"] in document for document in fact.statements)

    def test_all_wordings_are_trained_on(self):
        wordings = {
            record["question"].replace(fact.subject.name, "{}")
            for record in RECORDS["train"]
            for fact in [FACT_OF_QUESTION[record["question"]]]
        }
        assert wordings == {q for relation in MEDICAL_RELATIONS for q in relation.questions}

    def test_practice_has_half_of_the_relations_of_medicine(self):
        medical = {f.relation.id for f in facts(PRACTICE) if f.subject.kind in MEDICAL_KINDS}
        assert medical == PRACTISED

    def test_practice_is_not_about_what_requests_edit(self):
        assert not any(fact.subject.editable for fact in facts(PRACTICE))


class TestNamings:
    def test_name_the_right_option_and_no_other(self):
        assert len(NAMINGS) == 6000
        for record in NAMINGS:
            named = record["question"].removeprefix("Which of these is ").removesuffix("?")
            assert options(record).count(named) == 1
            assert options(record)[record["cop"]] == named

    def test_are_deterministic(self):
        assert med_namings(WORLD) == NAMINGS
