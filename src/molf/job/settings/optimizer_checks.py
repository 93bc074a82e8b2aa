"""Checks of the optimizer's options in a training."""

from __future__ import annotations

from typing import Any

from molf.core.options import (
    MissingLibraryError,
    OptionError,
    check_exclusions,
    score_exclusions,
)
from molf.errors import InputError
from molf.job.settings.defaults import ROUTED
from molf.ranks import launched_count


def check_optimizer(settings: Any) -> None:
    """Reject options of the optimizer that are not allowed, or exclude each other.

    Args:
        settings: `TrainSettings`, whose file imports this one.

    Raises:
        InputError: An option is wrong, or needs a library that is missing.
    """
    try:
        options = settings.optimizer_options
        check_exclusions(
            {
                **options.as_keywords(),
                "gradient_accumulation_steps": settings.gradient_accumulation_steps,
                "max_grad_norm": settings.max_grad_norm,
                "float32_weights": settings.dtype == "float32",
                "processes": launched_count(),
                "shards": settings.fsdp,
                "adapter_of": _adapter_of(settings) if settings.kernels == "triton" else None,
                **_score_exclusions(settings),
            }
        )
        options.check_libraries()
    except (OptionError, MissingLibraryError) as error:
        raise InputError(error.as_option) from error


def _adapter_of(settings: Any) -> str | None:
    """Return the options that put LoRA experts into a PEFT adapter, for messages."""
    config = settings.method_config
    if settings.method == "molf" and config is not None and config.lora_dropout:
        return "molf and lora_dropout"
    return "molf-e" if settings.method == "molf-e" else None


def _score_exclusions(settings: Any) -> dict[str, str | None]:
    """Return the settings that the score of a routed method sets, for the check of exclusions."""
    is_routed = settings.method in ROUTED and settings.method_config is not None
    return score_exclusions(settings.score) if is_routed else {}
