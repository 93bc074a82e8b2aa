"""The rule of a trial's assignment, and its part in the trial's identity."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

from molf.job.settings.probe import ProbeSettings
from molf.job.settings.settings import TrainSettings
from molf.study.assigning.rule import Rule
from molf.study.definition import Point, rate_options
from molf.study.identity import settings_key


@dataclass(frozen=True)
class TrialRule:
    """The rule by which the assignment of a planned trial is made, with the options of its probe.

    Attributes:
        rule: The rule of its method.
        routed: The settings of the rule's method molf in the trial's cell, with its seed and part
            and without rates.
    """

    rule: Rule
    routed: TrainSettings

    def identity(self, point: Point | None) -> list[Any]:
        """Return the values that the assignment depends on, as JSON values.

        Args:
            point: The rates; None if a sampler draws them.
        """
        settings = self.routed if point is None else self.routed_at(point)
        return [self.rule.as_values(), settings_key(settings)]

    def routed_at(self, point: Point) -> TrainSettings:
        """Return the settings of the method molf at these rates."""
        rates: dict[str, Any] = dict(rate_options(point))
        return replace(self.routed, **rates)

    def probe_at(self, point: Point, **place: Any) -> ProbeSettings:
        """Return the options of the probe at these rates.

        It has the storage of the trial, and rates that do not fall, as `molf probe`.

        Args:
            point: The rates.
            place: Options of its directory.

        Raises:
            InputError: A probe cannot have them.
        """
        own = {"max_steps": self.rule.steps, "lr_scheduler_type": "constant_with_warmup"}
        with warnings.catch_warnings():
            # Options of the model that a probe does not save.
            warnings.filterwarnings("ignore", message="Without effect in a probe")
            return ProbeSettings(**{**vars(self.routed_at(point)), **own, **place})
