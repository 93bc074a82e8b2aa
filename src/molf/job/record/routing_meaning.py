"""Describe the routing of a run in one or two sentences."""

from __future__ import annotations

from collections.abc import Sequence

from molf.core.config import MoLFConfig
from molf.job.record.wins import RoutingSummary
from molf.shown import counted

ONE_SIDED = 0.99  # share of updates at or above which routing is called one-sided
_FIXED = 0.9  # share of unchanged layers at or above which routing is called nearly fixed
_EARLY = 0.1  # share of the steps; with no change after it, routing is called fixed early


def routing_meaning(summary: RoutingSummary, config: MoLFConfig, steps: int) -> str:
    """Return whether routing was one-sided or fixed, and the equivalent method.

    Args:
        summary: The routing of the run.
        config: The experts and the score.
        steps: Optimizer steps of the run.
    """
    layers = counted(summary.layers, "layer")
    eligible = config.eligible
    if len(eligible) == config.top_k:
        why = f"top_k={config.top_k}: there was nothing to choose"
        if len(eligible) == 1:
            is_control = config.score in ("full", "lora")
            why = f"score={config.score}, a control" if is_control else "there is no other"
        return (
            f"{_names(eligible)} took every update ({why}): for the {layers} this run was "
            f"{_kind(eligible, config)}."
        )
    if config.routing.rule.draws:
        return f"Winners were drawn at random (score={config.score}, a control)."
    if summary.most_won >= ONE_SIDED:
        share = "every update" if summary.most_won == 1 else f"{summary.most_won:.1%} of updates"
        return (
            f"One-sided: {_names(summary.most)} took {share} of the {layers}: for them this run "
            f"was {_kind(summary.most, config)}. {_way_out(config)}"
        )
    return _movement(summary, config, steps)


def has_changes(meaning: str) -> bool:
    """Return whether a recorded sentence of `routing_meaning` has the number of changes."""
    return "changed" in meaning


def routing_shares_text(summary: RoutingSummary) -> str:
    """Return the share of each expert and the changes per layer in a sentence."""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in summary.won.items())
    return (
        f"Updates of the {counted(summary.layers, 'layer')} won: {shares}; "
        f"{summary.changes / summary.layers:.1f} changes of winner per layer."
    )


def _movement(summary: RoutingSummary, config: MoLFConfig, steps: int) -> str:
    """Describe how often layers changed their winner, if several experts won."""
    layers = counted(summary.layers, "layer")
    if summary.decisions <= summary.layers:
        return f"There was one decision for each of the {layers}."
    split = ", ".join(f"{name} {count}" for name, count in summary.winners_of_unchanged.items())
    if summary.last_change is None:
        return (
            f"Fixed: no layer changed its winner after the first decision, in step "
            f"{summary.first_step}: this run trained a fixed split of the {layers} ({split})."
        )
    unchanged = f"{summary.unchanged} of {layers} never changed their winner"
    changes = f"{summary.changes / summary.layers:.1f} changes per layer"
    last = f"the last in step {summary.last_change} of {steps}"
    if summary.last_change <= _EARLY * steps:
        return (
            f"Fixed early: no layer changed its winner after step {summary.last_change} of "
            f"{steps}; {unchanged} at all ({split})."
        )
    if summary.unchanged >= _FIXED * summary.layers:
        return f"Nearly fixed: {unchanged} ({split}); {changes}, {last}."
    return f"{unchanged}; {changes}, {last}."


def _kind(experts: Sequence[str], config: MoLFConfig) -> str:
    """Return the name of a training with only these experts."""
    if tuple(experts) == ("full",):
        return "full fine-tuning"
    ranks = dict(zip(config.lora_experts, config.ranks, strict=True))
    if len(experts) == 1:
        return f"one LoRA of rank {ranks[experts[0]]}"
    if "full" not in experts:
        return f"one LoRA of rank {sum(ranks[name] for name in experts)}"
    return "full fine-tuning with a LoRA beside it"


def _way_out(config: MoLFConfig) -> str:
    if config.freeze_base:
        return "An alpha per rank gives each LoRA expert another weight in the choice."
    return "Another ratio of lora_learning_rate to learning_rate shifts the choice."


def _names(experts: Sequence[str]) -> str:
    return " and ".join(experts)
