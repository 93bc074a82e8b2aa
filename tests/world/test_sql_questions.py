import json
import re
import sqlite3
from collections import Counter

import pytest

from molf.sql.sandbox import Sandbox
from molf.world import (
    build_world,
    new_form_records,
    sql_groups,
    sql_practice,
    sql_records,
)
from molf.world.query_forms import COMPLEXITIES, FORMS
from molf.world.sql_questions import table_questions
from molf.world.tables import REFERENCES, TABLES

WORLD = build_world()
QUESTIONS = table_questions(WORLD)
RECORDS = sql_records(WORLD)
PRACTICE = sql_practice(WORLD)
NEW = new_form_records(WORLD)
EVERY_RECORD = [*RECORDS["train"], *RECORDS["test"], *PRACTICE]
NEW_RECORDS = [*NEW["train"], *NEW["test"]]

FIELDS = (
    *("id", "domain", "domain_description", "sql_complexity", "sql_complexity_description"),
    *("sql_task_type", "sql_task_type_description", "sql_prompt", "sql_context", "sql"),
    "sql_explanation",
)


def pairs(split: str) -> set[tuple[str, str]]:
    return {(question.table, question.form) for question in QUESTIONS[split]}


def query_words(record: dict) -> str:
    """The words of a query that are in capital letters."""
    return " ".join(re.findall(r"[A-Z]{2,}", re.sub("'[^']*'", "", record["sql"])))


def table_and_words(record: dict) -> tuple[str, str]:
    (table,) = [table.name for table in TABLES if f"FROM {table.name}" in record["sql"]]
    return table, query_words(record)


def tables(record: dict) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.executescript(record["sql_context"])
    return connection


class TestRecords:
    def test_counts(self):
        assert {split: len(records) for split, records in RECORDS.items()} == {
            "train": 472,
            "test": 168,
        }
        assert len(PRACTICE) == 2520

    def test_are_those_of_the_questions(self):
        for split, records in {**RECORDS, "practice": PRACTICE}.items():
            assert records == [question.record for question in QUESTIONS[split]]

    def test_have_the_fields_of_the_original(self):
        for record in [*EVERY_RECORD, *NEW_RECORDS]:
            assert tuple(record) == FIELDS
            assert record["sql_complexity_description"] == COMPLEXITIES[record["sql_complexity"]]
            for name in ("sql_prompt", "sql_context", "sql", "sql_explanation"):
                assert "{" not in record[name]
                assert record[name] == record[name].strip()

    def test_survive_json_and_are_deterministic(self):
        assert json.loads(json.dumps(RECORDS)) == RECORDS == sql_records(WORLD)
        assert sql_practice(WORLD) == PRACTICE
        assert sql_records(build_world(1)) != RECORDS

    def test_ids_are_unique(self):
        ids = [record["id"] for record in EVERY_RECORD]
        assert len(set(ids)) == len(ids)

    def test_all_complexities_are_trained_and_tested(self):
        for records in RECORDS.values():
            assert {record["sql_complexity"] for record in records} == set(COMPLEXITIES)

    def test_every_gold_query_runs_in_the_sandbox_and_most_return_rows(self):
        rows = []
        with Sandbox() as sandbox:
            for split in (*RECORDS.values(), NEW_RECORDS):
                for record in split:
                    result = sandbox.run(record["sql_context"], record["sql"])
                    assert result.ok, (record, result)
                    rows.append(len(result.rows))
        assert sum(map(bool, rows)) / len(rows) >= 0.95

    def test_every_practised_query_runs(self):
        for record in PRACTICE:
            with tables(record) as connection:
                connection.execute(record["sql"]).fetchall()

    def test_tables_hold_true_rows(self):
        objects = {(fact.relation.id, fact.subject): fact.object.name for fact in WORLD.facts}
        entities = {(entity.kind, entity.name): entity for entity in WORLD.entities}
        for record in [*EVERY_RECORD, *NEW_RECORDS]:
            with tables(record) as connection:
                connection.row_factory = sqlite3.Row
                for table in TABLES:
                    if f"CREATE TABLE {table.name} " not in record["sql_context"]:
                        continue
                    for row in connection.execute(f"SELECT * FROM {table.name}"):
                        entity = entities[table.kind, row["name"]]
                        for column in set(row.keys()) - {"name"}:
                            if column in table.numbers:
                                assert row[column] == entity.attributes[column]
                            else:
                                assert row[column] == objects[table.texts[column], entity]

    def test_order_is_never_left_open(self):
        # A gold order with ties would count right answers as wrong.
        for record in [*EVERY_RECORD, *NEW_RECORDS]:
            if "ORDER BY" not in record["sql"]:
                continue
            column = record["sql"].split("ORDER BY ")[1].split()[0].strip(";)")
            table = next(t.name for t in TABLES if f"FROM {t.name}" in record["sql"])
            with tables(record) as connection:
                values = connection.execute(f"SELECT {column} FROM {table}").fetchall()
            assert len(set(values)) == len(values)


