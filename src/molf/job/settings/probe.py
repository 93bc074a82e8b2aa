"""The options of `molf probe`: those of `molf train`, with a small memory by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from cyclopts import Parameter

from molf.core.options import ROUNDINGS, STATE_DTYPES, score_exclusions
from molf.errors import InputError
from molf.job.settings.ranges import POSITIVE
from molf.job.settings.settings import (
    MODEL,
    OPTIMIZATION,
    SCHEDULERS,
    WEIGHT_DTYPES,
    TrainSettings,
)
from molf.job.settings.short import NO_CHECKPOINTS, NO_MODEL, check_short, warn_of_unused

STEPS = 30


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProbeSettings(TrainSettings):
    """The options of `molf train`; these have other defaults."""

    dtype: Annotated[str, Parameter(choices=WEIGHT_DTYPES, group=MODEL)] = "bfloat16"
    """Type of the weights in the probe; bfloat16 takes half the memory of float32."""
    weight_rounding: Annotated[
        str | None,
        Parameter(choices=ROUNDINGS, group=OPTIMIZATION, show_default="stochastic for bfloat16"),
    ] = None
    """How bfloat16 weights are written: stochastic and nearest keep no lower halves."""
    state_dtype: Annotated[str, Parameter(choices=STATE_DTYPES, group=OPTIMIZATION)] = "8bit"
    """How the moments of weights are kept: 8bit (needs torchao), or float32."""
    optimizer_in_backward: Annotated[bool, Parameter(group=OPTIMIZATION)] = True
    """Update each layer in the backward pass, free its gradient; no clipping, no accumulation."""
    max_steps: Annotated[int | None, Parameter(group=OPTIMIZATION), POSITIVE] = STEPS
    """Number of steps of routing."""
    lr_scheduler_type: Annotated[
        str, Parameter(choices=SCHEDULERS, group=OPTIMIZATION, show_choices=False)
    ] = "constant_with_warmup"
    """How the learning rates fall; constant: as at the beginning of a long training."""

    def __post_init__(self) -> None:
        """Check every value and the method.

        Raises:
            InputError: An option is not allowed.

        Warns:
            UserWarning: Options were given that a probe does not use.
        """
        if self.method != "molf":
            raise InputError(
                f"Invalid method={self.method}: a probe compares full with LoRA in each layer, "
                "which only molf does. Leave method out."
            )
        check_short(self, "a probe")
        warn_of_unused(self, self._unused, "a probe")
        self.training  # noqa: B018 (raises where an option is wrong)

    @property
    def training(self) -> TrainSettings:
        """The options of the probe's steps: without those that small memory excludes."""
        options = vars(self) | NO_CHECKPOINTS | self._unused
        options["optimizer_in_backward"] = self._in_backward
        if self.max_steps is None:  # of a run's config.yaml
            options["max_steps"] = STEPS
        if self.dtype == "bfloat16" and self.weight_rounding is None:
            options["weight_rounding"] = "stochastic"
        return TrainSettings(**options)

    @property
    def _in_backward(self) -> bool:
        """Whether layers step in the backward pass, which a score that compares layers excludes."""
        return self.optimizer_in_backward and not score_exclusions(self.score)["score_of_layers"]

    @property
    def _unused(self) -> dict[str, Any]:
        """The defaults of options that have no effect, or exclude the small memory."""
        unused: dict[str, Any] = dict(NO_MODEL)
        if self.state_dtype == "8bit":
            unused["kernels"] = "eager"
        if self._in_backward:
            unused |= _IN_BACKWARD
            if (self.gradient_accumulation_steps or 1) > 1:
                unused["gradient_accumulation_steps"] = 1
        return unused


# Annotations are texts, which cyclopts would evaluate in this file; it lacks names of `settings`.
ProbeSettings.__init__.__annotations__ |= get_type_hints(ProbeSettings, include_extras=True)

# Options that steps in the backward pass exclude, and their defaults.
_IN_BACKWARD: dict[str, Any] = {
    "max_grad_norm": None,
    "nonfinite": "raise",
    "grad_accumulation_dtype": None,
}
