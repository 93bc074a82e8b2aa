"""Inputs that a worker keeps in memory between trials."""

import torch

from molf.measure.divergence import BaseLogits, Logits
from molf.study import warm
from molf.study.warm import WarmInputs


def logits(numbers):
    return BaseLogits(Logits([[0]], [torch.zeros(numbers)]), Logits([], []), pad_id=0)


def test_logits_are_kept_by_their_size(monkeypatch):
    monkeypatch.setattr(warm, "_LOGITS", 400)
    inputs, made = WarmInputs(), []

    def ask(key, numbers):
        def make():
            made.append(key)
            return logits(numbers)

        assert inputs.base_logits(key, make).nbytes == 4 * numbers

    for key in "abab":
        ask(key, 50)
    assert made == ["a", "b"]
    ask("c", 50)  # drops a, which was used before b
    ask("b", 50)
    ask("a", 50)  # drops c
    assert made == ["a", "b", "c", "a"]
    ask("larger than all", 200)
    ask("larger than all", 200)
    ask("a", 50)  # was dropped for its size
    assert made == ["a", "b", "c", "a", "larger than all", "a"]
