"""Run hostile SQL in the sandbox and count the contained queries.

    python scripts/fuzz_sql.py --count 2000 --seed 0

Half of the queries come from a grammar with hostile leaves, half are mutated real queries. A query
is contained if the sandbox returns a result or a failure within its time limit. No file may appear
in the folders that a query could write to. Prints one line of figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from molf.sql.limits import Limits
from molf.sql.result import QueryResult
from molf.sql.sandbox import Sandbox

if sys.platform != "win32":
    import resource

Pair = tuple[str, str]
"""A schema and a query."""

FUZZ_LIMITS = Limits(seconds=0.1)
SLACK_SECONDS = 2.0  # for the grace period, the start of a new worker, and a busy machine

_SCHEMA = (
    "CREATE TABLE trees (id INT PRIMARY KEY, name TEXT, height REAL, planted DATE);"
    "INSERT INTO trees VALUES (1, 'oak', 20.5, '1990-04-01'), (2, 'elm', NULL, '2001-10-20'),"
    " (3, 'fir', 33, '1987-06-05');"
    "CREATE TABLE visits (tree_id INT, ranger VARCHAR(20), day DATE, cost DECIMAL(8, 2));"
    "INSERT INTO visits VALUES (1, 'Ada', '2020-01-02', 12.5), (1, 'Bo', '2020-03-04', 8),"
    " (3, 'Ada', '2021-05-06', 99.99);"
)
_TABLES = {
    "trees": ("id", "name", "height", "planted", "rowid"),
    "visits": ("tree_id", "ranger", "day", "cost"),
    "sqlite_master": ("type", "name", "sql"),
    "json_each('[1, \"a\", [3]]')": ("key", "value", "fullkey"),
}

BUILT_IN: tuple[Pair, ...] = tuple(
    (_SCHEMA, query)
    for query in (
        "SELECT name, height FROM trees WHERE height > 10 ORDER BY height DESC LIMIT 2;",
        "SELECT t.name, SUM(v.cost) AS total FROM trees t LEFT JOIN visits v ON t.id = v.tree_id "
        "GROUP BY t.name HAVING total > 1;",
        "WITH dear AS (SELECT * FROM visits WHERE cost > (SELECT AVG(cost) FROM visits)) "
        "SELECT ranger FROM dear UNION ALL SELECT name FROM trees;",
        "SELECT ranger, day, ROW_NUMBER() OVER (PARTITION BY ranger ORDER BY day) FROM visits;",
        "INSERT INTO visits (tree_id, ranger, day, cost) VALUES (2, 'Cy', '2022-01-01', 5);",
        "UPDATE trees SET height = height * 1.1 WHERE planted < '2000-01-01';",
        "DELETE FROM visits WHERE tree_id NOT IN (SELECT id FROM trees WHERE name LIKE 'o%');",
        "CREATE VIEW tall AS SELECT * FROM trees WHERE height BETWEEN 20 AND 40;",
        "ALTER TABLE trees ADD COLUMN species TEXT;",
        "DROP TABLE visits;",
        "SELECT strftime('%Y', day), COUNT(DISTINCT ranger) FROM visits GROUP BY 1;",
        "SELECT CASE WHEN height IS NULL THEN 'none' ELSE printf('%.1f', height) END FROM trees;",
    )
)

# Expressions that parse and then exceed a limit, are denied or are unusual.
_BOMBS = (
    "randomblob(1000000000)", "randomblob(900000)", "zeroblob(2147483647)", "char(0, 55296)",
    "hex(zeroblob(900000000))", "hex(zeroblob(400000))", "printf('%1000000000d', 1)",
    "printf('%.*c', 999999, 'x')", "replace(hex(zeroblob(400000)), '0', hex(zeroblob(400000)))",
    "instr(hex(zeroblob(99999)), hex(zeroblob(49999)) || '1')", "load_extension('x')",
    "readfile('/etc/hosts')", "writefile('x.txt', 'x')", "edit('x')", "fts3_tokenizer('simple')",
    "fts3_tokenizer('simple', x'4141414141414141')", "sqlite_log(1, 'x')", "random()",
    "json('" + "[" * 900 + "]" * 900 + "')", "json('{\"a\":1e999}') -> '$.a'", "unicode('')",
    "'' LIKE hex(zeroblob(4000))", "hex(zeroblob(400000)) GLOB '*0*0*0*[^0]*'", "1e999 - 1e999",
    "CAST(x'ff00fe' AS TEXT)", "abs(-9223372036854775808)", "9223372036854775807 + 1",
    *(
        f"(WITH RECURSIVE r(x) AS (SELECT {first} UNION ALL SELECT {step} FROM r) "
        f"SELECT {result} FROM r)"
        for first, step, result in (
            ("1", "x + 1", "max(x)"),
            ("1", "x + 1", "group_concat(x)"),
            ("1", "x + 1", "json_group_array(x)"),
            ("'ab'", "x || x", "length(x)"),
            ("randomblob(9000)", "randomblob(9000)", "count(DISTINCT x)"),
        )
    ),
)  # fmt: skip

_NOISE = ("?", ":p", "\"", "'", "`", "[", "/*", "--", "(", ")", ";", ",", "\x00", "\ud800",
          "\ufffd", "\U0001f600", "SELECT", "FROM", "NULL", "*")  # fmt: skip

_VALUES = ("0", "-1", "2.5", "1e999", "9223372036854775807", "NULL", "''", "'%'", "x'00ff'",
           "'a;b'", "'it''s'", "TRUE", "current_date", "'2020-01-02'")  # fmt: skip

_STATEMENTS = (
    "ATTACH 'x.db' AS y", "ATTACH ':memory:' AS y", "DETACH main", "VACUUM", "VACUUM INTO 'x.db'",
    "PRAGMA writable_schema = 1", "PRAGMA journal_mode = WAL", "PRAGMA hard_heap_limit = 0",
    "PRAGMA temp_store_directory = '.'", "PRAGMA mmap_size = 1000000000", "BEGIN EXCLUSIVE",
    "ROLLBACK", "SAVEPOINT s", "ANALYZE", "REINDEX", "SELECT * FROM pragma_database_list",
    "CREATE VIRTUAL TABLE f USING fts5(a)", "CREATE VIRTUAL TABLE r USING rtree(a, b, c)",
    "SELECT * FROM dbstat", "SELECT * FROM sqlite_dbpage", "DELETE FROM sqlite_master",
    "INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 2, 'CREATE TABLE x (a)')",
    "CREATE TRIGGER t AFTER INSERT ON visits BEGIN INSERT INTO visits SELECT * FROM visits; END",
    "SELECT * FROM generate_series(1, 1000000000)", "EXPLAIN SELECT 1", "VALUES (1), (2)",
    "CREATE TEMP TABLE big AS SELECT randomblob(900000) FROM trees, trees b, trees c, trees d",
)  # fmt: skip

_OPERATORS = ("+", "-", "*", "/", "%", "||", "<<", "&", "=", "<>", "<", "IS", "LIKE", "GLOB",
              "AND", "OR", "IS NOT", "NOT LIKE")  # fmt: skip
_CALLS = ("abs", "hex", "quote", "printf", "lower", "typeof", "round", "soundex", "date", "length",
          "likely", "trim", "json_quote", "julianday", "unicode", "sqrt")  # fmt: skip
_AGGREGATES = ("sum", "max", "min", "group_concat", "json_group_array", "count", "total", "avg")


@dataclass
class Figures:
    """The result of a fuzzer run.

    Attributes:
        tried: Number of queries.
        contained: Queries with a result or a failure within the time limit.
        outcomes: Number of each kind of failure; "ok" for results.
        seconds: Wall-clock time of all.
        slowest_seconds: Time of the slowest.
        peak_memory_mb: Largest resident memory of this process.
        peak_worker_memory_mb: The same of the workers; on Linux it includes this process's memory
            at their start.
        files: Files that appeared in the working, temporary or workers' folder.
    """

    tried: int = 0
    contained: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    peak_worker_memory_mb: float = 0.0
    files: list[str] = field(default_factory=list)


def read_pairs(path: Path) -> list[Pair]:
    """Read schemas and queries from a JSONL file with the fields `sql_context` and `sql`."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    return [(record["sql_context"], record["sql"]) for record in records]