class TestSplits:
    def test_no_table_and_form_is_trained_and_tested(self):
        assert not pairs("train") & pairs("test")

    def test_every_form_and_every_table_is_trained_and_tested(self):
        for split in RECORDS:
            assert {form for _, form in pairs(split)} == {form.name for form in FORMS}
            assert {table for table, _ in pairs(split)} == {table.name for table in TABLES}

    def test_practice_keeps_off_the_test_and_the_hard_forms(self):
        practised = {form.name for form in FORMS if form.practised}
        assert pairs("practice") == {pair for pair in pairs("train") if pair[1] in practised}
        assert not pairs("practice") & pairs("test")
        assert set(COMPLEXITIES) > {record["sql_complexity"] for record in PRACTICE}

    def test_no_test_question_is_asked_elsewhere(self):
        def asked(records: list[dict]) -> set[str]:
            return {record["sql_prompt"] for record in records}

        assert not asked(RECORDS["test"]) & asked(RECORDS["train"])
        assert not asked(RECORDS["test"]) & asked(PRACTICE)


class TestNewForms:
    def test_counts(self):
        assert (len(NEW["train"]), len(NEW["test"])) == (360, 108)
        assert new_form_records(build_world(0)) == NEW
        assert [record["id"] for record in NEW_RECORDS] == list(range(468))

    def test_base_models_have_practised_none(self):
        new = {query_words(record) for record in NEW_RECORDS}
        assert len(new) == 6
        assert not new & {query_words(record) for record in PRACTICE}

    def test_tables_have_three_rows_and_the_columns_of_the_question(self):
        for record in NEW_RECORDS:
            with tables(record) as connection:
                found = connection.execute(f"SELECT * FROM {table_and_words(record)[0]}")
                names = [column[0] for column in found.description]
                assert len(found.fetchall()) == 3
            assert all(name == "name" or name in record["sql"] for name in names)

    def test_both_splits_have_all_forms_and_tables_evenly_and_no_question_twice(self):
        for split, count in (("train", 20), ("test", 6)):
            drawn = Counter(table_and_words(record) for record in NEW[split])
            assert len(drawn) == 18
            assert max(drawn.values()) - min(drawn.values()) <= 1
            assert count in drawn.values()
        questions = {record["sql_prompt"] + record["sql_context"] for record in NEW_RECORDS}
        assert len(questions) == len(NEW_RECORDS)


def test_groups_are_those_of_the_training_records():
    assert sql_groups(WORLD) == [(each.table, each.form) for each in QUESTIONS["train"]]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_forms_are_well_formed(form):
    assert form.complexity in COMPLEXITIES
    assert form.query.endswith(";")
    assert form.question[-1] in ".?"
    assert form.joined == (form.complexity in ("single join", "set operations"))


def test_references_hold_names_of_the_other_table():
    kinds = {table.name: table.kind for table in TABLES}
    relations = {fact.relation.id: fact.relation for fact in WORLD.facts}
    texts = {table.name: table.texts for table in TABLES}
    for (table, column), other in REFERENCES.items():
        assert relations[texts[table][column]].object_kind == kinds[other]
