"""Templates of questions about tables, each with the query that answers it.

The fields come from the tables of `molf.world.tables`: {table}, the words {row} and {rows} for its
rows, a text column {c} and a number column {n}, and their names as words, {c_words} and {n_words}.
{x}, {v} and {k} are a name, a value of {c} and a value of {n} that occur. In forms of two tables,
{c} contains names of {other}, which has {other_rows}, the text column {d} and the number column
{m}.
"""

from dataclasses import dataclass

BASIC = "basic SQL"
AGGREGATION = "aggregation"
JOIN = "single join"
SUBQUERIES = "subqueries"
WINDOWS = "window functions"
SETS = "set operations"

COMPLEXITIES = {
    BASIC: "basic SQL with a simple select statement",
    AGGREGATION: "aggregation functions (COUNT, SUM, AVG, MIN, MAX, etc.), and HAVING clause",
    JOIN: "only one join (specify inner, outer, cross)",
    SUBQUERIES: "subqueries, including correlated and nested subqueries",
    WINDOWS: "window functions (e.g., ROW_NUMBER, LEAD, LAG, RANk, NTILE, PERCENT_RANK, etc.) "
    "with partitioning and ordering",
    SETS: "set operations (UNION, INTERSECT, EXCEPT)",
}
"""The classes of complexity, with Gretel's descriptions."""


@dataclass(frozen=True)
class QueryForm:
    """A template of a question about one table or two.

    Attributes:
        name: Unique among the forms.
        complexity: One of `COMPLEXITIES`.
        question: Template of the question.
        query: Template of the query.
        explanation: Template of a sentence that explains the query.
        practised: Whether base models practise it, on some tables.
    """

    name: str
    complexity: str
    question: str
    query: str
    explanation: str
    practised: bool = False

    @property
    def joined(self) -> bool:
        """Whether the query joins two tables."""
        return "{other}" in self.query

    def uses(self, field: str) -> bool:
        """Return whether the question or the query contains a field."""
        return f"{{{field}}}" in self.question + self.query


