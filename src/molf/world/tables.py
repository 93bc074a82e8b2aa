"""The tables of the world: kinds of entities with their columns."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a row for each entity of a kind; the first column is `name`.

    Attributes:
        name: Name of the table, and word for several rows.
        row: Word for one row.
        kind: Kind of the entities.
        domain: Subject of the table, for the records.
        texts: The relation that fills each text column, by the column's name.
        numbers: Number columns, named like the attributes that fill them.
    """

    name: str
    row: str
    kind: str
    domain: str
    texts: Mapping[str, str]
    numbers: tuple[str, ...]


TABLES = (
    Table(
        name="people",
        row="person",
        kind="person",
        domain="census",
        texts={"city": "P551", "company": "P108", "sport": "P641"},
        numbers=("birth_year", "salary"),
    ),
    Table(
        name="cities",
        row="city",
        kind="city",
        domain="geography",
        texts={"country": "P17", "river": "P206"},
        numbers=("population",),
    ),
    Table(
        name="countries",
        row="country",
        kind="country",
        domain="politics",
        texts={"capital": "P36", "language": "P37", "currency": "P38"},
        numbers=("area",),
    ),
    Table(
        name="companies",
        row="company",
        kind="company",
        domain="business",
        texts={"city": "P159", "industry": "P452"},
        numbers=("founding_year", "employees"),
    ),
    Table(
        name="novels",
        row="novel",
        kind="novel",
        domain="literature",
        texts={"genre": "P136", "language": "P407"},
        numbers=("publication_year", "pages"),
    ),
    Table(
        name="drugs",
        row="drug",
        kind="drug",
        domain="pharmacy",
        texts={"target": "blocks", "danger": "side_effect"},
        numbers=("dose", "price"),
    ),
)

# Text columns that contain names of another table.
REFERENCES = {
    ("people", "city"): "cities",
    ("people", "company"): "companies",
    ("cities", "country"): "countries",
    ("countries", "capital"): "cities",
    ("companies", "city"): "cities",
}
