"""The worker that normalises SQL: it prints the syntax tree without aliases.

This module runs in the worker and imports only the standard library and sqlglot.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import sqlglot
from sqlglot import exp

from molf.sql.serve import Handler, restrict_process, serve


def main() -> None:
    """Serve requests `{"sql": text}`; the settings are `{"seconds", "address_space_bytes"}`."""
    serve(_prepare)


def _prepare(settings: dict[str, Any]) -> Handler:
    normal_form("SELECT a FROM t AS u")  # sqlglot imports its dialects when first used
    restrict_process(settings["address_space_bytes"], open_files=True)
    return _handle


def _handle(request: dict[str, Any]) -> str:
    try:
        return json.dumps(normal_form(request["sql"]))
    except Exception:  # too deep, too large, not SQL: hostile text may raise anything
        return "null"


def normal_form(sql: str) -> str | None:
    """Return a text that is equal for queries that differ only in layout, case and aliases.

    Identifiers are lower-cased and unquoted (SQLite ignores their case). A table's alias is
    replaced by the table's name where the table occurs once, and the alias of a selected expression
    by the expression in GROUP BY, HAVING and ORDER BY of the same SELECT. Then aliases are dropped.
    INNER and OUTER, which do not change a join, are dropped, and so is ASC, the default.

    Returns:
        None where the text is not exactly one statement.

    Raises:
        sqlglot.errors.SqlglotError: The text cannot be parsed.
        RecursionError: It is nested too deeply.
    """
    trees = [tree for tree in sqlglot.parse(sql, read="sqlite") if tree is not None]
    if len(trees) != 1:
        return None
    tree = trees[0]
    for identifier in tree.find_all(exp.Identifier):
        identifier.set("this", identifier.this.lower())
        identifier.set("quoted", False)
    _drop_table_aliases(tree)
    _drop_column_aliases(tree)
    for join in tree.find_all(exp.Join):
        if join.args.get("kind") == "INNER" or join.args.get("side"):
            join.set("kind", None)
    for ordered in tree.find_all(exp.Ordered):
        ordered.set("desc", bool(ordered.args.get("desc")))
    return tree.sql(dialect="sqlite", comments=False)


def _drop_table_aliases(tree: exp.Expr) -> None:
    tables = list(tree.find_all(exp.Table))
    occurrences = Counter(table.name for table in tables)
    names: dict[str, set[str]] = defaultdict(set)
    for table in tables:
        names[table.alias_or_name].add(table.name)
    for column in tree.find_all(exp.Column):
        meant = names.get(column.table, set())
        if len(meant) == 1 and occurrences[name := next(iter(meant))] == 1:
            column.set("table", exp.to_identifier(name, quoted=False))
    for source in tree.find_all(exp.Table, exp.Subquery):
        source.set("alias", None)


def _drop_column_aliases(tree: exp.Expr) -> None:
    for select in tree.find_all(exp.Select):
        meant = {e.alias: e.this for e in select.expressions if isinstance(e, exp.Alias)}
        for clause in ("group", "having", "order"):
            if meant and select.args.get(clause) is not None:
                for column in list(select.args[clause].find_all(exp.Column)):
                    if not column.table and column.name in meant:
                        column.replace(meant[column.name].copy())
    for alias in list(tree.find_all(exp.Alias)):
        alias.replace(alias.this)
