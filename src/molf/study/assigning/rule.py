"""How the assignment of a method hybrid is made for each trial.

By a probe, by shape, by patterns, or drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from molf.core.assignment.patterns import Patterns
from molf.errors import InputError
from molf.job.advice.choices import CHOICES, check_chosen
from molf.job.settings.probe import STEPS
from molf.study.values import StudyFileError, number, reject_unknown, text, truth, whole_number

WINS, SHAPE = CHOICES[0], "shape"
_BY = (*CHOICES, SHAPE)
_KEYS = ("of", "by", "full", "share", "random", "steps")


@dataclass(frozen=True)
class Rule:
    """How the assignment of a trial is made.

    Attributes:
        of: The method molf of the study whose experts and score decide. A probe with its options
            runs at the rates and the seed of the trial.
        by: `wins` or `score`, as in `molf advise`; or `shape`: from shapes, scalings and rates
            alone, without a probe.
        full: Patterns of the layers in full, instead of a probe. The others get the LoRA expert of
            the method.
        share: Give `full` to this share of the routed layers, those where its score leads most.
        random: Draw other layers with as many weights in full instead, by the seed of the trial.
        steps: Steps of the probe.
    """

    of: str
    by: str = WINS
    share: float | None = None
    random: bool = False
    steps: int = STEPS
    full: tuple[str, ...] = ()

    @property
    def has_probe(self) -> bool:
        """Whether it needs a probe."""
        return self.by != SHAPE and not self.full

    def as_values(self) -> dict[str, Any]:
        """Return the attributes as JSON values."""
        values = asdict(self)
        full = values.pop("full")
        # Records of earlier studies have no such key.
        return {**values, "full": list(full)} if full else values

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Rule:
        """Return the rule of the values of `as_values`."""
        return cls(**{**values, "full": tuple(values.get("full", ()))})

    def __str__(self) -> str:
        """The rule in a few words, such as `random like wins of epd`."""
        if self.full:
            found = f"full: {', '.join(self.full)}"
        elif self.share is not None:
            found = f"the {100 * self.share:g}% of layers that lead most by {self.of}"
        else:
            found = f"{self.by} of {self.of}"
        return f"random like {found}" if self.random else found


def read_rule(content: Mapping[str, Any], where: str) -> Rule:
    """Return the rule of a mapping in a study file.

    Args:
        content: The entry `assignment` of a method.
        where: Its place in the file, for messages.

    Raises:
        StudyFileError: A name is unknown, or a value is wrong or without effect.
    """
    reject_unknown(content, _KEYS, where)
    if content.get("of") is None:
        raise StudyFileError(f"{where}: of is missing. Give the name of a method molf.")
    of = text(content["of"], f"{where}, of")
    by = text(content.get("by", WINS), f"{where}, by")
    if by not in _BY:
        raise StudyFileError(f"{where}: Invalid by={by!r}. Must be one of {', '.join(_BY)}.")
    share = None if content.get("share") is None else number(content["share"], f"{where}, share")
    full = _patterns(content.get("full"), f"{where}, full")
    if by == SHAPE or full:
        without = "full" if full else "by=shape"
        names = ("by", "share", "steps") if full else ("share", "steps")
        for name in names:
            if content.get(name) is not None:
                raise StudyFileError(f"{where}: {name} has no effect with {without}. Leave it out.")
    else:
        try:
            check_chosen(by, share)
        except InputError as error:
            raise StudyFileError(f"{where}: {error}") from error
    return Rule(
        of=of,
        by=by,
        share=share,
        random=truth(content.get("random", False), f"{where}: Invalid random"),
        steps=whole_number(content.get("steps", STEPS), f"{where}, steps", least=2),
        full=full,
    )


def _patterns(given: Any, where: str) -> tuple[str, ...]:
    """Return the patterns of the layers in full; empty without any."""
    if given is None:
        return ()
    try:
        return Patterns.of({"full": given}).rules[0].patterns
    except ValueError as error:
        raise StudyFileError(f"{where}: {error}") from error
