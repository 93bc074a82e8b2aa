"""The method's step, slow and literal: a twin of the optimizer, to read and to test against.

Here a layer keeps its dense weight `W` and every factor `A_i`, `B_i` apart, as in the paper
(arXiv 2605.07111); `MoLFAdamW` keeps one effective weight, or the slices of one adapter. All must
take the same path. Nothing is shared with the fast code, nothing is fast, and no step is saved:
equations first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCORE_EPS = 1e-8


class ReferenceTensor:
    """One tensor of an expert, with its moments and its step counter."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.clone()
        self.m = torch.zeros_like(value)
        self.v = torch.zeros_like(value)
        self.t = 0

    def observe(self, grad: Tensor, betas: tuple[float, float]) -> None:
        """`m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g*g`, `t <- t + 1`."""
        beta1, beta2 = betas
        self.m = beta1 * self.m + (1 - beta1) * grad
        self.v = beta2 * self.v + (1 - beta2) * grad * grad
        self.t += 1

    def adamw(self, lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> None:
        """`p <- p (1 - lr wd)`, then `p <- p - lr m^ / (sqrt(v^) + eps)`, bias-corrected."""
        beta1, beta2 = betas
        self.value = self.value * (1 - lr * weight_decay)
        direction = self.m / (1 - beta1**self.t)
        denominator = torch.sqrt(self.v) / math.sqrt(1 - beta2**self.t) + eps
        self.value = self.value - lr * direction / denominator


class ReferenceDecision(NamedTuple):
    """Winners of a step, as expert indices, and the score of every expert.

    Index 0 is `full`, or, where the base is frozen, the first LoRA expert.
    """

    winners: tuple[int, ...]
    scores: tuple[float, ...]


class ReferenceLayer:
    """One routed linear layer, `W_eff = W + sum_i s_i B_i A_i`, with the step of docs/method.md.

    Args:
        weight: W, [out, in], in any floating-point dtype; all arithmetic happens in it.
        factors: (A_i [r_i, in], B_i [out, r_i]) of each LoRA expert.
        scalings: s_i of each LoRA expert.
        bias: b, [out], a part of the `full` expert; or None.
        lr: Rate of the full expert.
        lora_lrs: Rate of each LoRA expert.
        weight_decay: Decay of W; the bias has none.
        lora_weight_decays: Decay of A_i and B_i.
        betas: Decay rates of the moments.
        eps: Of the step; the score has its own.
        score: `"epd"`, `"pfn"`, or a control that ranks by EPD: `"full"`, `"lora"`.
        top_k: How many experts win.
        freeze_base: There is no `full` expert; W and b never move (section 4).
    """

    def __init__(
        self,
        weight: Tensor,
        factors: Sequence[tuple[Tensor, Tensor]],
        scalings: Sequence[float],
        *,
        lr: float,
        lora_lrs: Sequence[float],
        bias: Tensor | None = None,
        weight_decay: float = 0.0,
        lora_weight_decays: Sequence[float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        score: str = "epd",
        top_k: int = 1,
        freeze_base: bool = False,
    ) -> None:
        self.W = ReferenceTensor(weight)
        self.b = None if bias is None else ReferenceTensor(bias)
        self.A = [ReferenceTensor(A) for A, _ in factors]
        self.B = [ReferenceTensor(B) for _, B in factors]
        self.s = list(scalings)
        self.lr, self.lora_lrs = lr, list(lora_lrs)
        self.weight_decay = weight_decay
        self.lora_weight_decays = list(lora_weight_decays or [0.0] * len(factors))
        self.betas, self.eps = betas, eps
        self.score, self.top_k = score, top_k
        self.freeze_base = freeze_base

    def effective_weight(self) -> Tensor:
        """`W + sum_i s_i B_i A_i`, what the forward pass uses."""
        total = self.W.value
        for s, A, B in zip(self.s, self.A, self.B, strict=True):
            total = total + s * B.value @ A.value
        return total

    def set_effective_weight(self, value: Tensor) -> None:
        """Move W so that `W_eff` becomes `value`: what storing it in fewer bits comes to."""
        self.W.value = self.W.value + (value - self.effective_weight())

    def step(
        self,
        grad: Tensor,
        grad_bias: Tensor | None = None,
        *,
        factor: float = 1.0,
        winners: Sequence[int] | None = None,
        factor_grads: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> ReferenceDecision:
        """Take one step (docs/method.md, section 2).

        Args:
            grad: G, the gradient of `W_eff`, [out, in].
            grad_bias: Gradient of the bias, [out]; None leaves the bias out of this step.
            factor: What the schedule multiplies every rate by.
            winners: Take these instead of the best (to follow another path at a near-tie).
            factor_grads: Gradients of (A_i, B_i), where dropout makes them others than section 1's.
        """
        # The exact gradients of the factors, from the factors of this moment (section 1).
        grads_A = [s * B.value.T @ grad for s, B in zip(self.s, self.B, strict=True)]
        grads_B = [s * grad @ A.value.T for s, A in zip(self.s, self.A, strict=True)]
        if factor_grads is not None:
            grads_A = [grad_A for grad_A, _ in factor_grads]
            grads_B = [grad_B for _, grad_B in factor_grads]

        # 1. All moments of all experts.
        full = []
        if not self.freeze_base:
            full.append(self.W)
            self.W.observe(grad, self.betas)
            if self.b is not None and grad_bias is not None:
                full.append(self.b)
                self.b.observe(grad_bias, self.betas)
        for A, grad_A in zip(self.A, grads_A, strict=True):
            A.observe(grad_A, self.betas)
        for B, grad_B in zip(self.B, grads_B, strict=True):
            B.observe(grad_B, self.betas)

        # 2. The scores, without bias correction, with the scheduled rate of each expert.
        lr = factor * self.lr
        lora_lrs = [factor * lora_lr for lora_lr in self.lora_lrs]
        scores = [] if self.freeze_base else [self._score(full, lr)]
        for A, B, lora_lr in zip(self.A, self.B, lora_lrs, strict=True):
            scores.append(self._score([A, B], lora_lr))

        # 3. The winners: highest score first, among equals the lowest index.
        if winners is None:
            winners = self.best(scores)

        # 4. AdamW for the winners' weights; nothing for the others', not even decay.
        if 0 in winners and not self.freeze_base:
            self.W.adamw(lr, self.weight_decay, self.betas, self.eps)
            for bias in full[1:]:
                bias.adamw(lr, 0.0, self.betas, self.eps)
        for i, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            if i + (0 if self.freeze_base else 1) in winners:
                A.adamw(lora_lrs[i], self.lora_weight_decays[i], self.betas, self.eps)
                B.adamw(lora_lrs[i], self.lora_weight_decays[i], self.betas, self.eps)
        return ReferenceDecision(tuple(winners), tuple(scores))

    def best(self, scores: Sequence[float]) -> tuple[int, ...]:
        """Return the indices of the experts that these scores make the winners, ascending."""
        if self.score == "full":
            return (0,)
        candidates = list(range(len(scores)))
        if self.score == "lora" and not self.freeze_base:
            candidates.remove(0)
        chosen: list[int] = []
        while len(chosen) < self.top_k:
            left = [i for i in candidates if i not in chosen]
            chosen.append(max(left, key=lambda i: (scores[i], -i)))
        return tuple(sorted(chosen))

    def _score(self, tensors: list[ReferenceTensor], lr: float) -> float:
        """EPD (Eq. 10) or PFN (Eq. 11) of the expert that owns `tensors`."""
        n = sum(tensor.value.numel() for tensor in tensors)
        total = 0.0
        for tensor in tensors:
            preconditioned = tensor.m / (torch.sqrt(tensor.v) + SCORE_EPS)
            if self.score == "pfn":
                total += float((preconditioned**2).sum())
            else:
                total += float((tensor.m * preconditioned).sum())
        return math.sqrt(total) / math.sqrt(n) if self.score == "pfn" else lr / n * total
