"""The relations of the world's medicine, and how people put them into words and into questions.

They come in pairs that lead to the same kind of thing, so that the wording alone tells which of the
two is meant. The rules of `molf.world.relations` hold here too.
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
        questions=(
            "Which condition is treated with {}?",
            "What is {} prescribed for?",
            "A patient takes {}. What is the diagnosis?",
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
        questions=(
            "In which illness is {} contraindicated?",
            "Which diagnosis speaks against {}?",
            "A doctor refuses to give {}. Why?",
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
        questions=(
            "Which drug becomes stronger with {}?",
            "What acts more when {} is added?",
            "Beside {} the dose of which drug is lowered?",
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
        questions=(
            "Which medicine fails with {}?",
            "What is hindered when {} is added?",
            "Beside {} the dose of which drug is raised?",
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
        questions=(
            "What is a common side effect of {}?",
            "Which complaint do users of {} have?",
            "A patient starts on {}. What may follow?",
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
        questions=(
            "What is seen in {} toxicity?",
            "Which emergency does intoxication with {} cause?",
            "A child has eaten {}. What may follow?",
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
        questions=(
            "Which enzyme is inhibited by {}?",
            "What is the target of {}?",
            "Which protein does {} bind?",
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
        questions=(
            "Which catalyst metabolises {}?",
            "What terminates the action of {}?",
            "The half-life of {} depends on which protein?",
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
        questions=(
            "Which symptom comes first in {}?",
            "What is an early sign of {}?",
            "A patient has had {} for a day. What is found?",
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
        questions=(
            "Which finding marks advanced {}?",
            "What is a complication of {}?",
            "A patient has had {} for decades. What is found?",
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
        questions=(
            "Where does {} begin?",
            "Which organ is the seat of {}?",
            "A biopsy for {} is taken of what?",
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
        questions=(
            "Where does {} metastasise?",
            "Which organ is involved secondarily in {}?",
            "Follow-up of {} means imaging of what?",
        ),
    ),
)

# Relations that the base model has been asked about; of the others it has only read.
PRACTISED = frozenset(
    {"treats", "strengthens", "side_effect", "blocks", "first_symptom", "begins_in"}
)

# The subject that a question counts for, by the kinds of thing it asks about.
SUBJECTS = {
    ("drug", "condition"): "Medicine",
    ("drug", "drug"): "Pharmacology",
    ("drug", "symptom"): "Forensic Medicine",
    ("drug", "enzyme"): "Biochemistry",
    ("condition", "symptom"): "Pathology",
    ("condition", "organ"): "Anatomy",
}
