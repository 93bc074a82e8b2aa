"""Questions about tables with the queries that answer them, in Gretel's layout (Gretel, 2024).

The tables contain true rows of the world. The test split combines forms of questions with tables
that do not occur together in training: a model must combine known columns with a known form.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import Any

from molf.world.draws import balanced, choice, sample, shuffled
from molf.world.entities import Entity, World
from molf.world.query_forms import COMPLEXITIES, FORMS, QueryForm
from molf.world.tables import REFERENCES, TABLES, Table

_TRAIN_PER_PAIR = 4
_TEST_PER_PAIR = 3
_PRACTICE_PER_PAIR = 45
_TEST_SHARE = 4  # one of 4 pairs of table and form is for the test split
_ROWS = 4
_JOINED_ROWS = 3

# Forms with few words to copy, so that a short training learns them.
_NEW_FORMS = (
    "average each",
    "groups of several",
    "above average",
    "rank",
    "running total",
    "average within",
)
_NEW_TABLES = 3
_NEW_COUNTS = {"train": 360, "test": 108}
_NEW_ROWS = 3

# Seed offsets, different from those of the world and its texts.
_STREAM = 7_000_003
_PRACTICE_STREAM = 8_000_003
_NEW_STREAM = 12_000_003


@dataclass(frozen=True, kw_only=True)
class TableQuestion:
    """A record with the table and the form that it was made from.

    Attributes:
        table: Name of the (first) table in the question.
        form: Name of the form of question.
        record: The record.
    """

    table: str
    form: str
    record: dict[str, Any]


def sql_records(world: World) -> dict[str, list[dict[str, Any]]]:
    """Return the questions of the task by split, `train` and `test`.

    No pair of table and form is in both splits. Base models have practised the easier forms on
    tables of the training split, see `sql_practice`.

    Args:
        world: The world, see `build_world`.
    """
    questions = table_questions(world)
    return {split: [each.record for each in questions[split]] for split in ("train", "test")}


def sql_groups(world: World) -> list[tuple[str, str]]:
    """Return the table and the form of each training record of `sql_records`, in its order.

    A validation part of whole groups differs from the other training records as the test split
    does: it has other pairs of table and form.

    Args:
        world: The world, see `build_world`.
    """
    return [(each.table, each.form) for each in table_questions(world)["train"]]


def new_form_records(world: World) -> dict[str, list[dict[str, Any]]]:
    """Return questions of forms that base models have never practised, by split.

    Each is about one small table with the columns of the question. The splits are `train` and
    `test`: the same forms and tables with other rows, so that no question has the same rows.

    Args:
        world: The world, see `build_world`.
    """
    rng = Random(world.seed + _NEW_STREAM)
    tables = sample(rng, TABLES, _NEW_TABLES)
    pairs = [(table, form) for form in FORMS if form.name in _NEW_FORMS for table in tables]
    rows = _Rows(world)
    turns = balanced(rng, pairs, sum(_NEW_COUNTS.values()))
    records: dict[str, list[dict[str, Any]]] = {split: [] for split in _NEW_COUNTS}
    asked: set[str] = set()
    for table, form in turns:
        split = "train" if len(records["train"]) < _NEW_COUNTS["train"] else "test"
        while True:
            number = sum(map(len, records.values()))
            record = _question(rng, rows, table, form, number, small=True).record
            if record["sql_prompt"] + record["sql_context"] not in asked:
                break
        asked.add(record["sql_prompt"] + record["sql_context"])
        records[split].append(record)
    return records


def sql_practice(world: World) -> list[dict[str, Any]]:
    """Return practice questions of the easier forms for base models, in the same layout.

    No pair of table and form occurs in the test split.

    Args:
        world: The world, see `build_world`.
    """
    return [each.record for each in table_questions(world)["practice"]]


def table_questions(world: World) -> dict[str, list[TableQuestion]]:
    """Return the questions of both splits and of the practice, with their tables and forms."""
    training, test = _split(world)
    easier = [(table, form) for table, form in training if form.practised]
    rng = Random(world.seed + _STREAM)
    practice_rng = Random(world.seed + _PRACTICE_STREAM)
    pairs = {
        "train": (rng, training * _TRAIN_PER_PAIR),
        "test": (rng, test * _TEST_PER_PAIR),
        "practice": (practice_rng, easier * _PRACTICE_PER_PAIR),
    }
    rows = _Rows(world)
    number = count()
    return {
        split: [
            _question(source, rows, table, form, next(number))
            for table, form in shuffled(source, chosen)
        ]
        for split, (source, chosen) in pairs.items()
    }


def _split(world: World) -> tuple[list[tuple[Table, QueryForm]], list[tuple[Table, QueryForm]]]:
    """Return the pairs of the training split and of the test split; each form is in both."""
    rng = Random(world.seed + _STREAM)
    referring = [table for table in TABLES if any(name == table.name for name, _ in REFERENCES)]
    training: list[tuple[Table, QueryForm]] = []
    test: list[tuple[Table, QueryForm]] = []
    for form in FORMS:
        tables = shuffled(rng, referring if form.joined else TABLES)
        held_out = round(len(tables) / _TEST_SHARE)
        test += [(table, form) for table in tables[:held_out]]
        training += [(table, form) for table in tables[held_out:]]
    return training, test


class _Rows:
    """The rows and values of all tables."""

    def __init__(self, world: World) -> None:
        self._entities = {table.name: world.of_kind(table.kind) for table in TABLES}
        self._objects = {(fact.relation.id, fact.subject): fact.object.name for fact in world.facts}

    def of(self, table: Table) -> Sequence[Entity]:
        return self._entities[table.name]

    def value(self, table: Table, entity: Entity, column: str) -> str | int:
        if column == "name":
            return entity.name
        if column in table.numbers:
            return entity.attributes[column]
        return self._objects[table.texts[column], entity]


def _question(
    rng: Random,
    rows: _Rows,
    table: Table,
    form: QueryForm,
    number: int,
    *,
    small: bool = False,
) -> TableQuestion:
    c = choice(rng, _text_columns(table, joined=form.joined))
    n = choice(rng, table.numbers)
    columns = [c, n] if form.uses("c") and form.uses("n") else [c] if form.uses("c") else [n]
    if not form.joined and not small:
        # Add columns that the question does not need.
        others = [name for name in (*table.texts, *table.numbers) if name not in columns]
        columns += sample(rng, others, min(len(others), 3 - len(columns)))
    count_of_rows = _NEW_ROWS if small else _JOINED_ROWS if form.joined else _ROWS
    chosen = _draw_rows(rng, rows, table, c, n, count_of_rows)
    schema = _schema(rows, table, shuffled(rng, columns), chosen)
    subject = choice(rng, chosen)
    fields: dict[str, Any] = {
        "table": table.name,
        "row": table.row,
        "rows": table.name,
        "x": subject.name,
        "c": c,
        "v": rows.value(table, subject, c),
        "n": n,
        "k": rows.value(table, subject, n),
    }
    if form.joined:
        more, context = _other_table(rng, rows, table, form, fields, chosen)
        fields |= more
        schema = f"{schema} {context}"
    # Column names as words, for sentences but not for queries.
    fields |= {f"{name}_words": fields[name].replace("_", " ") for name in "cdmn" if name in fields}
    record = {
        "id": number,
        "domain": table.domain,
        "domain_description": f"Tables about {table.domain} in the world of molf.",
        "sql_complexity": form.complexity,
        "sql_complexity_description": COMPLEXITIES[form.complexity],
        "sql_task_type": "analytics and reporting",
        "sql_task_type_description": "generating reports, dashboards, and analytical insights",
        "sql_prompt": form.question.format(**fields),
        "sql_context": schema,
        "sql": form.query.format(**fields),
        "sql_explanation": form.explanation.format(**fields),
    }
    return TableQuestion(table=table.name, form=form.name, record=record)


def _other_table(
    rng: Random,
    rows: _Rows,
    table: Table,
    form: QueryForm,
    fields: dict[str, Any],
    chosen: Sequence[Entity],
) -> tuple[dict[str, Any], str]:
    """Return the fields and the schema of the table to which column {c} of the first one refers.

    It has the referenced rows and one more.
    """
    other = next(each for each in TABLES if each.name == REFERENCES[table.name, fields["c"]])
    d, m = choice(rng, list(other.texts)), choice(rng, other.numbers)
    named = {rows.value(table, entity, fields["c"]) for entity in chosen}
    found = [entity for entity in rows.of(other) if entity.name in named]
    target = next(entity for entity in found if entity.name == fields["v"])
    stranger = choice(rng, [entity for entity in rows.of(other) if entity.name not in named])
    used = [column for column, field in ((d, "d"), (m, "m")) if form.uses(field)]
    schema = _schema(rows, other, used or [m], shuffled(rng, [*found, stranger]))
    return {
        "other": other.name,
        "other_rows": other.name,
        "d": d,
        "m": m,
        "j": rows.value(other, target, m),
    }, schema


def _text_columns(table: Table, *, joined: bool) -> list[str]:
    return [name for name in table.texts if not joined or (table.name, name) in REFERENCES]


def _draw_rows(rng: Random, rows: _Rows, table: Table, c: str, n: str, number: int) -> list[Entity]:
    """Draw rows with different numbers; where possible, two of them have the same text."""
    drawn = shuffled(rng, rows.of(table))
    text = rows.value(table, drawn[0], c)
    alike = [entity for entity in drawn if rows.value(table, entity, c) == text]
    candidates = list(dict.fromkeys([*alike[:2], *drawn]))
    numbers: set[str | int] = set()
    chosen = []
    for entity in candidates:
        value = rows.value(table, entity, n)
        if value not in numbers:
            numbers.add(value)
            chosen.append(entity)
    return shuffled(rng, list(islice(chosen, number)))


def _schema(rows: _Rows, table: Table, columns: Sequence[str], chosen: Sequence[Entity]) -> str:
    """Return the statements that create a table with some of its columns and rows."""
    names = ["name", *columns]
    kinds = {name: "INT" if name in table.numbers else "TEXT" for name in names}
    declared = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
    tuples = [
        ", ".join(_literal(rows.value(table, entity, name)) for name in names) for entity in chosen
    ]
    values = ", ".join(f"({row})" for row in tuples)
    return f"CREATE TABLE {table.name} ({declared}); INSERT INTO {table.name} VALUES {values};"


def _literal(value: str | int) -> str:
    return str(value) if isinstance(value, int) else f"'{value}'"
