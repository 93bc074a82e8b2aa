"""A small invented world, and a base model that has learned its facts.

Both are shipped so that molf can be tried without a download: a language model (`BASE_PATH`)
trained only on the facts of `build_world()`, requests to change some of the facts, medical
multiple-choice questions, and questions to answer with SQL. This package imports only the standard
library.
"""

from pathlib import Path

from molf.world.build import build_world
from molf.world.counterfact import counterfact_records, counterfact_validation_records
from molf.world.documents import held_out_text, training_documents
from molf.world.drills import Drill
from molf.world.entities import Attribute, Entity, Fact, Relation, World
from molf.world.letters import letter_drills
from molf.world.med_questions import is_practised, med_namings, med_practice, med_records
from molf.world.sql_questions import (
    new_form_records,
    sql_groups,
    sql_practice,
    sql_records,
)

BASE_PATH = Path(__file__).parent / "base"
"""Directory of the shipped base model, a transformers checkpoint."""

__all__ = [
    "BASE_PATH",
    "Attribute",
    "Drill",
    "Entity",
    "Fact",
    "Relation",
    "World",
    "build_world",
    "counterfact_records",
    "counterfact_validation_records",
    "held_out_text",
    "is_practised",
    "letter_drills",
    "med_namings",
    "med_practice",
    "med_records",
    "new_form_records",
    "sql_groups",
    "sql_practice",
    "sql_records",
    "training_documents",
]
