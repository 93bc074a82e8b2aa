"""Multiple-choice questions in MedMCQA's layout (Pal et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from molf.data.fields import filled_text, integer_value, optional_text
from molf.data.files import Record
from molf.tasks.questions import Question, QuestionKind, UnusableRecordError

LETTERS = ("A", "B", "C", "D")

OUT_OF_RANGE = "cop outside 0 to 3"
"""The reason to leave out a record whose `cop` is none of the four options."""

_OPTIONS = ("opa", "opb", "opc", "opd")
_UNLABELLED = -1  # stands in the Hub's test split in place of the answer


@dataclass(frozen=True, kw_only=True)
class MedQuestion(Question):
    """A question with four options, grouped by its subject.

    Attributes:
        options: The options, in order.
        right: Index of the right option.
    """

    options: tuple[str, ...]
    right: int

    @property
    def prompt(self) -> str:
        """The question and its options with their letters."""
        options = [f"{x}. {option}" for x, option in zip(LETTERS, self.options, strict=True)]
        return "\n".join([f"Question: {self.question}", *options, "Answer:"])

    @property
    def answer(self) -> str:
        """A space and the right letter."""
        return f" {LETTERS[self.right]}"


def parse_med_question(record: Record, where: str) -> MedQuestion:
    """Check a record of MedMCQA.

    Args:
        record: `question`, `opa` to `opd`, `cop` (0 to 3, the right one), `subject_name`; further
            fields are not used.
        where: The source and number of the record, for messages.

    Raises:
        InputError: A field is of the wrong kind, or the question is empty.
        UnusableRecordError: An option is missing, or no option is right.
    """
    question = filled_text(record["question"], f"{where}: question").strip()
    options = [optional_text(record.get(name), f"{where}: {name}") for name in _OPTIONS]
    subject = optional_text(record.get("subject_name"), f"{where}: subject_name")
    given = record.get("cop")
    right = _UNLABELLED if given is None else integer_value(given, f"{where}: cop")
    if not all(options):
        raise UnusableRecordError("missing option")
    if right == _UNLABELLED:
        raise UnusableRecordError("unlabelled")
    if right not in range(len(LETTERS)):
        raise UnusableRecordError(OUT_OF_RANGE)
    return MedQuestion(
        question=question, group=subject or "unknown", options=tuple(options), right=right
    )


MED = QuestionKind(
    default_data="openlifescienceai/medmcqa",
    evaluation_splits=("validation", "test"),  # the official test split is unlabelled
    fields=("question",),
    columns=(*_OPTIONS, "cop"),
    parse=parse_med_question,
)