FORMS = (
    QueryForm(
        "number of one",
        BASIC,
        "What is the {n_words} of '{x}'?",
        "SELECT {n} FROM {table} WHERE name = '{x}';",
        "Looks up the {n_words} in the row of {x}.",
        practised=True,
    ),
    QueryForm(
        "text of one",
        BASIC,
        "What is the {c_words} of '{x}'?",
        "SELECT {c} FROM {table} WHERE name = '{x}';",
        "Looks up the {c_words} in the row of {x}.",
        practised=True,
    ),
    QueryForm(
        "equal",
        BASIC,
        "List the {rows} whose {c_words} is '{v}'.",
        "SELECT name FROM {table} WHERE {c} = '{v}';",
        "Keeps the rows whose {c_words} is {v}.",
        practised=True,
    ),
    QueryForm(
        "not equal",
        BASIC,
        "List the {rows} whose {c_words} is not '{v}'.",
        "SELECT name FROM {table} WHERE {c} <> '{v}';",
        "Keeps the rows whose {c_words} is not {v}.",
        practised=True,
    ),
    QueryForm(
        "at least",
        BASIC,
        "List the {rows} with a {n_words} of at least {k}.",
        "SELECT name FROM {table} WHERE {n} >= {k};",
        "Keeps the rows with a {n_words} of {k} or more.",
        practised=True,
    ),
    QueryForm(
        "at most",
        BASIC,
        "List the {rows} with a {n_words} of at most {k}.",
        "SELECT name FROM {table} WHERE {n} <= {k};",
        "Keeps the rows with a {n_words} of {k} or less.",
        practised=True,
    ),
    QueryForm(
        "sorted up",
        BASIC,
        "List all {rows} by {n_words}, smallest first.",
        "SELECT name FROM {table} ORDER BY {n};",
        "Sorts the rows by {n_words}.",
        practised=True,
    ),
    QueryForm(
        "sorted down",
        BASIC,
        "List all {rows} by {n_words}, largest first.",
        "SELECT name FROM {table} ORDER BY {n} DESC;",
        "Sorts the rows by {n_words}, in descending order.",
        practised=True,
    ),
    QueryForm(
        "largest",
        BASIC,
        "Which {row} has the largest {n_words}?",
        "SELECT name FROM {table} ORDER BY {n} DESC LIMIT 1;",
        "Sorts the rows by {n_words} and takes the last one.",
        practised=True,
    ),
    QueryForm(
        "two conditions",
        BASIC,
        "List the {rows} whose {c_words} is '{v}' and whose {n_words} is at least {k}.",
        "SELECT name FROM {table} WHERE {c} = '{v}' AND {n} >= {k};",
        "Keeps the rows that meet both conditions.",
    ),
    QueryForm(
        "one condition of two",
        BASIC,
        "List the {rows} whose {c_words} is '{v}' or whose {n_words} is at least {k}.",
        "SELECT name FROM {table} WHERE {c} = '{v}' OR {n} >= {k};",
        "Keeps the rows that meet one of the conditions.",
    ),
    QueryForm(
        "count equal",
        AGGREGATION,
        "How many {rows} have the {c_words} '{v}'?",
        "SELECT COUNT(*) FROM {table} WHERE {c} = '{v}';",
        "Counts the rows whose {c_words} is {v}.",
        practised=True,
    ),
    QueryForm(
        "average",
        AGGREGATION,
        "What is the average {n_words} of the {rows}?",
        "SELECT AVG({n}) FROM {table};",
        "Averages the {n_words} over all rows.",
        practised=True,
    ),
    QueryForm(
        "total",
        AGGREGATION,
        "What is the total {n_words} of the {rows}?",
        "SELECT SUM({n}) FROM {table};",
        "Adds up the {n_words} of all rows.",
        practised=True,
    ),
    QueryForm(
        "maximum",
        AGGREGATION,
        "What is the maximum {n_words} of the {rows}?",
        "SELECT MAX({n}) FROM {table};",
        "Takes the greatest {n_words}.",
        practised=True,
    ),
    QueryForm(
        "count each",
        AGGREGATION,
        "How many {rows} are there for each {c_words}?",
        "SELECT {c}, COUNT(*) FROM {table} GROUP BY {c};",
        "Groups the rows by {c_words} and counts them.",
        practised=True,
    ),
    QueryForm(
        "average each",
        AGGREGATION,
        "What is the average {n_words} of the {rows} for each {c_words}?",
        "SELECT {c}, AVG({n}) FROM {table} GROUP BY {c};",
        "Groups the rows by {c_words} and averages the {n_words}.",
    ),
    QueryForm(
        "groups of several",
        AGGREGATION,
        "Which {c_words} belongs to more than one {row}?",
        "SELECT {c} FROM {table} GROUP BY {c} HAVING COUNT(*) > 1;",
        "Groups the rows by {c_words} and keeps groups of several rows.",
    ),
    QueryForm(
        "number beside",
        JOIN,
        "Show each {row} with the {m_words} of its {c_words}.",
        "SELECT {table}.name, {m} FROM {table} JOIN {other} ON {c} = {other}.name;",
        "Joins {table} and {other} on the {c_words}.",
    ),
    QueryForm(
        "text beside",
        JOIN,
        "Show each {row} with the {d_words} of its {c_words}.",
        "SELECT {table}.name, {d} FROM {table} JOIN {other} ON {c} = {other}.name;",
        "Joins {table} and {other} on the {c_words}.",
    ),
    QueryForm(
        "number of the other",
        JOIN,
        "What is the {m_words} of the {c_words} of '{x}'?",
        "SELECT {m} FROM {table} JOIN {other} ON {c} = {other}.name WHERE {table}.name = '{x}';",
        "Joins {table} and {other} on the {c_words} and keeps the row of {x}.",
    ),
    QueryForm(
        "condition on the other",
        JOIN,
        "List the {rows} with a {m_words} of their {c_words} of at least {j}.",
        "SELECT {table}.name FROM {table} JOIN {other} ON {c} = {other}.name WHERE {m} >= {j};",
        "Joins {table} and {other} on the {c_words} and keeps rows by {m_words}.",
    ),
    QueryForm(
        "above average",
        SUBQUERIES,
        "Which {rows} have a {n_words} above the average?",
        "SELECT name FROM {table} WHERE {n} > (SELECT AVG({n}) FROM {table});",
        "Compares the {n_words} of each row with the average of all rows.",
    ),
    QueryForm(
        "same as",
        SUBQUERIES,
        "Which {rows} have the same {c_words} as '{x}'?",
        "SELECT name FROM {table} WHERE {c} = (SELECT {c} FROM {table} WHERE name = '{x}');",
        "Finds the {c_words} of {x} and keeps the rows that have it.",
    ),
    QueryForm(
        "no less than",
        SUBQUERIES,
        "Which {rows} have no smaller {n_words} than '{x}'?",
        "SELECT name FROM {table} WHERE {n} >= (SELECT {n} FROM {table} WHERE name = '{x}');",
        "Finds the {n_words} of {x} and keeps the rows that reach it.",
    ),
    QueryForm(
        "rank",
        WINDOWS,
        "Give the {rows} ranks by {n_words}.",
        "SELECT name, RANK() OVER (ORDER BY {n}) FROM {table};",
        "Numbers the rows in the order of the {n_words}.",
    ),
    QueryForm(
        "rank within",
        WINDOWS,
        "Give the {rows} ranks by {n_words} within each {c_words}.",
        "SELECT name, RANK() OVER (PARTITION BY {c} ORDER BY {n}) FROM {table};",
        "Numbers the rows of each {c_words} in the order of the {n_words}.",
    ),
    QueryForm(
        "running total",
        WINDOWS,
        "Show the {rows} with the running total of the {n_words}.",
        "SELECT name, SUM({n}) OVER (ORDER BY {n}) FROM {table};",
        "Adds up the {n_words} in its order, row by row.",
    ),
    QueryForm(
        "average within",
        WINDOWS,
        "Show each {row} beside the average {n_words} within its {c_words}.",
        "SELECT name, AVG({n}) OVER (PARTITION BY {c}) FROM {table};",
        "Puts the average {n_words} of its {c_words} beside each row.",
    ),
    QueryForm(
        "either",
        SETS,
        "List the names of all {rows} and all {other_rows}.",
        "SELECT name FROM {table} UNION SELECT name FROM {other};",
        "Puts the names of both tables together.",
    ),
    QueryForm(
        "without",
        SETS,
        "Which {other_rows} are the {c_words} of no {row}?",
        "SELECT name FROM {other} EXCEPT SELECT {c} FROM {table};",
        "Takes the names in {table} away from those in {other}.",
    ),
)
