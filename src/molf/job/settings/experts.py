"""The experts of a routed method, or the one adapter of another, from the options of a job."""

from __future__ import annotations

from typing import Any

from molf.core.config import MoLFConfig
from molf.core.scores.registry import routing
from molf.errors import InputError
from molf.job.settings.defaults import ADAPTERS, ROUTED, default_alpha, defaults_for


def method_config(
    method: str,
    task: str,
    *,
    ranks: tuple[int, ...] | None,
    alpha: tuple[float, ...] | None,
    use_rslora: bool | None,
    lora_dropout: float | None,
    score: str,
    top_k: int,
    freeze_rest: bool | None,
    **common: Any,
) -> MoLFConfig | None:
    """Return the configuration of a method's experts; None for fft. None stands for a default.

    Args:
        method: Name of the method.
        task: Name of the task, which sets defaults.
        ranks: One rank per expert; an adapter gets their sum.
        alpha: One number, or one per rank.
        use_rslora: Whether to scale by `alpha / sqrt(rank)`.
        lora_dropout: Dropout before the LoRA factors.
        score: Score of routed methods.
        top_k: Winners of routed methods.
        freeze_rest: Whether routed methods freeze parameters that are not routed.
        **common: Further fields of `MoLFConfig`.

    Raises:
        InputError: A value is not allowed, or not with this method.
    """
    if method == "fft":
        return None
    defaults = defaults_for(method, task)
    chosen: tuple[int, ...] = ranks or defaults["ranks"]
    alphas: Any = alpha if alpha is not None else defaults.get("alpha")
    if isinstance(alphas, tuple) and len(alphas) == 1:
        alphas = alphas[0]
    rslora = defaults["use_rslora"] if use_rslora is None else use_rslora
    if method in ADAPTERS:
        if isinstance(alphas, tuple):
            raise InputError(
                f"Invalid alpha={_commas(alphas)} with method={method}. Must be one "
                "number: it trains one adapter."
            )
        if min(chosen) >= 1:  # else refused below, as given
            chosen = (sum(chosen),)
        if alphas is None:
            alphas = default_alpha(method, chosen[0], use_rslora=rslora)
    elif alphas is None:
        alphas = [default_alpha(method, rank, use_rslora=rslora) for rank in chosen]
    dropout = lora_dropout if lora_dropout is not None else defaults["lora_dropout"]
    routes = method in ROUTED
    freezes = method == "molf-e"
    try:
        if freezes and routing(score).rule.needs_full:
            raise InputError(
                f"Invalid score='{score}' with method=molf-e: its base is frozen, so it has no "
                "full expert. Use another score, or --method molf."
            )
        return MoLFConfig(
            ranks=chosen,
            alpha=alphas,
            use_rslora=rslora,
            lora_dropout=dropout,
            score=score if routes else MoLFConfig.score,
            top_k=top_k if routes else MoLFConfig.top_k,
            freeze_base=freezes,
            freeze_rest=freeze_rest if routes else None,
            **common,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _commas(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
