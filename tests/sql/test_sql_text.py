import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molf.sql.text import first_statement, has_outer_order, is_complete


@pytest.mark.parametrize(
    ("text", "statement", "complete"),
    [
        ("SELECT 1; SELECT 2", "SELECT 1", True),
        ("  \n\n SELECT 1 ", "SELECT 1", False),
        ("SELECT a\nFROM t\n\nThis query ...", "SELECT a\nFROM t", True),
        ("SELECT a\r\nFROM t\r\n \t\r\nThis", "SELECT a\r\nFROM t", True),
        (
            "SELECT 'a;b', \"c;d\", `e;f`, [g;h] FROM t; x",
            "SELECT 'a;b', \"c;d\", `e;f`, [g;h] FROM t",
            True,
        ),
        ("SELECT 'it''s; ok';", "SELECT 'it''s; ok'", True),
        (
            "SELECT 1 -- not; here\n, 2 /* nor;\n here */; x",
            "SELECT 1 -- not; here\n, 2 /* nor;\n here */",
            True,
        ),
        ("SELECT 'open; FROM t", "SELECT 'open; FROM t", False),
        ("SELECT 'open FROM t\n\nmore", "SELECT 'open FROM t", True),
        ("-- sums\n\nSELECT 1\n\nmore", "-- sums\n\nSELECT 1", True),
        ("```sql\nSELECT 1;\n```", "SELECT 1", True),
        ("```sql\nSELECT 1\n```", "SELECT 1", True),
        ("```\nSELECT 1", "SELECT 1", False),
        ("```SELECT 1```", "SELECT 1", True),
        ("Here it is:\n\n```SQL\n\nSELECT a\nFROM b\n```\n", "SELECT a\nFROM b", True),
        ("With the tables above:\n```sql\nSELECT 1\n```", "SELECT 1", True),
        ("SELECT 1\n```\nThis query", "SELECT 1", True),
        ("SELECT 1\n```", "SELECT 1", False),  # "sql" may follow
        ("I cannot; sorry", "I cannot", False),  # a code block may follow
        ("", "", False),
        (";", "", False),
        (
            "WITH a AS (SELECT 1 UNION SELECT 2)\nSELECT (SELECT 3) FROM a\nUNION SELECT 4; SELECT",
            "WITH a AS (SELECT 1 UNION SELECT 2)\nSELECT (SELECT 3) FROM a\nUNION SELECT 4",
            True,
        ),
    ],
)
def test_first_statement(text, statement, complete):
    assert first_statement(text) == statement
    assert is_complete(text) is complete


FRAGMENTS = st.sampled_from(
    [
        *("SELECT", "with", "a", "é", "_", "Hi", "sql", ";", "```", "'", '"', "`", "[", "]"),
        *("--", "/*", "*/", "(", ")", " ", "\t", "\n", "\r\n", "\n\n", "```sql\n"),
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


@given(TEXTS, TEXTS)
def test_complete_text_keeps_its_statement_whatever_follows(text, more):
    if is_complete(text):
        assert is_complete(text + more)
        assert first_statement(text + more) == first_statement(text)


@given(TEXTS)
def test_statement_is_part_of_the_text_and_stays_as_it_is(text):
    statement = first_statement(text)
    assert statement in text
    assert statement == statement.strip()


@given(st.text())
def test_any_text_has_a_statement(text):
    first_statement(text)
    has_outer_order(text)


@pytest.mark.parametrize(
    "unit", ["```sql\n", "'", "[", "/*", "-- \n", "\n ", "(", "`", ";", " ", "order ", "a"]
)
def test_long_text_is_cut_in_no_time(unit):
    text = "SELECT " + unit * 200_000
    start = time.monotonic()
    first_statement(text)
    has_outer_order(text)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 3", True),
        ("SELECT a FROM t ORDER /* x */ BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("WITH c AS (SELECT 1) SELECT * FROM c ORDER BY 1;", True),
        ("SELECT a FROM t", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)", False),
        ("SELECT ROW_NUMBER() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'ORDER BY a' FROM t", False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ('SELECT "order", by FROM t', False),
        ("SELECT GROUP_CONCAT(a ORDER BY a) FROM t GROUP BY b", False),
    ],
)
def test_outer_order(query, ordered):
    assert has_outer_order(query) is ordered
