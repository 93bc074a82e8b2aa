"""The reference optimizer with the scores that are not the paper's, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from molf.core.reference import SCORE_EPS, ReferenceMoLFAdamW, Slot

FURTHER = ("gsnr", "fresh", "descent", "epd-balanced", "epd-corrected", "shape")


class ScoredReference(ReferenceMoLFAdamW):
    """The reference with every score of `molf.core.scores`."""

    SCORES = (*ReferenceMoLFAdamW.SCORES, *FURTHER)

    def step_layer(self, group: dict[str, Any], *args: Any) -> Any:
        """Take one step of a layer; note its moments before the step."""
        state = self.state[group["params"][0]] or self._start(group)
        self.state[group["params"][0]] = state
        self._betas = group["betas"]
        self._scalings = dict(zip(map(id, state["A"]), self.config.scalings, strict=True))
        for slot in (state["W"], state["b"], *state["A"], *state["B"]):
            if slot is not None:
                slot["before"] = slot["m"], slot["v"]
        return super().step_layer(group, *args)

    def score(self, slots: Sequence[Slot], lr: float) -> float:
        """Return the score of the expert that owns these tensors."""
        name = self.config.score
        if name not in FURTHER:
            return super().score(slots, lr)
        products = [float((s["m"] ** 2 / (s["v"].sqrt() + SCORE_EPS)).sum()) for s in slots]
        counts = [slot["value"].numel() for slot in slots]
        if name == "descent":
            return lr * sum(products)
        if name == "gsnr":
            noise = sum(float(slot["v"].sqrt().sum()) for slot in slots)
            return sum(products) / noise if noise else 0.0
        if name == "epd-corrected":
            moving = sum(n for n, product in zip(counts, products, strict=True) if product)
            return lr * sum(products) / moving if moving else 0.0
        if name in ("epd-balanced", "shape"):
            mean = sum(products) / sum(counts)
            noise = 1.0
            if (s := self._scalings.get(id(slots[0]))) is not None:
                n_in, n_out = slots[0]["value"].shape[1], slots[1]["value"].shape[0]
                noise = s / math.sqrt(3) * n_out / (n_in + n_out)
            return lr * noise if name == "shape" else mean / noise
        fresh = sum(float(self._fresh(slot)) for slot in slots)
        slots[0]["ema"] = 0.9 * slots[0].get("ema", 0.0) + 0.1 * fresh
        return lr / sum(counts) * slots[0]["ema"]

    def _fresh(self, slot: Slot) -> torch.Tensor:
        m, v = slot["before"]
        grad = (slot["m"] - self._betas[0] * m) / (1 - self._betas[0])
        return (grad * m / (v.sqrt() + SCORE_EPS)).sum()
