import logging
import subprocess
import sys
import time
from collections import Counter

import pytest

from molf.sql.bleu import bleu
from molf.sql.limits import Limits
from molf.sql.logic import LogicMatcher
from molf.sql.metrics import (
    MEANS,
    SHARES,
    WITH_ROWS,
    Example,
    SqlScorer,
    exact_match,
    gold_without_rows,
    sql_metrics,
)

SCHEMA = "CREATE TABLE t (a INT, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (2, 'x');"
ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT max(x) FROM r"


@pytest.fixture(scope="module")
def matcher():
    with LogicMatcher() as matcher:
        yield matcher


@pytest.fixture(scope="module")
def scorer():
    with SqlScorer(Limits(seconds=1)) as scorer:
        yield scorer


def score(scorer, gold, text, schema=SCHEMA):
    return scorer.score(Example(schema=schema, gold=gold, text=text))


@pytest.mark.parametrize(
    ("gold", "predicted", "equal"),
    [
        ("SELECT a FROM t;", " select A from T ", True),
        ("SELECT a FROM t", "SELECT a FROM t ;", True),
        ("SELECT a FROM t", "SELECT  a FROM t", False),
        ("SELECT a FROM t", "SELECT b FROM t", False),
    ],
)
def test_exact_match(gold, predicted, equal):
    assert exact_match(gold, predicted) is equal


@pytest.mark.parametrize(
    ("gold", "predicted", "equal"),
    [
        ("SELECT a FROM t", 'select\n"A" FROM [T] -- all\n;', True),
        ("SELECT SUM(a) AS total FROM t", "SELECT sum(a) FROM t", True),
        ("SELECT u.a FROM t AS u", "SELECT t.a FROM t", True),
        (
            "SELECT u.a FROM t u JOIN s v ON u.i = v.i",
            "SELECT x.a FROM t x INNER JOIN s y ON x.i = y.i",
            True,
        ),
        (
            "SELECT a FROM t LEFT OUTER JOIN s USING (i)",
            "SELECT a FROM t LEFT JOIN s USING (i)",
            True,
        ),
        (
            "SELECT SUM(a) AS n FROM t GROUP BY b ORDER BY n",
            "SELECT SUM(a) m FROM t GROUP BY b ORDER BY m ASC",
            True,
        ),
        ("SELECT a FROM t WHERE a != 1", "SELECT a FROM t WHERE a <> 1", True),
        ("SELECT a FROM (SELECT a FROM t) AS s", "SELECT a FROM (SELECT a FROM t)", True),
        ("SELECT p.a, q.a FROM t p, t q", "SELECT q.a, p.a FROM t p, t q", False),
        ("SELECT a FROM t LEFT JOIN s USING (i)", "SELECT a FROM t JOIN s USING (i)", False),
        ("SELECT a FROM t ORDER BY a", "SELECT a FROM t ORDER BY a DESC", False),
        ("SELECT a FROM t", "SELECT b FROM t", False),
        ("SELECT 'a' FROM t", "SELECT 'A' FROM t", False),
        ("SELECT a FROM t", "SELECT a FROM t; SELECT b FROM t", False),
        ("SELECT a FROM", "SELECT a FROM", False),
        ("", "", False),
    ],
)
def test_logic_match(matcher, gold, predicted, equal):
    assert matcher.match(gold, predicted) is equal
    assert matcher.match(predicted, gold) is equal


@pytest.mark.parametrize(
    "text",
    [
        "SELECT " + "(" * 20_000 + "1" + ")" * 20_000,
        "SELECT * FROM (" * 4000 + "SELECT 1" + ")" * 4000,
        "SELECT " + "1 + " * 15_000 + "1",
        "SELECT " + "CASE WHEN " * 5000,
        "SELECT '" + "x" * 2**20 + "'",
        "SELECT '\ud800",
        "\x00" * 1000,
        "{{{{" * 100,
        "SELECT a AS b FROM t ORDER BY " + "b, " * 15_000 + "b",
    ],
)
def test_logic_match_survives_hostile_text(matcher, text):
    start = time.monotonic()
    matcher.match(text, text)
    assert time.monotonic() - start < 10
    assert matcher.match("SELECT 1", "select 1")


def test_logic_match_does_not_wait(matcher, tmp_path, monkeypatch):
    (tmp_path / "stuck.py").write_text(
        "import time\n"
        "from molf.sql.serve import serve\n"
        "def main():\n"
        "    serve(lambda settings: lambda request: time.sleep(60))\n"
    )
    with LogicMatcher(seconds=0.2) as stuck:
        monkeypatch.setattr(stuck, "_module", "stuck")
        monkeypatch.setattr(stuck, "_paths", (str(tmp_path),))
        assert not stuck.match("SELECT 1", "SELECT 1")


