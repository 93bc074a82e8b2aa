"""Requests to change a fact, in CounterFact's layout (Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from molf.data.fields import filled_text, object_value, text_list
from molf.data.files import Record
from molf.errors import InputError
from molf.tasks.fact_metrics import KINDS

FIELDS = ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")


@dataclass(frozen=True)
class FactRequest:
    """One fact to be changed.

    Attributes:
        prompt: The rewrite prompt with the subject filled in.
        target_new: The new completion of the prompt.
        target_true: The true completion of the prompt.
        paraphrases: Prompts about the same fact in other words.
        neighbourhood: Prompts about other subjects, for which `target_true` stays true.
    """

    prompt: str
    target_new: str
    target_true: str
    paraphrases: tuple[str, ...]
    neighbourhood: tuple[str, ...]

    def prompts(self) -> dict[str, tuple[str, ...]]:
        """Return all prompts that are followed by the two targets, by kind."""
        return dict(zip(KINDS, ((self.prompt,), self.paraphrases, self.neighbourhood), strict=True))


@dataclass(frozen=True)
class Conflicts:
    """Numbers of edits that contradict each other.

    Attributes:
        prompts: Rewrite prompts with more than one new target.
        neighbours: Neighbourhood prompts that another request edits.
    """

    prompts: int
    neighbours: int

    def __bool__(self) -> bool:
        return bool(self.prompts or self.neighbours)


def find_conflicts(requests: Collection[FactRequest]) -> Conflicts:
    """Count the contradicting edits among some requests."""
    targets: dict[str, set[str]] = {}
    for request in requests:
        targets.setdefault(request.prompt, set()).add(request.target_new)
    return Conflicts(
        prompts=sum(len(found) > 1 for found in targets.values()),
        neighbours=sum(
            prompt in targets for request in requests for prompt in request.neighbourhood
        ),
    )


def parse_request(record: Record, where: str) -> FactRequest:
    """Check a record of the original CounterFact layout.

    Args:
        record: `requested_rewrite` {prompt, subject, target_new {str}, target_true {str}},
            `paraphrase_prompts`, `neighborhood_prompts`; further fields are not used.
        where: The source and number of the record, for messages.

    Raises:
        InputError: A field is absent or of the wrong kind.
    """
    fields = ("prompt", "subject", "target_new", "target_true")
    object_value(record, where, FIELDS)
    rewrite = object_value(record["requested_rewrite"], f"{where}: requested_rewrite", fields)
    prompt = filled_text(rewrite["prompt"], f"{where}: requested_rewrite.prompt")
    if prompt.count("{}") != 1:
        raise InputError(
            f"{where}: requested_rewrite.prompt must hold {{}} once, in the subject's place, "
            f"but is {prompt!r:.100}."
        )
    subject = filled_text(rewrite["subject"], f"{where}: requested_rewrite.subject").strip()
    return FactRequest(
        prompt=prompt.replace("{}", subject).rstrip(),
        target_new=_target(rewrite["target_new"], f"{where}: requested_rewrite.target_new"),
        target_true=_target(rewrite["target_true"], f"{where}: requested_rewrite.target_true"),
        paraphrases=_prompts(record["paraphrase_prompts"], f"{where}: paraphrase_prompts"),
        neighbourhood=_prompts(record["neighborhood_prompts"], f"{where}: neighborhood_prompts"),
    )


# A space is added between prompt and target: their own is stripped.
def _prompts(value: Any, where: str) -> tuple[str, ...]:
    return tuple(text.rstrip() for text in text_list(value, where))


def _target(value: Any, where: str) -> str:
    return filled_text(object_value(value, where, ("str",))["str"], f"{where}.str").strip()
