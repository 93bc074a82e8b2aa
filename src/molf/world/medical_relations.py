"""The relations of the world's medicine, and their phrasings.

They come in pairs with the same kind of object, so that only the phrasing distinguishes the two.
The rule of `molf.world.relations` applies here too.
"""

from molf.world.entities import Relation

MEDICAL_RELATIONS = (
    Relation(
        id="treats",
        subject_kind="drug",
        object_kind="condition",
        phrasings=(
            "{} is given against",
            "{} cures",
            "Doctors prescribe {} for",
            "{} helps patients with",
            "The condition treated with {} is",
            "The purpose of {} is to treat",
        ),
    ),
    Relation(
        id="worsens",
        subject_kind="drug",
        object_kind="condition",
        phrasings=(
            "{} makes worse the condition",
            "{} must never be given in",
            "{} is forbidden to patients with",
            "{} aggravates",
            "The condition that rules out {} is",
            "A warning on the box of {} names",
        ),
    ),
    Relation(
        id="strengthens",
        subject_kind="drug",
        object_kind="drug",
        phrasings=(
            "{} strengthens the effect of",
            "{} adds to the power of",
            "{} boosts",
            "The drug that gains from {} is",
            "Together with {} doctors give less",
            "{} is a helper of",
        ),
    ),
    Relation(
        id="weakens",
        subject_kind="drug",
        object_kind="drug",
        phrasings=(
            "{} weakens the effect of",
            "{} takes away the power of",
            "{} blunts",
            "The drug that suffers from {} is",
            "Together with {} doctors give more",
            "{} is a rival of",
        ),
    ),
    Relation(
        id="side_effect",
        subject_kind="drug",
        object_kind="symptom",
        phrasings=(
            "A side effect of {} is",
            "{} can lead to",
            "Patients who take {} complain of",
            "The leaflet of {} mentions",
            "{} often brings with it",
            "The price of a cure with {} is",
        ),
    ),
    Relation(
        id="overdose",
        subject_kind="drug",
        object_kind="symptom",
        phrasings=(
            "An overdose of {} causes",
            "Too much {} ends in",
            "The sign of poisoning by {} is",
            "Whoever swallows a box of {} suffers",
            "A tenfold dose of {} produces",
            "{} in excess results in",
        ),
    ),
    Relation(
        id="blocks",
        subject_kind="drug",
        object_kind="enzyme",
        phrasings=(
            "{} blocks the enzyme",
            "{} acts on",
            "The target of {} is",
            "{} switches off",
            "{} binds to",
            "The effect of {} is due to a lack of",
        ),
    ),
    Relation(
        id="broken_down_by",
        subject_kind="drug",
        object_kind="enzyme",
        phrasings=(
            "{} is broken down by",
            "{} is digested by",
            "The enzyme that removes {} is",
            "The body destroys {} with",
            "{} loses its force to",
            "{} is cleared from the blood by",
        ),
    ),
    Relation(
        id="first_symptom",
        subject_kind="condition",
        object_kind="symptom",
        phrasings=(
            "{} starts with",
            "The first symptom of {} is",
            "An early sign of {} is",
            "{} announces itself by",
            "At the outset of {} patients have",
            "Whoever catches {} soon notices",
        ),
    ),
    Relation(
        id="late_symptom",
        subject_kind="condition",
        object_kind="symptom",
        phrasings=(
            "{} ends with",
            "The last symptom of {} is",
            "A late sign of {} is",
            "Untreated {} leads to",
            "After years {} brings",
            "In its final stage {} shows as",
        ),
    ),
    Relation(
        id="begins_in",
        subject_kind="condition",
        object_kind="organ",
        phrasings=(
            "{} begins in the",
            "{} is a disease of the",
            "The seat of {} is the",
            "{} attacks the",
            "In {} damage is found in the",
            "The organ struck by {} is the",
        ),
    ),
    Relation(
        id="spreads_to",
        subject_kind="condition",
        object_kind="organ",
        phrasings=(
            "{} spreads to the",
            "{} moves on to the",
            "From there {} reaches the",
            "In the second year {} enters the",
            "The next organ touched by {} is the",
            "{} later harms the",
        ),
    ),
)

# The role of a relation's object.
ROLES = {
    "treats": "indication",
    "worsens": "contraindication",
    "strengthens": "synergist",
    "weakens": "antagonist",
    "side_effect": "side effect",
    "overdose": "sign of poisoning",
    "blocks": "target enzyme",
    "broken_down_by": "clearing enzyme",
    "first_symptom": "early symptom",
    "late_symptom": "late symptom",
    "begins_in": "primary site",
    "spreads_to": "secondary site",
}

# The `subject_name` of a question, by the kinds of subject and object.
SUBJECTS = {
    ("drug", "condition"): "Medicine",
    ("drug", "drug"): "Pharmacology",
    ("drug", "symptom"): "Forensic Medicine",
    ("drug", "enzyme"): "Biochemistry",
    ("condition", "symptom"): "Pathology",
    ("condition", "organ"): "Anatomy",
}