def test_bleu_of_equal_and_different_queries():
    query = "SELECT name FROM t WHERE a = 1"
    assert bleu(query, query, 4) == bleu(query, query, 1) == 1.0
    assert bleu(query, query.lower().replace(" ", "\n  "), 4) == 1.0
    assert bleu("SELECT a", "SELECT a", 4) == 1.0  # shorter than four tokens
    assert bleu(query, "", 4) == bleu(query, "", 1) == 0.0
    assert bleu(query, "no such words here", 1) < 0.15


def test_bleu_by_hand():
    gold, predicted = "SELECT a FROM t", "SELECT b FROM t"
    assert bleu(gold, predicted, 1) == pytest.approx(3 / 4)
    # One of three bigrams; no trigram and no 4-gram, smoothed to 1/(2*2) and 1/(4*1).
    assert bleu(gold, predicted, 4) == pytest.approx((3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** (1 / 4))
    # Half as long: brevity penalty exp(1 - 4/2).
    assert bleu(gold, "SELECT a", 1) == pytest.approx(2.718281828459045**-1)


def test_bleu_says_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        bleu("SELECT a", "SELECT a;", 4)
    assert not caplog.records


def test_right_answers(scorer):
    gold = "SELECT b, COUNT(*) AS n FROM t GROUP BY b ORDER BY n DESC;"
    best = score(scorer, gold, gold + "\n\nThis query ...")
    assert best.statement == gold.rstrip(";")
    assert best.error is None
    assert all(getattr(best, name) for name in SHARES)
    assert best.bleu_1 == best.bleu_4 == 1.0
    other = score(scorer, gold, "```sql\nselect b, sum(1.0) from t group by b order by 2 desc\n```")
    assert other.execution_accuracy
    assert other.execution_accuracy_set
    assert other.valid_sql
    assert not other.exact_match
    assert not other.logic_match
    assert 0 < other.bleu_4 < other.bleu_1 < 1


def test_order_and_duplicates_count_except_for_the_set(scorer):
    turned = score(scorer, "SELECT a FROM t ORDER BY a, b", "SELECT a FROM t ORDER BY a DESC")
    assert not turned.execution_accuracy
    assert turned.execution_accuracy_set
    free = score(scorer, "SELECT a FROM t", "SELECT a FROM t ORDER BY a DESC")
    assert free.execution_accuracy
    fewer = score(scorer, "SELECT b FROM t", "SELECT DISTINCT b FROM t")
    assert not fewer.execution_accuracy
    assert fewer.execution_accuracy_set


def test_changes(scorer):
    gold = "UPDATE t SET b = 'z' WHERE a = 2"
    assert score(scorer, gold, "UPDATE t SET b = 'z' WHERE a > 1").execution_accuracy
    assert not score(scorer, gold, "UPDATE t SET b = 'z'").execution_accuracy
    same_rows = score(scorer, gold, "SELECT a, CASE a WHEN 2 THEN 'z' ELSE b END FROM t")
    assert same_rows.valid_sql
    assert not same_rows.execution_accuracy


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "query: sql"),
        ("I do not know.", "query: sql"),
        ("SELECT c FROM t", "query: sql"),
        ("DROP TABLE nothing", "query: sql"),
        ("ATTACH 'x.db' AS y", "query: denied"),
        ("SELECT randomblob(1000000000)", "query: size"),
        (ENDLESS, "query: time"),
    ],
)
def test_failed_predictions(scorer, text, error):
    result = score(scorer, "SELECT a FROM t", text)
    assert result.error.replace("memory", "size") == error
    assert not any(getattr(result, name) for name in ("execution_accuracy", "valid_sql"))
    assert not result.execution_accuracy_set


def test_examples_whose_gold_query_fails_are_left_out(scorer):
    pairs = [
        (SCHEMA, "SELECT a FROM t"),
        (SCHEMA, "SELECT YEAR(a) FROM t"),
        ("CREATE SCHEMA s;", "SELECT 1"),
        (SCHEMA, ENDLESS),
    ]
    reasons = [None, "query: sql", "schema: sql", "query: time"]
    assert list(scorer.gold_failures(pairs)) == reasons
    examples = [Example(schema=schema, gold=gold, text="SELECT a FROM t") for schema, gold in pairs]
    assert [s is None for s in scorer.scores(examples)] == [False, True, True, True]


