"""Requests for a query, in the layout of `gretelai/synthetic_text_to_sql` (Gretel 2024)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from molf.data.fields import filled_text, optional_text
from molf.data.files import Record
from molf.tasks.questions import Question, QuestionKind, UnusableRecordError

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True, kw_only=True)
class SqlQuestion(Question):
    """A request for a query, grouped by the query's complexity.

    Attributes:
        schema: The statements that create the tables.
        query: The gold query.
    """

    schema: str
    query: str

    @property
    def prompt(self) -> str:
        """The request and the schema."""
        return f"Question: {self.question}\nTables: {self.schema}\nSQL:"

    @property
    def answer(self) -> str:
        """A space and the query."""
        return f" {self.query}"


def parse_sql_question(record: Record, where: str) -> SqlQuestion:
    """Check a record; its query is not run.

    Args:
        record: `sql_prompt`, `sql_context`, `sql`, `sql_complexity`; further fields are not used.
        where: The source and number of the record, for messages.

    Raises:
        InputError: A field is of the wrong kind, or the question is empty.
        UnusableRecordError: There is no query, or no schema.
    """
    question = filled_text(record["sql_prompt"], f"{where}: sql_prompt").strip()
    schema = optional_text(record.get("sql_context"), f"{where}: sql_context")
    query = optional_text(record.get("sql"), f"{where}: sql")
    complexity = optional_text(record.get("sql_complexity"), f"{where}: sql_complexity")
    if not query:
        raise UnusableRecordError("no query")
    if not schema:
        raise UnusableRecordError("no schema")
    # A blank line ends a generated query, so the gold query must not contain one.
    query = _BLANK_LINES.sub("\n", query)
    return SqlQuestion(question=question, group=complexity or "unknown", schema=schema, query=query)


SQL = QuestionKind(
    default_data="gretelai/synthetic_text_to_sql",
    evaluation_splits=("test", "validation"),
    fields=("sql_prompt",),
    columns=("sql_context", "sql"),
    parse=parse_sql_question,
)
