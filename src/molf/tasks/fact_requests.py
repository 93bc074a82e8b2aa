"""Requests to change a fact, in CounterFact's layout (Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from molf.errors import InputError
from molf.tasks.fact_metrics import KINDS
from molf.tasks.fields import filled_text, object_value, text_list
from molf.tasks.files import Record

FIELDS = ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")


@dataclass(frozen=True)
class FactRequest:
    """One fact to be changed.

    Attributes:
        prompt: The rewrite prompt with the subject filled in.
        target_new: What shall follow it.
        target_true: What follows it in the world.
        paraphrases: Prompts that ask the same in other words.
        neighbourhood: Prompts about other subjects of which `target_true` stays true.
    """

    prompt: str
    target_new: str
    target_true: str
    paraphrases: tuple[str, ...]
    neighbourhood: tuple[str, ...]

    def prompts(self) -> dict[str, tuple[str, ...]]:
        """All prompts that the two targets are compared after, by kind."""
        return dict(zip(KINDS, ((self.prompt,), self.paraphrases, self.neighbourhood), strict=True))


@dataclass(frozen=True)
class Conflicts:
    """Edits that cannot all hold.

    Attributes:
        prompts: Rewrite prompts with more than one new target.
        neighbours: Neighbourhood prompts, which shall stay as they are, that another request edits.
    """

    prompts: int
    neighbours: int

    def __bool__(self) -> bool:
        return bool(self.prompts or self.neighbours)


def find_conflicts(requests: Collection[FactRequest]) -> Conflicts:
    """Count the edits among some requests that contradict each other."""
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
    subject = filled_text(rewrite["subject"], f"{where}: requested_rewrite.subject")
    return FactRequest(
        prompt=prompt.replace("{}", subject),
        target_new=_target(rewrite["target_new"], f"{where}: requested_rewrite.target_new"),
        target_true=_target(rewrite["target_true"], f"{where}: requested_rewrite.target_true"),
        paraphrases=tuple(text_list(record["paraphrase_prompts"], f"{where}: paraphrase_prompts")),
        neighbourhood=tuple(
            text_list(record["neighborhood_prompts"], f"{where}: neighborhood_prompts")
        ),
    )


def _target(value: Any, where: str) -> str:
    # The space that joins it to the prompt is ours, so a target brings none of its own.
    return filled_text(object_value(value, where, ("str",))["str"], f"{where}.str").strip()
