"""The experts of a routed method, or the one adapter of another, from the options of a job."""

from __future__ import annotations

from typing import Any

from molf.core.config import MoLFConfig
from molf.core.scores.registry import routing
from molf.errors import InputError
from molf.job.settings.defaults import ADAPTERS, ROUTED, default_alpha, defaults_for


def method_config(settings: Any) -> MoLFConfig | None:
    """Return the configuration of a method's experts; None for fft and hybrid.

    Args:
        settings: `TrainSettings`, whose file imports this one. Options of value None get the
            default of method and task. An adapter gets the sum of the ranks.

    Raises:
        InputError: A value is not allowed, or not with this method.
    """
    method = settings.method
    if method in ("fft", "hybrid"):
        return None
    defaults = {
        **defaults_for(method, settings.task),
        **{name: value for name, value in vars(settings).items() if value is not None},
    }
    chosen: tuple[int, ...] = defaults["ranks"]
    alphas: Any = defaults.get("alpha")
    if isinstance(alphas, tuple) and len(alphas) == 1:
        alphas = alphas[0]
    rslora = defaults["use_rslora"]
    # One PEFT adapter holds what MoLF splits into experts.
    if method in ADAPTERS:
        if isinstance(alphas, tuple):
            raise InputError(
                f"Invalid alpha={','.join(f'{value:g}' for value in alphas)} with method={method}. "
                "Must be one number: the method trains one adapter."
            )
        if min(chosen) >= 1:  # else refused below, as given
            chosen = (sum(chosen),)
        if alphas is None:
            alphas = default_alpha(method, chosen[0], use_rslora=rslora)
    # Each expert gets LoRA's scaling for its own rank.
    elif alphas is None:
        alphas = [default_alpha(method, rank, use_rslora=rslora) for rank in chosen]
    routes = method in ROUTED
    freezes = method == "molf-e"
    try:
        if freezes and routing(settings.score).rule.needs_full:
            raise InputError(
                f"Invalid score='{settings.score}' with method=molf-e: its base is frozen, so it "
                "has no full expert. Use another score, or --method molf."
            )
        return MoLFConfig(
            ranks=chosen,
            alpha=alphas,
            use_rslora=rslora,
            lora_dropout=defaults["lora_dropout"],
            score=settings.score if routes else MoLFConfig.score,
            top_k=settings.top_k if routes else MoLFConfig.top_k,
            freeze_base=freezes,
            freeze_rest=settings.freeze_rest if routes else None,
            target_modules=settings.target_modules,
            exclude_modules=settings.exclude_modules,
            seed=settings.seed,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
