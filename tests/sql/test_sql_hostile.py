"""Each query fails in its time and leaves nothing; the fuzz test has what nobody thought of."""

import os
import tempfile
import time

import pytest

from molf.sql.limits import Limits
from molf.sql.sandbox import Sandbox

LIMITS = Limits(seconds=0.5)
SLACK_SECONDS = 3.0  # killing, starting a new worker, a busy machine
MEMORY_GROWTH_BYTES = 500 * 2**20

COUNT = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT "
TABLE = "CREATE TABLE t (a); INSERT INTO t VALUES " + ", ".join(f"({n})" for n in range(1000)) + ";"
DIGITS = "hex(zeroblob(499999))"

HOSTILE = {
    "endless recursion": ("", COUNT + "max(x) FROM r", "time"),
    "endless rows": ("", COUNT + "x FROM r", "rows time"),
    "cross join of 10^9 rows": (TABLE, "SELECT sum(t.a * u.a * v.a) FROM t, t u, t v", "time"),
    "cross join of 10^9 returned rows": (TABLE, "SELECT * FROM t, t u, t v", "rows time"),
    "large random blob": ("", "SELECT randomblob(1000000000)", "size memory"),
    "large hex": ("", "SELECT hex(zeroblob(900000000))", "size memory"),
    "wide row of large values": ("", f"SELECT {', '.join([DIGITS] * 200)}", "size memory"),
    "doubling text": (
        "",
        "WITH RECURSIVE r(x) AS (SELECT 'ab' UNION ALL SELECT x || x FROM r) SELECT max(x) FROM r",
        "size memory",
    ),
    "doubling by replace": ("", f"SELECT replace({DIGITS}, '0', {DIGITS})", "size memory"),
    "group_concat": ("", COUNT + "group_concat(x) FROM r", "time size memory"),
    "json_group_array": ("", COUNT + "json_group_array(x) FROM r", "time size memory"),
    "deep json": ("", f"SELECT json('{'[' * 50_000}')", "sql size"),
    "window over everything": (
        TABLE,
        "SELECT sum(t.a) OVER (ORDER BY random() ROWS BETWEEN UNBOUNDED PRECEDING AND "
        "UNBOUNDED FOLLOWING EXCLUDE TIES) FROM t, t u",
        "time memory rows",
    ),
    "endless window": ("", COUNT + "count(*) OVER (ORDER BY x DESC) FROM r", "time memory"),
    "endless sort": ("", COUNT + "x, randomblob(9000) b FROM r ORDER BY b", "time memory"),
    "endless distinct": ("", COUNT + "count(DISTINCT randomblob(9000)) FROM r", "time memory"),
    "endless temporary table": (
        "",
        "CREATE TEMP TABLE big AS " + COUNT + "x FROM r",
        "time memory",
    ),
    "endless insert": (TABLE, "INSERT INTO t " + COUNT + "randomblob(9000) FROM r", "time memory"),
    "chain of triggers": (
        TABLE
        + "".join(
            f"CREATE TABLE t{n} (a); CREATE TRIGGER r{n} AFTER INSERT ON t{n} BEGIN "
            f"INSERT INTO t{n + 1} SELECT * FROM t; END;"
            for n in range(9)
        )
        + "CREATE TABLE t9 (a);",
        "INSERT INTO t0 VALUES (1)",
        "sql time memory",
    ),
    "one call that looks at no clock": (
        "",
        f"SELECT instr({DIGITS}, substr({DIGITS}, 1, 499999) || '1') + "
        f"instr({DIGITS}, substr({DIGITS}, 1, 499998) || '2')",
        "time",
    ),
    "doubling views": (
        "CREATE VIEW v0 AS SELECT 1 a;"
        + "".join(
            f"CREATE VIEW v{n} AS SELECT x.a FROM v{n - 1} x JOIN v{n - 1} y USING (a);"
            for n in range(1, 40)
        ),
        "SELECT * FROM v39",
        "sql time memory",
    ),
    "attach": ("", "ATTACH 'x.db' AS y", "denied"),
    "attach memory": ("", "ATTACH ':memory:' AS y", "denied"),
    "attach by URI": ("", "ATTACH 'file:x.db?mode=rwc' AS y", "denied"),
    "detach": ("", "DETACH main", "denied"),
    "vacuum": ("", "VACUUM", "denied"),
    "vacuum into": ("", "VACUUM INTO 'x.db'", "denied"),
    "writable schema": ("", "PRAGMA writable_schema = ON", "denied"),
    "no heap limit": ("", "PRAGMA hard_heap_limit = 0", "denied"),
    "temporary folder": ("", "PRAGMA temp_store_directory = '/tmp'", "denied"),
    "pragma as a table": ("", "SELECT * FROM pragma_database_list", "denied sql"),
    "schema table": (TABLE, "DELETE FROM sqlite_master", "sql"),
    "load_extension": ("", "SELECT load_extension('libc.so.6', 'system')", "denied"),
    "fts3_tokenizer": ("", "SELECT fts3_tokenizer('simple', x'4141414141414141')", "denied sql"),
    "readfile": ("", "SELECT readfile('/etc/passwd')", "sql"),
    "writefile": ("", "SELECT writefile('x.txt', 'x')", "sql"),
    "edit": ("", "SELECT edit('x', 'vi')", "sql"),
    "virtual table": ("", "CREATE VIRTUAL TABLE f USING fts5(a)", "denied sql"),
    "file as a virtual table": (
        "",
        "CREATE VIRTUAL TABLE c USING csv('/etc/passwd')",
        "denied sql",
    ),
    "raw pages": ("", "SELECT * FROM sqlite_dbpage", "denied sql"),
    "page statistics": ("", "SELECT * FROM dbstat", "denied sql"),
    "generate_series": ("", "SELECT sum(value) FROM generate_series(1, 10000000000)", "sql time"),
    "1 MB of query": ("", "SELECT " + "1 + " * 250_000 + "1", "size"),
    "NUL byte": ("", "SELECT 1 \x00", "sql"),
    "NUL bytes": ("", "\x00" * 100_000, "sql"),
    "half a surrogate pair": ("", "SELECT '\ud800'", "sql"),
    "decoded invalid UTF-8": ("", b"SELECT '\xff\xfe'".decode("utf-8", "surrogateescape"), "sql"),
    "replaced invalid UTF-8": ("", b"SELECT \xff\xfe".decode("utf-8", "replace"), "sql"),
    "a thousand statements": ("", "SELECT 1;" * 1000, "sql"),
    "deep parentheses": ("", "SELECT " + "(" * 50_000 + "1" + ")" * 50_000, "sql"),
    "deep sub-queries": ("", "SELECT * FROM (" * 5000 + "SELECT 1" + ")" * 5000, "sql"),
    "deep sum": ("", "SELECT " + "+".join("1" * 50_000), "sql"),
    "long union": (TABLE, " UNION ".join(["SELECT a FROM t"] * 5000), "sql"),
    "many columns": (TABLE, "SELECT " + "a," * 30_000 + "a FROM t", "sql"),
    "many tables": (TABLE, "SELECT 1 FROM " + ", ".join(f"t t{n}" for n in range(5000)), "sql"),
    "open quote": ("", "SELECT '", "sql"),
    "open parameter": ("", "SELECT ?", "sql"),
    "hostile schema": (COUNT + "max(x) FROM r", "SELECT 1", "time"),
    "schema with a file": ("ATTACH 'x.db' AS y", "SELECT 1", "denied"),
    "schema of 1 MB": ("SELECT 1;" * 111_111, "SELECT 1", "size"),
}

