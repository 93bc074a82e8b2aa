"""The folded form (docs/method.md, section 3): LoRA experts as state of the optimizer.

The model holds `W_eff = W + sum_i s_i B_i A_i` and nothing else. A and B of all experts of a layer
are stacked: expert i owns rows of A [R, in] and the same columns of B [out, R], R = sum of ranks,
so that a layer costs the same few operations however many experts it has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.core.adam import (
    AdamWStep,
    MomentDecay,
    finish_score,
    gradient,
    row_blocks,
    score_terms,
    state_dtype,
    sum_dtype,
    update_moments,
)
from molf.core.config import lora_expert_names

_FACTORS = ("lora_A", "lora_B")


class FoldedLayer:
    """One routed layer for the length of one optimizer step.

    Made from a parameter group ([weight] or [weight, bias]) and the states of its parameters. The
    step calls `update_moments` for every layer, reads all scores at once, and then calls `apply`.
    """

    def __init__(self, group: dict[str, Any], states: dict[Tensor, dict[str, Any]]) -> None:
        self.group = group
        self.name: str = group["layer"]
        self.experts = ("full", *lora_expert_names(group["ranks"]))
        self.weight: Tensor = group["params"][0]
        self.state = states[self.weight]
        if "step" not in self.state:
            self.state.update(initial_state(group))
        self.dense = [(self.weight, self.state)]
        for bias in group["params"][1:]:
            if bias.grad is not None:
                if "step" not in states[bias]:
                    states[bias].update(moment_state(bias))
                self.dense.append((bias, states[bias]))

    @property
    def steps_taken(self) -> int:
        """How many steps this layer has taken."""
        return self.state["step"]

    @property
    def lora_lrs(self) -> tuple[float, ...]:
        """Scheduled rate of each LoRA expert."""
        return tuple(self.group["lr"] * ratio for ratio in self.group["lora_lr_ratios"])

    def update_moments(self, decay: MomentDecay) -> Tensor:
        """Update the moments of all experts; return their score sums, [experts], on the device."""
        score = self.group["score"]
        device = self.weight.device
        full = torch.zeros((), dtype=sum_dtype(device), device=device)
        for parameter, state in self.dense:
            for rows in row_blocks(parameter):
                exp_avg, exp_avg_sq = state["exp_avg"][rows], state["exp_avg_sq"][rows]
                update_moments(gradient(parameter)[rows], exp_avg, exp_avg_sq, decay)
                full += score_terms(exp_avg, exp_avg_sq, score).sum()

        by_rank = full.new_zeros(sum(self.group["ranks"]))  # per row of A and column of B
        for key, grad, dim in zip(_FACTORS, self._factor_gradients(), (1, 0), strict=True):
            exp_avg, exp_avg_sq = self.state[f"{key}_exp_avg"], self.state[f"{key}_exp_avg_sq"]
            update_moments(grad, exp_avg, exp_avg_sq, decay)
            by_rank += score_terms(exp_avg, exp_avg_sq, score).sum(dim)
        per_expert = [part.sum() for part in by_rank.split(self.group["ranks"])]
        return torch.stack([full, *per_expert])

    def _factor_gradients(self) -> tuple[Tensor, Tensor]:
        """`grad A_i = s_i B_i^T G` as [R, in] and `grad B_i = s_i G A_i^T` as [out, R]."""
        grad = _oriented(gradient(self.weight), self.group).to(self.state["lora_A"].dtype)
        scalings = self._scaling_per_rank()
        grad_A = (self.state["lora_B"] * scalings).t() @ grad
        grad_B = (grad @ self.state["lora_A"].t()).mul_(scalings)
        return grad_A, grad_B

    def _scaling_per_rank(self) -> Tensor:
        """`s_i`, repeated for every row of A that expert i owns, [R]."""
        pairs = zip(self.group["scalings"], self.group["ranks"], strict=True)
        # Filled on the device: a tensor made from a list would be copied there, and awaited.
        return torch.cat([self.state["lora_A"].new_full((rank,), s) for s, rank in pairs])

    def scores(self, sums: Sequence[float]) -> list[float]:
        """Turn the score sums, now on the host, into one score per expert."""
        out_features, in_features = _oriented(self.weight, self.group).shape
        counts = [sum(parameter.numel() for parameter, _ in self.dense)]
        counts += [rank * (in_features + out_features) for rank in self.group["ranks"]]
        lrs = (self.group["lr"], *self.lora_lrs)
        return [
            finish_score(total, score=self.group["score"], lr=lr, count=count)
            for total, lr, count in zip(sums, lrs, counts, strict=True)
        ]

    def apply(self, winners: Sequence[int]) -> None:
        """Count the step for every expert and give the winners theirs, each from the old state."""
        for _, state in self.dense:
            state["step"] += 1
        full = self._dense_step("weight_decay", self.state) if 0 in winners else None
        moves = [self._factor_increments(winner - 1) for winner in winners if winner > 0]

        # W_eff <- kept W_eff + left @ right, then minus the AdamW direction where full has won.
        left = [torch.cat([dB, B], 1).mul_(scaling) for scaling, _, B, _, dB in moves]
        right = [torch.cat([A + dA, dA], 0) for _, A, _, dA, _ in moves]
        if full and full.decay:
            # It is W = W_eff - sum_i s_i B_i A_i that decays, so the experts get theirs back.
            left.append(self.state["lora_B"] * (full.decay * self._scaling_per_rank()))
            right.append(self.state["lora_A"])
        # Low-precision weights are moved in the state's dtype and rounded once.
        weight = self.weight.to(self.state["exp_avg"].dtype)
        if left:
            product = torch.cat(left, 1), torch.cat(right, 0)
            _oriented(weight, self.group).addmm_(*product, beta=full.kept if full else 1.0)
        if full:
            full.descend_(weight, self.state["exp_avg"], self.state["exp_avg_sq"])
            for bias, state in self.dense[1:]:
                adamw_(bias, state, self._dense_step("bias_weight_decay", state))
        if weight is not self.weight:
            self.weight.copy_(weight)
        for _, A, B, dA, dB in moves:
            A += dA
            B += dB

    def _dense_step(self, decay: str, state: dict[str, Any]) -> AdamWStep:
        group = self.group
        return AdamWStep(group["lr"], group[decay], group["betas"], group["eps"], state["step"])

    def _factor_increments(self, index: int) -> tuple[float, Tensor, Tensor, Tensor, Tensor]:
        """Return `s, A, B, dA, dB` of LoRA expert `index`; A and B are views of the state.

        With `A' = A + dA`, `B' = B + dB` the weight moves by `s (dB A' + B dA)`, one product of
        rank 2 r. The difference `s (B' A' - B A)` would cancel: in float32 its relative error is
        300 times larger.
        """
        group = self.group
        start = sum(group["ranks"][:index])
        owned = slice(start, start + group["ranks"][index])
        step = AdamWStep(
            self.lora_lrs[index],
            group["lora_weight_decays"][index],
            group["betas"],
            group["eps"],
            self.steps_taken,
        )
        A, B = self.state["lora_A"][owned], self.state["lora_B"][:, owned]
        moments = ("exp_avg", "exp_avg_sq")
        dA = step.increment(A, *(self.state[f"lora_A_{m}"][owned] for m in moments))
        dB = step.increment(B, *(self.state[f"lora_B_{m}"][:, owned] for m in moments))
        return group["scalings"][index], A, B, dA, dB


def adamw_(parameter: Tensor, state: dict[str, Any], step: AdamWStep) -> None:
    """One AdamW step of a whole tensor whose moments are already updated."""
    values = parameter.to(state["exp_avg"].dtype)
    values.mul_(step.kept)
    step.descend_(values, state["exp_avg"], state["exp_avg_sq"])
    if values is not parameter:
        parameter.copy_(values)


def moment_state(parameter: Tensor) -> dict[str, Any]:
    """State of a tensor that takes plain AdamW steps."""
    # The counter is a plain int: reading it never waits for a device.
    zeros = torch.zeros_like(parameter, dtype=state_dtype(parameter))
    return {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def initial_state(group: dict[str, Any]) -> dict[str, Any]:
    """State of a routed weight before its first step: moments, factors and their moments."""
    weight: Tensor = group["params"][0]
    out_features, in_features = _oriented(weight, group).shape
    state = moment_state(weight)
    state["lora_A"] = draw_lora_a(group, in_features).to(state["exp_avg"])
    state["lora_B"] = state["exp_avg"].new_zeros(out_features, sum(group["ranks"]))
    for key in _FACTORS:
        state[f"{key}_exp_avg"] = torch.zeros_like(state[key])
        state[f"{key}_exp_avg_sq"] = torch.zeros_like(state[key])
    return state


def draw_lora_a(group: dict[str, Any], in_features: int) -> Tensor:
    """Draw the stacked A factors, [R, in], float32 on the CPU: U(-1/sqrt(in), 1/sqrt(in)).

    Each expert's numbers depend on (seed, layer name, expert) alone, not on the process, the other
    experts, or the order in which layers are met.
    """
    bound = 1 / math.sqrt(in_features)
    factors = []
    for index, rank in enumerate(group["ranks"]):
        key = f"{group['seed']}/{group['layer']}/{index}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        generator = torch.Generator("cpu").manual_seed(seed)
        uniform = torch.rand(
            rank, in_features, generator=generator, dtype=torch.float32, device="cpu"
        )
        factors.append(uniform.mul_(2 * bound).sub_(bound))
    return torch.cat(factors)


def split_factors(
    group: dict[str, Any], lora_A: Tensor, lora_B: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Copies of the factors of each expert: A [r, in] and B [out, r]."""
    ranks = group["ranks"]
    pairs = zip(lora_A.split(ranks, 0), lora_B.split(ranks, 1), strict=True)
    return [(A.clone(), B.clone()) for A, B in pairs]


def _oriented(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """View a weight, or its gradient, as [out, in]."""
    return tensor.t() if group["transposed"] else tensor