JSON_SCHEMA = "CREATE TABLE t (a INT, b TEXT); INSERT INTO t VALUES (1, '[1,2]'), (2, '[3]');"


def test_queries_through_json_each_are_compared_by_their_rows(scorer):
    gold = "SELECT value FROM t, json_each(t.b)"
    texts = ("SELECT 'rubbish' FROM json_each('[]')", "SELECT 1 UNION SELECT 2 UNION SELECT 3")
    found = [score(scorer, gold, text, JSON_SCHEMA).execution_accuracy for text in texts]
    assert found == [False, True]


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("SELECT a FROM t WHERE b = 'z'", "SELECT NULL WHERE 0"),
        ("DELETE FROM t WHERE b = 'z'", "UPDATE t SET a = 1 WHERE 0"),
        ("UPDATE t SET a = a", "DELETE FROM t WHERE 0"),
        ("INSERT INTO t SELECT * FROM t WHERE 0", "DELETE FROM t WHERE 0"),
        ("CREATE TABLE IF NOT EXISTS t (c)", "CREATE TABLE IF NOT EXISTS t (d)"),
    ],
)
def test_gold_queries_that_any_query_without_effect_matches(scorer, gold, text):
    found = score(scorer, gold, text)
    assert found.execution_accuracy
    assert not found.gold_with_rows


@pytest.mark.parametrize(
    "gold",
    [
        "SELECT a FROM t",
        "SELECT max(a) FROM t WHERE 0",
        "SELECT count(*) FROM t WHERE 0",
        "DELETE FROM t WHERE a = 1",
        "INSERT INTO t VALUES (1, 'x')",
        "DROP TABLE t",
    ],
)
def test_gold_queries_with_rows(scorer, gold):
    assert score(scorer, gold, gold).gold_with_rows


def test_gold_queries_without_rows_are_counted_and_left_out_of_one_metric(scorer):
    golds = ["SELECT a FROM t WHERE 0", "DELETE FROM t WHERE 0", "SELECT a FROM t", "DROP TABLE t"]
    texts = ["SELECT 1 WHERE 0", "DELETE FROM t WHERE 0", "SELECT a FROM t", "SELECT a FROM t"]
    examples = [
        Example(schema=SCHEMA, gold=gold, text=text)
        for gold, text in zip(golds, texts, strict=True)
    ]
    scores = list(scorer.scores(examples))
    metrics = sql_metrics(scores)
    assert metrics["execution_accuracy"].value == 0.75
    found = metrics["execution_accuracy_with_rows"]
    assert (found.value, found.count) == (0.5, 2)
    assert gold_without_rows(scores) == {"queries": 1, "changes": 1}
    assert "execution_accuracy_with_rows" not in sql_metrics(scores[:2])


def test_scores_come_in_order(scorer):
    examples = [Example(schema="", gold=f"SELECT {n}", text=f"SELECT {n % 7}") for n in range(60)]
    assert [s.execution_accuracy for s in scorer.scores(examples)] == [n < 7 for n in range(60)]


def test_metrics(scorer):
    texts = ["SELECT a FROM t", "SELECT b FROM t", "SELECT nothing", "SELECT a FROM t ORDER BY a"]
    examples = [Example(schema=SCHEMA, gold=texts[0], text=text) for text in texts]
    metrics = sql_metrics(list(scorer.scores(examples)))
    assert set(metrics) == {*SHARES, *MEANS, WITH_ROWS}
    assert all(m.count == 4 and m.low <= m.value <= m.high for m in metrics.values())
    assert metrics["execution_accuracy"].value == 0.5
    assert metrics["valid_sql"].value == 0.75
    assert metrics["exact_match"].value == metrics["logic_match"].value == 0.25
    assert sql_metrics([]) == {}


def test_real_records(scorer, real_records):
    pairs = [(record["sql_context"], record["sql"]) for record in real_records]
    reasons = Counter(scorer.gold_failures(pairs))
    assert reasons == {None: 18, "query: sql": 5, "schema: sql": 2}
    examples = [Example(schema=schema, gold=gold, text=gold) for schema, gold in pairs]
    scores = [s for s in scorer.scores(examples) if s is not None]
    assert all(metric.value == 1.0 for metric in sql_metrics(scores).values())
    assert gold_without_rows(scores) == {"queries": 3, "changes": 1}


def test_imports_are_lazy():
    script = (
        "import sys\nimport molf.sql.metrics\n"
        "assert not {'torch', 'transformers', 'sqlglot', 'sacrebleu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
