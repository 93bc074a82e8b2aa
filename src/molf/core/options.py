"""The optimizer's options: words, defaults, what they exclude, and the libraries they need.

Imports no torch, so that the command line answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, NamedTuple

from molf.core.scores.registry import routing

ROUNDINGS = ("exact", "stochastic", "nearest")
"""How bfloat16 weights are written."""

STATE_DTYPES = ("float32", "8bit")
"""How moments are stored."""

GRADIENT_DTYPES = ("float32",)
"""How gradients of bfloat16 weights are accumulated."""

KERNELS = ("eager", "triton")
"""What computes the optimizer's step."""

KERNEL_TERMS = ("descent", "norm")
"""Terms of scores that the Triton kernels sum, one in a step."""

NONFINITE = ("raise", "skip")
"""Reactions of a step to an infinite or NaN gradient."""

WORDS: dict[str, tuple[str | None, ...]] = {
    "weight_rounding": (*ROUNDINGS, None),
    "state_dtype": STATE_DTYPES,
    "grad_accumulation_dtype": (*GRADIENT_DTYPES, None),
    "kernels": (*KERNELS, None),
    "nonfinite": NONFINITE,
}
"""The values of each option that takes words."""


class _TwoMessages(Exception):  # noqa: N818 (a base class of errors)
    """An error with a message for Python and one for the command line.

    Attributes:
        as_option: The message with the option as on the command line.
    """

    def __init__(self, as_keyword: str, as_option: str) -> None:
        super().__init__(as_keyword)
        self.as_option = as_option


class OptionError(_TwoMessages, ValueError):
    """An option has a value that is not allowed, or excludes another."""


class MissingLibraryError(_TwoMessages, ImportError):
    """An option needs a library that is not installed."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Storage and execution of an optimizer; `molf.AdamW` documents each as a keyword.

    Raises:
        OptionError: A word is unknown, or two options exclude each other.
    """

    weight_rounding: str | None = None
    state_dtype: str = "float32"
    grad_accumulation_dtype: str | None = None
    optimizer_in_backward: bool = False
    state_offload: bool = False
    kernels: str | None = None
    nonfinite: str = "raise"

    def __post_init__(self) -> None:
        """Check the words, and the options beside each other."""
        for name in WORDS:
            check_word(name, getattr(self, name))
        check_exclusions(self.as_keywords())

    @classmethod
    def of(cls, source: object) -> OptimizerOptions:
        """Return the options that are attributes of another object."""
        return OptimizerOptions(**{name: getattr(source, name) for name in OPTIONS})

    def as_keywords(self) -> dict[str, Any]:
        """Return the keywords of `molf.AdamW` and `MoLFAdamW`."""
        return {name: getattr(self, name) for name in OPTIONS}

    def check_libraries(self) -> None:
        """Check that the libraries that the options need are installed.

        Raises:
            MissingLibraryError: One is not.
        """
        for (name, value), (library, _) in _LIBRARIES.items():
            if getattr(self, name) == value and find_spec(library) is None:
                raise missing_library(name, value)

    def is_plain(self, dtype: str) -> bool:
        """Whether `torch.optim.AdamW` does the same for weights of this dtype, in as much memory.

        `grad_accumulation_dtype` changes nothing for float32 weights.
        """
        return (
            dtype == "float32"
            and self.state_dtype == "float32"
            and not self.optimizer_in_backward
            and not self.state_offload
            and self.kernels != "triton"
        )


OPTIONS = tuple(field.name for field in fields(OptimizerOptions))
"""The names of the options."""

_LIBRARIES = {
    ("state_dtype", "8bit"): ("torchao", ""),
    ("kernels", "triton"): ("triton", " (Linux)"),
}


class Exclusion(NamedTuple):
    """Two settings that exclude each other.

    Attributes:
        name: An option.
        beside: Another, or a setting of the training.
        reason: Why.
        change: The remedy.
    """

    name: str
    beside: str
    reason: str
    change: str = "Leave one of the two out."


_AT_ONCE = "each layer is updated as soon as its own gradient is complete"
_BEFORE_SUMS = "a layer would be updated before its gradients are summed over them"

