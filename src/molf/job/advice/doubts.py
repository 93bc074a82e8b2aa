"""Reasons why the evidence for an assignment is thin."""

from __future__ import annotations

from collections.abc import Iterator

from molf.core.assignment.assigned import FULL, LORA
from molf.core.scores.registry import routing
from molf.job.advice.advice import Advice
from molf.job.advice.routed import SMALL_MARGIN
from molf.shown import counted

FEW_STEPS = 20  # decisions per layer below which they are called few
SEVERAL = 0.1  # share of the layers above which close or late decisions are a doubt
_WITHOUT_GRADIENTS = {"full", "lora", "shape"}  # beside the scores that draw


def doubts(advice: Advice) -> list[str]:
    """Return the reasons, one sentence each; empty if there are none."""
    return list(_doubts(advice))


def _is_control(score: str) -> bool:
    """Return whether the winners of a score do not depend on gradients."""
    try:
        draws = routing(score).rule.draws
    except ValueError:  # registered in the process of the run
        return False
    return draws or not _WITHOUT_GRADIENTS.isdisjoint(score.split(":"))


def _doubts(advice: Advice) -> Iterator[str]:
    layers, count = advice.layers, counted(len(advice.layers), "layer")
    if _is_control(advice.score):
        yield (
            f"score={advice.score} is a control: its winners do not depend on the gradients, so "
            "they are no evidence. Probe with another score."
        )
    if advice.steps < FEW_STEPS:
        yield (
            # A warm-up begins with a step at rate 0, which decides nothing.
            f"Few steps: {counted(advice.steps, 'decision')} per layer. Give --max_steps of "
            f"{FEW_STEPS + 1} or more."
        )
    if not advice.has_full:
        yield (
            "There was no full expert: the evidence is about ranks alone. Probe with --method molf."
        )
        return
    if advice.close > SEVERAL * len(layers):
        yield (
            f"Small margins: in {advice.close} of {count} the scores of full and the best LoRA "
            f"expert differ by less than {SMALL_MARGIN:.0%} of their sum, on the mean of the steps."
        )
    if advice.late > SEVERAL * len(layers):
        yield (
            f"Late changes: {advice.late} of {count} changed their winner in the second half of "
            "the steps."
        )
    kinds = {advice.assigned(one).train for one in layers}
    if kinds in ({FULL}, {LORA}):
        other = "full fine-tuning" if kinds == {FULL} else "LoRA"
        yield (
            f"One-sided: all {count} have the same training, so this is {other}. Another ratio of "
            "lora_learning_rate to learning_rate, or --share, divides the layers."
        )
    if not advice.differing:
        yield (
            f"Fixed partition: shape, scaling and rates (lora_lr {advice.rate_ratio:g} times lr) "
            f"predict the winner of all {count}; the data changed none. Another ratio of the rates "
            "changes the assignment."
        )