# These succeed: SQLite itself makes them harmless.
HARMLESS = {
    "wide printf": ("", "SELECT length(printf('%1000000000d', 1))"),
    "a thousand schema statements": ("SELECT 1;" * 1000, "SELECT 1"),
    "recursive trigger": (  # SQLite runs it once, unless a pragma asks for more
        TABLE + "CREATE TRIGGER r AFTER INSERT ON t BEGIN INSERT INTO t SELECT * FROM t; END;",
        "INSERT INTO t VALUES (1)",
    ),
    "many values": (TABLE, "SELECT count(*) FROM t"),
}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(LIMITS) as sandbox:
        yield sandbox


@pytest.fixture(autouse=True)
def nothing_left(sandbox, tmp_path, monkeypatch, memory_growth):
    """Nothing appears in any folder, this process does not grow, and the next query works."""
    monkeypatch.chdir(tmp_path)
    temporary = _temporary_files()
    yield
    assert os.listdir(tmp_path) == []
    assert os.listdir(sandbox.folder) == []
    assert _temporary_files() <= temporary
    assert memory_growth() < MEMORY_GROWTH_BYTES
    assert sandbox.run(TABLE, "SELECT sum(a) FROM t").rows == [(499_500,)]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_query_fails_in_its_time(sandbox, name):
    schema, query, kinds = HOSTILE[name]
    start = time.monotonic()
    result = sandbox.run(schema, query)
    assert time.monotonic() - start < LIMITS.seconds + SLACK_SECONDS
    assert result.error in kinds.split()
    assert len(result.message) < 1000


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_query_runs(sandbox, name):
    assert sandbox.run(*HARMLESS[name]).ok


def test_huge_query_is_not_even_copied(sandbox, memory_growth):
    size = 2**28
    assert sandbox.run("", "x" * size).reason == "query: size"
    assert memory_growth() < 1.5 * size


@pytest.mark.slow
def test_a_query_has_five_seconds(sandbox):
    with Sandbox() as patient:
        start = time.monotonic()
        assert patient.run("", COUNT + "max(x) FROM r").reason == "query: time"
        assert 4.9 < time.monotonic() - start < 5 + SLACK_SECONDS
        assert patient.run("", "SELECT 1").ok


def _temporary_files():
    # SQLite's own start with etilqs_; other programs' come and go in a shared folder.
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("etilqs_")}
