"""The paper on one screen (arXiv 2605.07111): MoLF as a slow, literal optimizer.

It trains a plain model in any loop and takes the path of `MoLFAdamW`, which is tested against it.
The two share which layers are routed and how A starts, and no arithmetic: here W and every factor
A_i, B_i are tensors of their own in the state, and each step ends with the model's weight set to
`W_eff = W + sum_i s_i B_i A_i`. The equations are those of docs/method.md, section 2.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molf.core.config import MoLFConfig
from molf.core.model.decay import undecayed
from molf.core.model.factors import draw_lora_a
from molf.core.model.linear_layers import find_layers
from molf.core.step.decision import Decision

SCORE_EPS = 1e-8

Slot = dict[str, Any]
"""One tensor of an expert: its value, moments m and v, and step counter t."""


class ReferenceMoLFAdamW(Optimizer):
    """MoLF for models with linear layers; the arguments are those of `MoLFAdamW.from_model`.

    With `config.freeze_base` (MoLF-Efficient) W, b and all else stay, and G is computed anyway.

    Args:
        model: A plain model with float32 or float64 weights.
        config: Settings of the method; `MoLFConfig()` if not given. No dropout.
        lr: Rate of the full experts and of parameters that are not routed; schedulers scale all
            rates by it.
        lora_lr: Rate of the LoRA experts, one number or one per rank; None means `lr`.
        weight_decay: Decay of matrices; biases, norms and vectors have none.
        lora_weight_decay: Decay of A_i and B_i, one number or one per rank.
        betas: Decay rates of the moments.
        eps: Of the step; the score has its own.

    Attributes:
        routing: Decision of every layer in the last step, by layer name.

    Raises:
        ValueError: No layer can be routed, dropout is asked for, or weights have another dtype.
    """

    SCORES: tuple[str, ...] = ("epd", "pfn", "random", "full", "lora")

    def __init__(
        self,
        model: nn.Module,
        config: MoLFConfig | None = None,
        lr: float = 5e-5,
        lora_lr: float | Sequence[float] | None = None,
        weight_decay: float = 0.1,
        lora_weight_decay: float | Sequence[float] = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.config = config = MoLFConfig() if config is None else config
        if config.lora_dropout:
            raise ValueError("The reference has no dropout. Use lora_dropout=0.")
        if config.score not in self.SCORES:
            raise ValueError(
                f"Invalid score={config.score!r}. The reference has {', '.join(self.SCORES)}."
            )
        if low := {p.dtype for p in model.parameters()} - {torch.float32, torch.float64}:
            raise ValueError(f"Invalid dtype {low.pop()}. The reference needs float32 or float64.")
        rates = per_expert(lr if lora_lr is None else lora_lr, config)
        still = undecayed(model)
        groups: list[dict[str, Any]] = []
        for layer in find_layers(model, config):
            has_bias = layer.bias is not None and not config.freezes_rest
            marked = layer.weight in still
            groups.append(
                {
                    "params": [layer.weight, layer.bias] if has_bias else [layer.weight],
                    "layer": layer.name,
                    "transposed": layer.transposed,  # stored as [in, out]
                    "weight_decay": 0.0 if marked else weight_decay,
                    "lora_lr_ratios": [rate / lr for rate in rates],
                    "lora_weight_decays": per_expert(0.0 if marked else lora_weight_decay, config),
                }
            )
        routed = {parameter for group in groups for parameter in group["params"]}
        for p in model.parameters():
            if p not in routed and p.requires_grad:
                p.requires_grad_(not config.freezes_rest)
                groups.append({"params": [p], "weight_decay": 0.0 if p in still else weight_decay})
        self.routing: dict[str, Decision] = {}
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "layer": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of every layer and parameter with a gradient; return the closure's loss.

        Raises:
            RuntimeError: A gradient is not finite; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        if not all(p.grad is None or p.grad.isfinite().all() for _, p in pairs):
            raise RuntimeError("A gradient is not finite; no weight and no state was changed.")
        self.routing = {}
        for group in self.param_groups:
            first = group["params"][0]
            if first.grad is None:
                continue
            if group["layer"] is not None:
                self.routing[group["layer"]] = self.step_layer(group)
                continue
            slot = self.state[first].setdefault("p", new_slot(first))  # not routed
            observe(slot, first.grad, group["betas"])
            adamw(slot, group["lr"], group["weight_decay"], group["betas"], group["eps"])
            first.copy_(slot["value"])
        return loss

    def step_layer(
        self,
        group: dict[str, Any],
        winners: Sequence[int] | None = None,
        factor_grads: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Decision:
        """Take one step of a routed layer.

        Args:
            group: The layer's parameter group.
            winners: These experts win instead of the best (to follow another path at a near-tie).
            factor_grads: Gradients of (A_i, B_i) to use, where dropout makes them differ from G's.
        """
        weight, *biases = group["params"]
        G = weight.grad.T if group["transposed"] else weight.grad  # [out, in]
        state = self.state[weight] = self.state[weight] or self._start(group)
        W, b, A, B = state["W"], state["b"], state["A"], state["B"]
        s = self.config.scalings
        lr, betas, eps = group["lr"], group["betas"], group["eps"]

        # The exact gradients of the factors, from the factors before the step (section 1).
        if factor_grads is None:
            factor_grads = [
                (s_i * B_i["value"].T @ G, s_i * G @ A_i["value"].T)
                for s_i, A_i, B_i in zip(s, A, B, strict=True)
            ]

        # 1. All moments of all experts. An expert: its tensors, its scheduled rate, its decay.
        experts: list[tuple[list[Slot], float, float]] = []
        if not self.config.freeze_base:
            observe(W, G, betas)
            moving = [bias for bias in biases if bias.grad is not None]
            for bias in moving:
                observe(b, bias.grad, betas)
            experts.append(([W, b] if moving else [W], lr, group["weight_decay"]))
        for i, (grad_A, grad_B) in enumerate(factor_grads):
            observe(A[i], grad_A, betas)
            observe(B[i], grad_B, betas)
            rate = lr * group["lora_lr_ratios"][i]
            experts.append(([A[i], B[i]], rate, group["lora_weight_decays"][i]))

        # 2. The scores. 3. The winners.
        scores = [self.score(slots, rate) for slots, rate, _ in experts]
        if winners is None:
            winners = best(scores, self.config, group["layer"], A[0]["t"] - 1)

        # 4. AdamW for the winners' weights; nothing for the others', not even decay.
        for winner in winners:
            slots, rate, decay = experts[winner]
            for slot in slots:
                adamw(slot, rate, 0.0 if slot is b else decay, betas, eps)

        W_eff = effective_weight(state, s)
        weight.copy_(W_eff.T if group["transposed"] else W_eff)
        for bias in biases:
            bias.copy_(b["value"])
        names = self.config.experts
        by_name = dict(zip(names, scores, strict=True))
        return Decision(tuple(names[winner] for winner in winners), by_name)

    def score(self, slots: Sequence[Slot], lr: float) -> float:
        """Return the score of the expert that owns these tensors."""
        return score_of(slots, lr, self.config.score)

    def _start(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return a layer's state before its first step: B_i = 0, so W is the model's weight."""
        weight, *biases = group["params"]
        W = weight.T if group["transposed"] else weight
        ranks = self.config.ranks
        A = draw_lora_a(self.config.seed, group["layer"], ranks, W.shape[1]).to(W)
        return {
            "W": new_slot(W),
            "b": new_slot(biases[0]) if biases else None,
            "A": [new_slot(A_i) for A_i in A.split(list(ranks))],
            "B": [new_slot(W.new_zeros(len(W), rank)) for rank in ranks],
        }