EXCLUSIONS = (
    Exclusion("nonfinite", "optimizer_in_backward", f"{_AT_ONCE}, so no step can be skipped"),
    Exclusion("grad_accumulation_dtype", "optimizer_in_backward", f"{_AT_ONCE}; none accumulate"),
    Exclusion("gradient_accumulation_steps", "optimizer_in_backward", _AT_ONCE),
    Exclusion("max_grad_norm", "optimizer_in_backward", _AT_ONCE),
    Exclusion("optimizer_in_backward", "processes", _BEFORE_SUMS),
    Exclusion("optimizer_in_backward", "num_gpus", _BEFORE_SUMS),
    Exclusion("optimizer_in_backward", "shards", _BEFORE_SUMS),
    Exclusion("state_offload", "shards", "CPUOffloadPolicy of fully_shard keeps state on the host"),
    Exclusion("kernels", "shards", "the kernels use whole weights", "Leave kernels out."),
    Exclusion(
        "grad_accumulation_dtype",
        "shards",
        "fully_shard reduces each gradient in the dtype of its policy",
        "Load the model in float32, and compute in bfloat16 (--bf16, MixedPrecisionPolicy).",
    ),
    Exclusion(
        "grad_accumulation_dtype",
        "processes",
        "DDP keeps gradients in buckets of the parameter's dtype",
        "Leave grad_accumulation_dtype out, or load the model in float32.",
    ),
    Exclusion("score_of_layers", "optimizer_in_backward", f"it compares layers, and {_AT_ONCE}"),
    Exclusion("score_of_layers", "state_offload", "it compares layers, which take turns"),
    Exclusion(
        "kernels",
        "further_score",
        f"the kernels sum one of the terms {' and '.join(KERNEL_TERMS)}",
        "Leave kernels out, or give another score, such as epd.",
    ),
    Exclusion("kernels", "state_dtype", "the kernels keep float32 moments"),
    Exclusion("kernels", "state_offload", "the kernels go through all states at once"),
    Exclusion(
        "kernels",
        "adapter_of",
        "LoRA experts in a PEFT adapter take eager steps",
        "Leave kernels out.",
    ),
    Exclusion(
        "weight_rounding",
        "float32_weights",
        "there is nothing to round",
        "Give --dtype bfloat16, or leave weight_rounding out.",
    ),
)

# Values, beside None, False and 0, that exclude nothing.
_NEUTRAL: dict[str, Any] = {
    "state_dtype": "float32",
    "kernels": "eager",
    "nonfinite": "raise",
    "gradient_accumulation_steps": 1,
    "num_gpus": 1,
    "processes": 1,
    "shards": 0,
}


_SHOWN = {"score_of_layers": "score", "further_score": "score"}
_SHOWN_OPTION = {**_SHOWN, "shards": "fsdp"}


def check_word(name: str, value: Any) -> None:
    """Refuse a value that an option does not have.

    Raises:
        OptionError: With the values that it has.
    """
    allowed = WORDS[name]
    if value in allowed:
        return
    *others, last = (repr(word) if word else "None" for word in allowed)
    raise OptionError(
        f"Invalid {name}={value!r}. Must be {', '.join(others)} or {last}.",
        f"Invalid {name}={value!r}. Must be one of {', '.join(filter(None, allowed))}.",
    )


def check_exclusions(settings: Mapping[str, Any]) -> None:
    """Refuse settings that exclude each other.

    Args:
        settings: Options, and those settings of a training that `EXCLUSIONS` names and that are
            known; those left out exclude nothing.

    Raises:
        OptionError: With the reason, for the first two.
    """
    for name, beside, reason, change in EXCLUSIONS:
        if not (_excludes(name, settings) and _excludes(beside, settings)):
            continue
        first, second = ((key, settings[key]) for key in (name, beside))
        raise OptionError(
            f"{_as_keyword(*first)} is not possible with {_as_keyword(*second)}: {reason}. "
            f"{change}",
            f"Invalid {_as_option(*first)} with {_as_option(*second)}: {reason}. {change}",
        )


def score_exclusions(score: str) -> dict[str, str | None]:
    """Return the settings of `check_exclusions` that a score sets.

    Args:
        score: `MoLFConfig.score`.

    Raises:
        ValueError: The score is unknown.
    """
    chosen = routing(score)
    terms = [term.name for term in chosen.score.terms]
    is_in_kernels = len(terms) == 1 and terms[0] in KERNEL_TERMS
    return {
        "score_of_layers": score if chosen.rule.compares_layers else None,
        "further_score": None if is_in_kernels else score,
    }


def missing_library(name: str, value: str) -> MissingLibraryError:
    """Return the error for an option whose library is not installed; it names the extra."""
    library, where = _LIBRARIES[name, value]
    install = f"pip install 'molf[{library}]'{where}, or leave {name} out."
    return MissingLibraryError(
        f"{name}={value!r} needs {library}: {install}",
        f"Invalid {name}={value}: it needs {library}. Install it with {install}",
    )


def _excludes(name: str, settings: Mapping[str, Any]) -> bool:
    return settings.get(name) not in (None, False, 0, _NEUTRAL.get(name))


def _as_keyword(name: str, value: Any) -> str:
    name = _SHOWN.get(name, name)
    if name in ("processes", "shards"):
        return f"{value} processes" if name == "processes" else "sharded parameters"
    return f"{name}={value!r}"


def _as_option(name: str, value: Any) -> str:
    if name == "adapter_of":
        return f"method={value}"
    if name == "float32_weights":
        return "dtype=float32"
    return name if value is True else f"{_SHOWN_OPTION.get(name, name)}={value}"
