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
from molf.job.settings.short import NO_MODEL, check_short, leave_out

STEPS = 30


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProbeSettings(TrainSettings):
    """The options of `molf train`; these have other defaults."""

    __slots__ = ("_given",)  # outside of `vars`, which are the options

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
        """Check every value and the method, and leave out options that small memory excludes.

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
        self._set("_given", dict(vars(self)))
        check_short(self, "a probe")
        if self.max_steps is None:  # of a run's config.yaml
            self._set("max_steps", STEPS)
        if self.dtype == "bfloat16" and self.weight_rounding is None:
            self._set("weight_rounding", "stochastic")
        if self.optimizer_in_backward and score_exclusions(self.score)["score_of_layers"]:
            self._set("optimizer_in_backward", False)  # the score compares layers
        self._leave_out()
        super().__post_init__()

    def __setstate__(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Restore a copy; the default sets attributes, which a frozen dataclass refuses."""
        for values in state:
            for name, value in values.items():
                self._set(name, value)

    @property
    def given(self) -> dict[str, Any]:
        """All options by name, before those without effect were left out."""
        return dict(self._given)  # type: ignore[attr-defined]

    def _leave_out(self) -> None:
        """Set options to their defaults that have no effect, or exclude the small memory."""
        unused: dict[str, Any] = dict(NO_MODEL)
        if self.state_dtype == "8bit":
            unused["kernels"] = "eager"
        if self.optimizer_in_backward:
            unused |= _IN_BACKWARD
            if (self.gradient_accumulation_steps or 1) > 1:
                unused["gradient_accumulation_steps"] = 1
        leave_out(self, unused, "a probe")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen


# Annotations are texts, which cyclopts would evaluate in this file; it lacks names of `settings`.
ProbeSettings.__init__.__annotations__ |= get_type_hints(ProbeSettings, include_extras=True)

# Options that steps in the backward pass exclude, and their defaults.
_IN_BACKWARD: dict[str, Any] = {
    "max_grad_norm": None,
    "nonfinite": "raise",
    "grad_accumulation_dtype": None,
}
