import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from molf.sql.compare import same_result
from molf.sql.limits import Limits
from molf.sql.result import parse_reply
from molf.sql.sandbox import Sandbox
from molf.sql.worker import Worker

SCHEMA = "CREATE TABLE t (a INT, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, NULL);"
ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT max(x) FROM r"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(Limits(seconds=1)) as sandbox:
        yield sandbox


def worker_pid(sandbox):
    assert sandbox.run("", "SELECT 1").ok
    return sandbox._idle.queue[-1]._process.pid


def is_gone(pid):
    """Dead and waited for: a zombie still has its process id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_rows_of_every_type(sandbox):
    result = sandbox.run(SCHEMA, "SELECT a, b, a / 2.0, x'00ff', 'é\u2028😀', 1e999, -1 FROM t")
    infinity = float("inf")
    assert result.ok
    assert result.effect == "rows"
    assert result.columns == 7
    assert result.rows == [
        (1, "x", 0.5, b"\x00\xff", "é\u2028😀", infinity, -1),
        (2, None, 1.0, b"\x00\xff", "é\u2028😀", infinity, -1),
    ]


def test_integers_and_broken_text_come_back_as_they_are(sandbox):
    query = "SELECT 9223372036854775807, -9223372036854775808, CAST(x'41ff' AS TEXT)"
    assert sandbox.run("", query).rows == [(2**63 - 1, -(2**63), "A\udcff")]


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("INSERT INTO t VALUES (3, 'z')", [(1, "x"), (2, None), (3, "z")]),
        (
            "INSERT INTO t SELECT a + 10, b FROM t RETURNING 1",
            [(1, "x"), (2, None), (11, "x"), (12, None)],
        ),
        ("UPDATE t SET b = 'y' WHERE a = 2", [(1, "x"), (2, "y")]),
        ("DELETE FROM T WHERE a = 1", [(2, None)]),
        ("REPLACE INTO main.t VALUES (1, 'w')", [(1, "x"), (2, None), (1, "w")]),
        ("WITH c AS (SELECT 1 AS a) DELETE FROM t WHERE a IN (SELECT a FROM c)", [(2, None)]),
    ],
)
def test_changes_give_the_touched_table(sandbox, query, rows):
    result = sandbox.run(SCHEMA, query)
    assert (result.effect, result.table, result.columns) == ("table", "t", 2)
    assert result.rows == rows


def test_trigger_does_not_count_as_touched(sandbox):
    schema = SCHEMA + (
        "CREATE TABLE log (n INT); CREATE TRIGGER r AFTER INSERT ON t BEGIN "
        "INSERT INTO log VALUES (new.a); END;"
    )
    assert sandbox.run(schema, "INSERT INTO t VALUES (3, 'z')").table == "t"


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("DROP TABLE t", []),
        (
            "CREATE VIEW V AS SELECT b FROM t",
            [
                ("table", "t", "t", '["a", "b"]', '[[1,"x"],[2,null]]'),
                ("view", "v", "v", '["b"]', '[["x"],[null]]'),
            ],
        ),
        (
            "ALTER TABLE t RENAME TO u",
            [("table", "u", "u", '["a", "b"]', '[[1,"x"],[2,null]]')],
        ),
        (
            "ALTER TABLE t RENAME COLUMN a TO C",
            [("table", "t", "t", '["c", "b"]', '[[1,"x"],[2,null]]')],
        ),
        (
            "ALTER TABLE t ADD COLUMN c INT DEFAULT 3",
            [("table", "t", "t", '["a", "b", "c"]', '[[1,"x",3],[2,null,3]]')],
        ),
        ("ALTER TABLE t DROP COLUMN a", [("table", "t", "t", '["b"]', '[["x"],[null]]')]),
        (
            "CREATE INDEX i ON t (a)",
            [
                ("table", "t", "t", '["a", "b"]', '[[1,"x"],[2,null]]'),
                ("index", "i", "t", None, None),
            ],
        ),
        (
            "CREATE TABLE u AS SELECT a / 3.0 FROM t ORDER BY a DESC",
            [
                ("table", "t", "t", '["a", "b"]', '[[1,"x"],[2,null]]'),
                ("table", "u", "u", '["a / 3.0"]', "[[0.333333333],[0.666666667]]"),
            ],
        ),
    ],
)
def test_changes_of_the_schema_give_the_schema(sandbox, query, rows):
    result = sandbox.run(SCHEMA, query)
    assert result.effect == "schema"
    assert result.rows == rows


def test_view_of_a_dropped_table_is_part_of_the_schema(sandbox):
    result = sandbox.run(SCHEMA + "CREATE VIEW v AS SELECT * FROM t;", "DROP TABLE t")
    assert result.rows == [("view", "v", "v", "unusable", None)]


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ("CREATE VIEW v AS SELECT a FROM t WHERE a > 1", "CREATE VIEW v AS SELECT a FROM t"),
        ("CREATE TABLE u AS SELECT a FROM t", "CREATE TABLE u AS SELECT a FROM t WHERE a = 1"),
        ("ALTER TABLE t ADD COLUMN c DEFAULT 3", "ALTER TABLE t ADD COLUMN c DEFAULT 4"),
    ],
)
def test_a_changed_schema_is_compared_with_its_rows(sandbox, gold, predicted):
    expected, found = sandbox.run(SCHEMA, gold), sandbox.run(SCHEMA, predicted)
    assert found.ok
    assert not same_result(expected, found, ordered=False)
    assert same_result(expected, sandbox.run(SCHEMA, gold.lower()), ordered=False)


def test_a_view_without_end_exceeds_the_time(sandbox):
    view = "CREATE VIEW v AS SELECT max(x) FROM r"
    endless = ENDLESS.replace("SELECT max(x) FROM r", "")
    result = sandbox.run("", f"{view.split(' AS ')[0]} AS {endless}SELECT max(x) FROM r")
    assert result.reason == "query: time"


TAGS = (
    "CREATE TABLE t (a INT, tags TEXT); INSERT INTO t VALUES (1, '[1,2]'), (2, '[3]');"
    "CREATE TABLE s (i INTEGER PRIMARY KEY AUTOINCREMENT, b); INSERT INTO s (b) VALUES (7);"
    "CREATE VIEW v AS SELECT value FROM json_each('[1,2]');"
)
LOG = (
    "CREATE TABLE log (n); CREATE TRIGGER r AFTER INSERT ON t BEGIN "
    "INSERT INTO log SELECT value FROM json_each(new.tags); END;"
)


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("SELECT value FROM t, json_each(t.tags)", [(1,), (2,), (3,)]),
        ("SELECT 'rubbish' FROM json_each('[]')", []),
        ("SELECT count(*) FROM json_tree('[1]')", [(2,)]),
        ("SELECT a FROM t WHERE EXISTS (SELECT 1 FROM json_each(tags) WHERE value = 3)", [(2,)]),
        ("WITH c AS (SELECT value x FROM json_each('[4]')) SELECT x FROM c", [(4,)]),
        ("SELECT * FROM v UNION ALL SELECT atom FROM json_tree('5')", [(1,), (2,), (5,)]),
        ("SELECT (SELECT max(value) FROM json_each(tags)) FROM t", [(2,), (3,)]),
        ("/* what */ -- for\n EXPLAIN QUERY PLAN DELETE FROM t", []),
    ],
)
def test_what_reads_gives_rows(sandbox, query, rows):
    result = sandbox.run(TAGS, query)
    assert (result.effect, result.table, result.rows) == ("rows", None, rows)


@pytest.mark.parametrize("query", ["DELETE FROM t", "DROP TABLE t", "INSERT INTO t VALUES (1, 2)"])
def test_explaining_a_change_is_none(sandbox, query):
    assert sandbox.run(TAGS, f"EXPLAIN {query}").effect == "rows"


@pytest.mark.parametrize(
    ("query", "table", "rows"),
    [
        (
            "INSERT INTO t SELECT value, NULL FROM json_each('[5]')",
            "t",
            [(1, "[1,2]"), (2, "[3]"), (5, None)],
        ),
        ("UPDATE t SET a = j.value FROM json_each('[8]') j", "t", [(8, "[1,2]"), (8, "[3]")]),
        (
            "WITH c AS (SELECT value x FROM json_tree('[1]')) "
            "DELETE FROM t WHERE a IN (SELECT x FROM c)",
            "t",
            [(2, "[3]")],
        ),
        ("INSERT INTO s (b) VALUES (8)", "s", [(1, 7), (2, 8)]),
        ("UPDATE sqlite_sequence SET seq = 0", "sqlite_sequence", [("s", 0)]),
    ],
)
def test_the_changed_table_is_the_users(sandbox, query, table, rows):
    result = sandbox.run(TAGS, query)
    assert (result.effect, result.table, result.rows) == ("table", table, rows)


def test_table_valued_function_of_a_trigger_does_not_count(sandbox):
    assert sandbox.run(TAGS + LOG, "INSERT INTO t VALUES (3, '[4]')").table == "t"


@pytest.mark.parametrize(
    "query", ["ANALYZE", "ANALYZE t", "REINDEX", "DROP TABLE IF EXISTS u", "BEGIN"]
)
def test_books_that_sqlite_keeps_are_no_change(sandbox, query):
    for schema in (TAGS, TAGS + "ANALYZE;"):
        result = sandbox.run(schema, query)
        assert result.ok
        assert (result.effect, result.columns, result.rows) == ("rows", 0, [])


@pytest.mark.parametrize(
    ("query", "same"),
    [
        ("SELECT a FROM t WHERE a > 5", True),
        ("SELECT max(a) FROM t WHERE a > 5", False),
        ("DELETE FROM t WHERE a > 5", True),
        ("UPDATE t SET a = a + 0.0", True),
        ("UPDATE t SET a = 3", False),
        ("INSERT OR IGNORE INTO s VALUES (1, 9)", True),
        ("CREATE TABLE IF NOT EXISTS t (z)", True),
        ("CREATE TABLE u (z)", False),
        ("DROP TABLE t", False),
        ("BEGIN", True),
        ("UPDATE sqlite_sequence SET seq = 0", False),
    ],
)
def test_what_a_query_that_does_nothing_gives(sandbox, query, same):
    result = sandbox.run(TAGS, query)
    unchanged = sandbox.unchanged(TAGS, result)
    assert (unchanged.effect, unchanged.table) == (result.effect, result.table)
    assert same_result(result, unchanged, ordered=False) is same


def test_every_query_has_its_own_database(sandbox):
    assert sandbox.run(SCHEMA, "INSERT INTO t VALUES (3, 'z')").ok
    assert sandbox.run("", "SELECT * FROM t").reason == "query: sql"


@pytest.mark.parametrize("query", ["", "  ", ";", "-- nothing", "/* nothing"])
def test_nothing_is_no_query(sandbox, query):
    assert sandbox.run("", query).reason == "query: sql"


def test_failures_say_where_and_why(sandbox):
    assert sandbox.run("CREATE SCHEMA s", "SELECT 1").reason == "schema: sql"
    assert sandbox.run(ENDLESS, "SELECT 1").reason == "schema: time"
    assert sandbox.run("PRAGMA user_version", "SELECT 1").reason == "schema: denied"
    result = sandbox.run(SCHEMA, "SELECT c FROM t")
    assert result.reason == "query: sql"
    assert "no such column" in result.message
    assert sandbox.run("SELECT 1;" * 99_999, "SELECT 1").reason == "schema: size"


def test_limits_of_a_result():
    with Sandbox(Limits(rows=2, result_bytes=1000)) as sandbox:
        assert sandbox.run(SCHEMA, "SELECT 1 FROM t").ok
        assert sandbox.run(SCHEMA, "SELECT 1 FROM t, t u").reason == "query: rows"
        assert sandbox.run("", "SELECT hex(zeroblob(400))").ok
        assert sandbox.run("", "SELECT hex(zeroblob(600))").reason == "query: size"
        assert sandbox.run("", "SELECT zeroblob(600)").reason == "query: size"
        assert sandbox.run(SCHEMA, "UPDATE t SET b = zeroblob(600)").reason == "query: size"


def test_memory_is_limited_before_the_process_runs_out():
    query = (
        "WITH RECURSIVE r(n, b) AS (SELECT 1, zeroblob(900000) UNION ALL "
        "SELECT n + 1, zeroblob(900000) FROM r LIMIT 40) SELECT count(DISTINCT b || n) FROM r"
    )
    with Sandbox(Limits(memory_bytes=2**24)) as sandbox:
        assert sandbox.run("", query).reason == "query: memory"
        assert sandbox.run("", "SELECT 1").ok
    with Sandbox() as sandbox:
        assert sandbox.run("", query).rows == [(40,)]


def test_local_time_is_the_same_everywhere(sandbox, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    query = "SELECT datetime('2020-06-01 12:00:00', 'localtime')"
    assert sandbox.run("", query).rows == [("2020-06-01 12:00:00",)]


def test_wrong_limits_and_sizes_raise():
    with pytest.raises(ValueError, match="Invalid seconds=0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="Invalid rows"):
        Limits(rows=-1)
    with pytest.raises(ValueError, match="at least 1"):
        Sandbox(workers=0)


def test_killed_worker_is_replaced(sandbox):
    pid = worker_pid(sandbox)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    assert sandbox.run("", ENDLESS).reason == "query: crash"
    assert is_gone(pid)
    assert worker_pid(sandbox) != pid


def test_worker_killed_between_queries_costs_none(sandbox):
    pid = worker_pid(sandbox)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert sandbox.run("", "SELECT 1").ok
    assert is_gone(pid)


def test_stopped_worker_is_replaced(sandbox):
    pid = worker_pid(sandbox)
    threading.Timer(0.3, os.kill, (pid, signal.SIGSTOP)).start()
    start = time.monotonic()
    assert sandbox.run("", ENDLESS).reason == "query: time"
    assert time.monotonic() - start < 3
    assert is_gone(pid)
    assert worker_pid(sandbox) != pid


def test_stopped_worker_does_not_block_a_long_request():
    with Sandbox(Limits(seconds=0.5, sql_bytes=10**7)) as sandbox:
        os.kill(worker_pid(sandbox), signal.SIGSTOP)  # the pipe holds 64 KiB
        assert sandbox.run("", "SELECT 1 -- " + "x" * 10**6).reason == "query: time"
        assert sandbox.run("", "SELECT 1").ok


def test_nothing_is_left():
    with Sandbox(workers=2) as sandbox:
        pid, folder = worker_pid(sandbox), sandbox.folder
        assert os.listdir(folder) == []
    assert is_gone(pid)
    assert not os.path.exists(folder)
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run("", "SELECT 1")


def test_closing_waits_for_running_queries():
    sandbox = Sandbox(Limits(seconds=1))
    pid = worker_pid(sandbox)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(sandbox.run("", ENDLESS)))
    thread.start()
    time.sleep(0.3)
    sandbox.close()
    thread.join()
    assert answers[0].reason == "query: time"
    assert is_gone(pid)


def test_threads_share_the_workers():
    with Sandbox(Limits(seconds=1), workers=2) as sandbox:
        answers = {}

        def ask(number):
            query = ENDLESS if number % 4 == 0 else f"SELECT {number}"
            answers[number] = sandbox.run("", query)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, answer in answers.items():
        assert answer.rows == (None if number % 4 == 0 else [(number,)])


def test_worker_ends_with_its_parent():
    script = (
        "import os\nfrom molf.sql.sandbox import Sandbox\ns = Sandbox()\ns.run('', 'SELECT 1')\n"
        "print(s._idle.queue[-1]._process.pid, s.folder, flush=True)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    pid, folder = done.stdout.split()
    for _ in range(100):
        if is_gone(int(pid)) and not os.path.exists(folder):
            return
        time.sleep(0.05)
    pytest.fail(f"The worker {pid} outlives its parent, or its folder does.")


def test_worker_imports_little_and_keeps_no_environment(tmp_path, monkeypatch):
    (tmp_path / "spy.py").write_text(
        "import json, os, sys\n"
        "from molf.sql.database import run\n"
        "from molf.sql.serve import serve\n"
        "seen = [sorted(sys.modules), dict(os.environ), sys.flags.isolated]\n"
        "def main():\n"
        "    serve(lambda settings: lambda request: json.dumps(seen))\n"
    )
    monkeypatch.setenv("HF_TOKEN", "secret")
    worker = Worker("spy", {"seconds": 1}, str(tmp_path), (str(tmp_path),))
    modules, environment, isolated = json.loads(worker.ask({}, 10, 10**6))
    worker.close()
    assert not {"torch", "transformers", "numpy", "sqlglot", "site"} & set(modules)
    assert "secret" not in environment.values()
    assert isolated


def test_worker_that_cannot_start_says_why(tmp_path):
    (tmp_path / "bad.py").write_text(
        "from molf.sql.serve import serve\n"
        "def prepare(settings):\n"
        "    raise OSError('no luck')\n"
        "def main():\n"
        "    serve(prepare)\n"
    )
    with pytest.raises(RuntimeError, match="did not start: OSError: no luck"):
        Worker("bad", {}, str(tmp_path), (str(tmp_path),))
    with pytest.raises(RuntimeError, match="missing did not start"):
        Worker("missing", {}, str(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="needs process limits")
def test_process_can_open_and_start_nothing():
    script = (
        "import os, sqlite3\nfrom molf.sql.serve import restrict_process\n"
        "restrict_process(2**29, open_files=False)\n"
        "for action in (lambda: open('/etc/hosts'), lambda: open('x', 'w'),\n"
        "               lambda: bytearray(2**30),\n"
        "               lambda: sqlite3.connect('x.db').execute('CREATE TABLE t (a)')):\n"
        "    try:\n        action()\n        print('done')\n"
        "    except Exception as error:\n"
        "        print(getattr(error, 'errno', type(error).__name__))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    too_many = str(errno.EMFILE)
    assert done.stdout.split() == [too_many, too_many, "MemoryError", "OperationalError"]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b"null",
        b'{"rows": []}',
        b'{"effect": "rows", "columns": 1, "table": null, "rows": [[1, 2]]}',
        b'{"effect": "rows", "columns": 1, "table": null, "rows": [[[1]]]}',
        b'{"effect": "rows", "columns": 1, "table": null, "rows": [[true]]}',
        b'{"effect": "rows", "columns": 1, "table": null, "rows": [[{"blob": "x"}]]}',
        b'{"effect": "rows", "columns": 1, "table": null, "rows": [[{"blob": 1}]]}',
        b'{"effect": "rows", "columns": 1, "table": 3, "rows": [[1]]}',
        b'{"effect": "magic", "columns": 1, "table": null, "rows": [[1]]}',
        b'{"effect": ["rows"], "columns": 1, "table": null, "rows": [[1]]}',
        b'{"error": "nonsense", "stage": "query", "message": ""}',
        b'{"error": "sql"}',
        b'{"error": [], "stage": {}, "message": ""}',
        b'{"effect": "rows", "columns": 1, "table": null, "rows": [[' + b"1" * 100_000 + b"]]}",
    ],
)
def test_replies_are_not_trusted(payload):
    with pytest.raises(ValueError, match="worker's reply"):
        parse_reply(payload)


def test_worker_that_answers_nonsense_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "mad.py").write_text(
        "import sys, time\n"
        "from molf.sql.frames import read_frame, write_frame\n"
        "def main():\n"
        "    read_frame(sys.stdin.buffer, 10**6)\n"
        "    write_frame(sys.stdout.buffer, b'{\"ready\": true}')\n"
        "    query = read_frame(sys.stdin.buffer, 10**6)\n"
        "    sys.stdout.buffer.write(b'x' * 10**7 if b'long' in query else b'{}\\n')\n"
        "    sys.stdout.buffer.flush()\n"
        "    time.sleep(60)\n"
    )
    with Sandbox() as sandbox:
        monkeypatch.setattr(sandbox, "_module", "mad")
        monkeypatch.setattr(sandbox, "_paths", (str(tmp_path),))
        assert sandbox.run("", "SELECT long").reason == "query: crash"
        assert sandbox.run("", "SELECT short").reason == "query: crash"
        monkeypatch.setattr(sandbox, "_module", "molf.sql.database")
        assert sandbox.run("", "SELECT 1").ok


def test_interrupt_leaves_no_half_answered_worker(sandbox):
    pid = worker_pid(sandbox)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            sandbox.run("", ENDLESS)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert is_gone(pid)
    assert sandbox.run("", "SELECT 2").rows == [(2,)]