def hostile_pairs(count: int, seed: int, real: Sequence[Pair] = BUILT_IN) -> Iterator[Pair]:
    """Yield `count` schemas with queries, determined by the seed."""
    rng = random.Random(seed)
    for _ in range(count):
        schema, query = rng.choice(real)
        if rng.random() < 0.5:
            yield _SCHEMA, _Grammar(rng).statement()
        elif rng.random() < 0.8:
            yield schema, _mutated(query, rng)
        else:
            yield _mutated(schema, rng), query


def fuzz(pairs: Iterator[Pair], limits: Limits = FUZZ_LIMITS) -> Figures:
    """Run each pair in one sandbox; record outcomes, times, memory and new files."""
    figures = Figures()
    outcomes: Counter[str] = Counter()
    start = time.monotonic()
    with Sandbox(limits) as sandbox:
        sandbox.run("", "SELECT 1")
        before = _files(sandbox)
        for schema, query in pairs:
            begin = time.monotonic()
            result = sandbox.run(schema, query)
            seconds = time.monotonic() - begin
            figures.tried += 1
            figures.contained += (
                isinstance(result, QueryResult) and seconds < limits.seconds + SLACK_SECONDS
            )
            figures.slowest_seconds = max(figures.slowest_seconds, seconds)
            outcomes[result.error or "ok"] += 1
        figures.files = sorted(_files(sandbox) - before)
    figures.seconds = time.monotonic() - start
    figures.outcomes = dict(outcomes.most_common())
    if sys.platform != "win32":
        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes on macOS, else KiB
        figures.peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        figures.peak_worker_memory_mb = (
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
        )
    return figures