def new_slot(value: Tensor) -> Slot:
    """Return the state of one tensor of an expert before its first step."""
    value = value.detach().clone()
    return {"value": value, "m": torch.zeros_like(value), "v": torch.zeros_like(value), "t": 0}


def observe(slot: Slot, grad: Tensor, betas: tuple[float, float]) -> None:
    """`m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g*g`, `t <- t + 1`."""
    slot["m"] = betas[0] * slot["m"] + (1 - betas[0]) * grad
    slot["v"] = betas[1] * slot["v"] + (1 - betas[1]) * grad * grad
    slot["t"] += 1


def adamw(
    slot: Slot, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> None:
    """`p <- p (1 - lr wd)`, then `p <- p - lr m^ / (sqrt(v^) + eps)`, bias-corrected."""
    m_hat = slot["m"] / (1 - betas[0] ** slot["t"])
    v_hat_root = torch.sqrt(slot["v"]) / math.sqrt(1 - betas[1] ** slot["t"])
    slot["value"] = slot["value"] * (1 - lr * weight_decay) - lr * m_hat / (v_hat_root + eps)


def score_of(slots: Sequence[Slot], lr: float, score: str) -> float:
    """PFN (Eq. 11), or else EPD (Eq. 10), of the expert that owns these tensors."""
    n = sum(slot["value"].numel() for slot in slots)
    directions = [slot["m"] / (torch.sqrt(slot["v"]) + SCORE_EPS) for slot in slots]
    if score == "pfn":
        return math.sqrt(sum(float((d**2).sum()) for d in directions)) / math.sqrt(n)
    products = [slot["m"] * d for slot, d in zip(slots, directions, strict=True)]
    return lr / n * sum(float(product.sum()) for product in products)


def best(scores: Sequence[float], config: MoLFConfig, layer: str, t: int) -> tuple[int, ...]:
    """Return the indices of the winners, ascending; among equal scores the lowest index wins."""
    experts = range(len(scores))
    if config.score == "random":
        drawn = random.Random(f"{config.seed}/{layer}/{t}").sample(experts, config.top_k)
        return tuple(sorted(drawn))
    eligible = [i for i in experts if config.experts[i] in config.eligible]
    ranking = sorted(eligible, key=lambda i: scores[i], reverse=True)  # stable
    return tuple(sorted(ranking[: config.top_k]))


def effective_weight(state: dict[str, Any], scalings: Sequence[float]) -> Tensor:
    """`W + sum_i s_i B_i A_i`, the weight of the forward pass, [out, in]."""
    total: Tensor = state["W"]["value"]
    for s_i, A_i, B_i in zip(scalings, state["A"], state["B"], strict=True):
        total = total + s_i * B_i["value"] @ A_i["value"]
    return total


def per_expert(value: float | Sequence[float], config: MoLFConfig) -> list[float]:
    """Return one number per LoRA expert."""
    return list(value) if isinstance(value, Sequence) else [value] * len(config.ranks)
