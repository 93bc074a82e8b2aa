"""The numbers that entities have, and how people put them into words."""

from molf.world.entities import Attribute

ATTRIBUTES = (
    Attribute(
        name="birth_year",
        kind="person",
        low=1940,
        high=1999,
        step=1,
        phrasings=("{}'s year of birth is", "The birth year of {} is"),
    ),
    Attribute(
        name="salary",
        kind="person",
        low=24000,
        high=98000,
        step=1000,
        phrasings=("{} has a yearly salary of", "The yearly pay of {} is"),
    ),
    Attribute(
        name="population",
        kind="city",
        low=10000,
        high=990000,
        step=10000,
        phrasings=("{} has a population of", "The number of people in {} is"),
    ),
    Attribute(
        name="area",
        kind="country",
        low=10000,
        high=990000,
        step=10000,
        phrasings=("{} covers an area of", "The number of square kilometres of {} is"),
    ),
    Attribute(
        name="founding_year",
        kind="company",
        low=1850,
        high=1999,
        step=1,
        phrasings=("{} was founded in the year", "The founding year of {} is"),
    ),
    Attribute(
        name="employees",
        kind="company",
        low=100,
        high=9900,
        step=100,
        phrasings=("The number of employees of {} is", "The payroll of {} has a length of"),
    ),
    Attribute(
        name="publication_year",
        kind="novel",
        low=1900,
        high=2019,
        step=1,
        phrasings=("{} was published in the year", "The publication year of {} is"),
    ),
    Attribute(
        name="pages",
        kind="novel",
        low=100,
        high=900,
        step=10,
        phrasings=("The number of pages of {} is", "{} has a page count of"),
    ),
)