def _files(sandbox: Sandbox) -> set[str]:
    # Only etilqs_ files are SQLite's; other processes use the same temporary folder.
    temporary = {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("etilqs_")}
    return temporary | set(os.listdir()) | set(os.listdir(sandbox.folder))


class _Grammar:
    """Generates statements that mostly compile, so that they run, with hostile parts."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._bomb_rate = rng.choice((0.0, 0.02, 0.1))

    def statement(self) -> str:
        rng = self._rng
        table = rng.choice(("trees", "visits"))
        column = rng.choice(_TABLES[table])
        columns = [column]
        kind = rng.random()
        if kind < 0.7:
            return self.select(3)
        if kind < 0.8:
            return rng.choice(_STATEMENTS)
        if kind < 0.83:
            return ";".join(self.select(1) for _ in range(rng.choice((2, 1000))))
        return rng.choice(
            (
                f"INSERT INTO {table} ({column}) SELECT {self.expression([], 2)} FROM trees",
                f"INSERT INTO {table} ({column}) VALUES ({self.expression([], 2)}) RETURNING *",
                f"UPDATE {table} SET {column} = {self.expression(columns, 3)}",
                f"DELETE FROM {table} WHERE {self.expression(columns, 3)}",
                f"CREATE TABLE n AS {self.select(2)}",
                f"CREATE VIEW n AS {self.select(2)}",
                f"CREATE TABLE n (a DEFAULT ({self.expression([], 2)}), CHECK (a > 1))",
                f"CREATE INDEX i ON {table} ({self.expression(columns, 2)})",
            )
        )

    def select(self, depth: int) -> str:
        rng = self._rng
        sources, columns = [], []
        for number in range(rng.choice((1, 1, 1, 2, 2, 3, 12))):
            name = f"s{depth}{number}"
            if depth > 1 and rng.random() < 0.2:
                sources.append(f"({self.select(depth - 1)}) {name}")
                columns.append(f"{name}.c0")
            else:
                table = rng.choice(tuple(_TABLES))
                sources.append(f"{table} {name}")
                columns += [f"{name}.{column}" for column in _TABLES[table]]
        # One column, so that each SELECT is valid as operand, as source and in a UNION.
        query = f"SELECT {rng.choice(('', '', 'DISTINCT '))}{self.result(columns, depth)} AS c0 "
        query += f"FROM {rng.choice((', ', ' LEFT JOIN ', ' CROSS JOIN ')).join(sources)}"
        if rng.random() < 0.4:
            query += f" WHERE {self.expression(columns, depth)}"
        if rng.random() < 0.2:
            query += f" GROUP BY {self.expression(columns, 1)}"
        if depth > 1 and rng.random() < 0.15:
            operator = rng.choice(("UNION", "UNION ALL", "EXCEPT", "INTERSECT"))
            query += f" {operator} {self.select(1)}"
        elif depth == 3 and rng.random() < 0.3:
            query += f" ORDER BY {self.expression(columns, depth)}"
        if depth == 3 and rng.random() < 0.3:
            query += f" LIMIT {rng.choice((0, 3, -1, 10**9))}"
        if depth == 3 and rng.random() < 0.1:
            step = self.expression(["n"], 2)
            query = f"WITH RECURSIVE c(n) AS (SELECT 1 UNION SELECT {step} FROM c) {query}"
        return query

    def result(self, columns: list[str], depth: int) -> str:
        rng = self._rng
        one = self.expression(columns, depth)
        kind = rng.random()
        if kind < 0.6:
            return one
        call = f"{rng.choice(_AGGREGATES)}({one})"
        if kind < 0.8:
            return call
        frame = f"PARTITION BY {rng.choice(columns)} ORDER BY {self.expression(columns, 1)}"
        return f"{call} OVER ({frame} ROWS BETWEEN UNBOUNDED PRECEDING AND 5 FOLLOWING)"

    def expression(self, columns: list[str], depth: int) -> str:
        rng = self._rng
        if rng.random() < self._bomb_rate:
            return rng.choice(_BOMBS)
        kind = rng.random()
        if depth <= 0 or kind < 0.3:
            return rng.choice(columns if columns and rng.random() < 0.7 else _VALUES)
        one, two = self.expression(columns, depth - 1), self.expression(columns, depth - 1)
        if kind < 0.6:
            return f"({one} {rng.choice(_OPERATORS)} {two})"
        if kind < 0.8:
            return f"{rng.choice(_CALLS)}({one})"
        if kind < 0.9:
            return f"CASE WHEN {one} THEN {two} END"
        if kind < 0.96:
            return f"({self.select(depth - 1)})"
        return "-" * rng.choice((1, 90)) + " " + "(" * 40 + one + ")" * 40


def _mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.5:
            text = _with_bomb(text, rng)
            continue
        words = text.split(" ")
        place = rng.randrange(len(words))
        match rng.randrange(9):
            case 0:
                del words[place]
            case 1:
                words.insert(place, rng.choice(words))
            case 2:
                words[place] = rng.choice((*_NOISE, *_BOMBS, *_TABLES, *_OPERATORS))
            case 3:
                words.insert(place, f"{rng.choice(_OPERATORS)} {rng.choice(_BOMBS)}")
            case 4:
                other = rng.randrange(len(words))
                words[place], words[other] = words[other], words[place]
            case 5:
                words = words[: place + 1]
            case 6:
                words[place] *= rng.choice((2, 50, 20_000)) if len(text) < 10_000 else 2
            case 7:
                words.append("; " + rng.choice(_STATEMENTS))
            case 8:
                noise = bytearray(" ".join(words).encode("utf-8", "surrogatepass"))
                for _ in range(3):
                    noise[rng.randrange(len(noise))] = rng.randrange(256)
                words = [noise.decode("utf-8", "surrogateescape")]
        text = " ".join(words) or " "
    return text


def _with_bomb(text: str, rng: random.Random) -> str:
    """Replace an operand, a number or a quoted text by a hostile expression."""
    operands = list(re.finditer(r"\b\d+(?:\.\d+)?\b|'[^']*'", text))
    if not operands:
        return text
    operand = rng.choice(operands)
    grammar = _Grammar(rng)
    bomb = rng.choice((*_BOMBS, f"({grammar.select(1)})", grammar.expression([], 2)))
    return text[: operand.start()] + bomb + text[operand.end() :]


def main() -> None:
    """Fuzz and print the figures; exit with 1 unless everything was contained."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="queries to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, help="JSONL of further queries to mutate")
    arguments = parser.parse_args()
    real = [*BUILT_IN, *(read_pairs(arguments.records) if arguments.records else [])]
    figures = fuzz(hostile_pairs(arguments.count, arguments.seed, real))
    print(json.dumps(asdict(figures)))
    if figures.contained < figures.tried or figures.files:
        sys.exit(1)


if __name__ == "__main__":
    main()
