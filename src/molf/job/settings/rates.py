"""The options of `molf lr`: those of `molf train`, for a short sweep of rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from cyclopts import Parameter

from molf.errors import InputError
from molf.job.settings.ranges import POSITIVE
from molf.job.settings.settings import OPTIMIZATION, TrainSettings
from molf.job.settings.short import NO_CHECKPOINTS, NO_MODEL, check_short, warn_of_unused

STEPS = 120
LEAST_STEPS = 20
LOWEST, HIGHEST = 1e-6, 1.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RateSettings(TrainSettings):
    """The options of `molf train`; rates, schedule, checkpoints, evaluations have no effect."""

    max_steps: Annotated[int | None, Parameter(group=OPTIMIZATION), POSITIVE] = STEPS
    """Most steps of a sweep, over which the rate grows; a sweep ends where the loss diverges."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: An option is not allowed.

        Warns:
            UserWarning: Options were given that a range test does not use.
        """
        check_short(self, "a range test")
        if self.max_steps is not None and 0 < self.max_steps < LEAST_STEPS:
            raise InputError(
                f"Invalid max_steps={self.max_steps} for a range test. Must be at least "
                f"{LEAST_STEPS}."
            )
        warn_of_unused(self, _UNUSED, "a range test")
        self.training  # noqa: B018 (raises where an option is wrong)

    @property
    def training(self) -> TrainSettings:
        """The options of the sweeps: without those that have no effect."""
        options = vars(self) | NO_CHECKPOINTS | _OWN | _UNUSED
        if self.max_steps is None:  # of a run's config.yaml
            options["max_steps"] = STEPS
        return TrainSettings(**options)


# Annotations are texts, which cyclopts would evaluate in this file; it lacks names of `settings`.
RateSettings.__init__.__annotations__ |= get_type_hints(RateSettings, include_extras=True)

# Without a warning, because every recipe has them: the rate follows no schedule, each step is
# logged, and a loss that is not finite ends the sweep.
_OWN: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "logging_steps": 1,
    "nonfinite": "raise",
    "num_train_epochs": None,
}
_UNUSED: dict[str, Any] = {
    **NO_MODEL,
    "learning_rate": None,
    "lora_learning_rate": None,
    "max_time": None,
    "eval_strategy": None,
    "eval_steps": None,
    "validation_data": None,
    "early_stopping_patience": None,
    "report_to": ("none",),
}


def check_range(lowest: float, highest: float) -> None:
    """Check the rates between which a sweep goes.

    Raises:
        InputError: They are not positive and finite, or less than a factor of 10 apart.
    """
    for name, rate in (("from", lowest), ("to", highest)):
        if not POSITIVE.allows(rate):
            raise InputError(f"Invalid {name}={rate:g}. Must be {POSITIVE.text}.")
    if highest < 10 * lowest:
        raise InputError(
            f"Invalid from={lowest:g} with to={highest:g}: a range test covers a factor of 10 or "
            "more."
        )
