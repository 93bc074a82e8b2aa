"""An allow list of SQL actions; SQLite calls it while it compiles a statement.

This module runs in the worker and imports only the standard library.
"""

from __future__ import annotations

import sqlite3

# SQLite's built-in functions that compute a value from values, from its documentation
# (lang_corefunc, lang_aggfunc, windowfunctions, lang_datefunc, lang_mathfunc, json1). All others
# are denied, above all load_extension, fts3_tokenizer (exposes pointers), readfile, writefile and
# edit (of SQLite's shell) and functions of future versions.
_VALUE_FUNCTIONS = """
abs char coalesce concat concat_ws format glob hex ifnull iif instr last_insert_rowid length
changes total_changes like likelihood likely unlikely lower ltrim max min nullif octet_length
printf quote random randomblob replace round rtrim sign soundex substr substring trim typeof
unhex unicode unistr unistr_quote upper zeroblob if match regexp
sqlite_version sqlite_source_id
avg count group_concat string_agg sum total median percentile percentile_cont percentile_disc
row_number rank dense_rank percent_rank cume_dist ntile lag lead first_value last_value
nth_value
date time datetime julianday unixepoch strftime timediff current_date current_time
current_timestamp
acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log log10
log2 mod pi pow power radians sin sinh sqrt tan tanh trunc
json jsonb json_array jsonb_array json_array_length json_error_position json_extract
jsonb_extract json_insert jsonb_insert json_object jsonb_object json_patch jsonb_patch
json_pretty json_quote json_remove jsonb_remove json_replace jsonb_replace json_set jsonb_set
json_type json_valid json_array_insert jsonb_array_insert
json_group_array jsonb_group_array json_group_object jsonb_group_object -> ->>
"""

# Called by SQLite itself for ALTER TABLE; statements cannot call them.
_ALTER_FUNCTIONS = """
sqlite_rename_table sqlite_rename_column sqlite_rename_test sqlite_rename_quotefix
sqlite_drop_column sqlite_fail sqlite_drop_constraint sqlite_add_constraint
"""

_FUNCTIONS = frozenset((_VALUE_FUNCTIONS + _ALTER_FUNCTIONS).split())

_CHANGE_ROWS = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE})

# SQLITE_CREATE_TABLE, SQLITE_DROP_TEMP_VIEW and so on, but not SQLITE_CREATE_VTABLE: a virtual
# table runs code of its module.
_CHANGE_SCHEMA = frozenset(
    [sqlite3.SQLITE_ALTER_TABLE]
    + [
        getattr(sqlite3, f"SQLITE_{change}_{temporary}{kind}")
        for change in ("CREATE", "DROP")
        for temporary in ("", "TEMP_")
        for kind in ("INDEX", "TABLE", "TRIGGER", "VIEW")
    ]
)

# Denied: ATTACH (VACUUM needs it too), DETACH, PRAGMA (also as a table-valued function), virtual
# tables, and actions of future versions.
_OTHER = frozenset(
    {
        sqlite3.SQLITE_ANALYZE,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_RECURSIVE,
        sqlite3.SQLITE_REINDEX,
        sqlite3.SQLITE_SAVEPOINT,
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_TRANSACTION,
    }
)

_DENIED_TABLES = frozenset({"dbstat", "sqlite_dbpage", "sqlite_stmt"})  # show or write raw pages


class Authorizer:
    """Allows or denies each action of a statement and records the statement's changes.

    Attributes:
        denied: Whether an action has been denied.
        changed_table: The table whose rows the statement changes, as (database, table); tables
            changed by triggers and SQLite's internal tables are not recorded.
        changes_schema: Whether a statement creates, alters or drops a table, view, index or
            trigger.
    """

    def __init__(self) -> None:
        self.denied = False
        self.begin_statement()

    def begin_statement(self) -> None:
        """Reset the recorded changes."""
        self.changed_table: tuple[str, str] | None = None
        self.changes_schema = False

    def __call__(
        self,
        action: int,
        first: str | None,
        second: str | None,
        database: str | None,
        trigger: str | None,
    ) -> int:
        """Allow or deny an action for SQLite; the arguments' meaning depends on the action."""
        if self._allows(action, first, second):
            if _is_bookkeeping(first):
                pass  # allowed, but no change of the statement
            elif action in _CHANGE_SCHEMA:
                self.changes_schema = True
            elif action in _CHANGE_ROWS and trigger is None and first and database:
                self.changed_table = (database, first)
            return sqlite3.SQLITE_OK
        self.denied = True
        return sqlite3.SQLITE_DENY

    @staticmethod
    def _allows(action: int, first: str | None, second: str | None) -> bool:
        if action == sqlite3.SQLITE_FUNCTION:
            return (second or "").lower() in _FUNCTIONS
        if action == sqlite3.SQLITE_READ:
            table = (first or "").lower()
            return table not in _DENIED_TABLES and not table.startswith("pragma_")
        return action in _OTHER or action in _CHANGE_ROWS or action in _CHANGE_SCHEMA


def _is_bookkeeping(name: str | None) -> bool:
    """Return whether only SQLite itself writes to a table.

    SQLite requests actions on internal tables while it compiles any statement: reading json_each
    requests an update of sqlite_master, and ANALYZE creates sqlite_stat1. Statements cannot change
    sqlite_master themselves. Users may change sqlite_sequence, to reset counters.
    """
    lower = (name or "").lower()
    return lower.startswith("sqlite_") and lower != "sqlite_sequence"
