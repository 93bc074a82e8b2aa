"""MoLFAdamW: AdamW whose every linear layer chooses its expert at every step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molf.core.adam import (
    AdamWStep,
    adamw_,
    gradient,
    moment_state,
    row_blocks,
    update_moments,
)
from molf.core.adapter import AdapterLayer
from molf.core.config import MoLFConfig
from molf.core.folded import FoldedLayer
from molf.core.groups import build_groups, check_group, check_same_structure
from molf.core.guard import FiniteGuard
from molf.core.precision import full_precision
from molf.core.quantised import keep_differentiable
from molf.core.routed import RoutedLayer
from molf.core.routing import Decision, select_winners


class MoLFAdamW(Optimizer):
    """Full fine-tuning and LoRA in one optimizer (arXiv 2605.07111).

    Build it with `from_model`. Of a plain model each routed weight holds `W + sum_i s_i B_i A_i`,
    and the LoRA factors with all moments are optimizer state (the folded form). Of a PEFT LoRA
    model the experts are slices of its adapter (the adapter form): alone where the base is frozen
    (MoLF-Efficient), beside the base weight where it is trained. In each step every expert of a
    layer gets its exact gradient and updates its moments; the `top_k` experts with the highest
    score take an AdamW step.

    Every routed layer is one parameter group that carries the layer's name and structure,
    `[weight]` or `[weight, bias]`, followed by `[lora_A, lora_B]` in the adapter form; what is not
    routed (embeddings, norms) follows in plain AdamW groups. The LoRA experts' rates are kept as
    ratios to the group's `lr`, so schedulers scale both. Gradient clipping outside the optimizer
    sees, in the folded form, the dense gradients only.

    Args:
        params: Parameter groups as `from_model` makes them.
        lr: Learning rate of the full experts and of everything that is not routed.
        betas: Decay rates of the first and second moments.
        eps: Added to the denominator of a step (the score has its own, 1e-8).
        weight_decay: Default decoupled decay of a group that sets none.
        nonfinite: What a gradient with infinity or NaN does, found before any state is written:
            `"raise"` a RuntimeError, or `"skip"` the whole step with a warning.

    Attributes:
        routing: Decision of every layer in the last step, by layer name.
        skipped_steps: How many steps `nonfinite="skip"` has skipped.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        nonfinite: str = "raise",
    ) -> None:
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"Invalid nonfinite={nonfinite!r}. Must be 'raise' or 'skip'.")
        groups = list(params)
        if not any(isinstance(group, dict) and group.get("layer") is not None for group in groups):
            raise ValueError(
                "No parameter group names a routed layer. Build the optimizer with "
                "MoLFAdamW.from_model(model, config)."
            )
        self.nonfinite = nonfinite
        self.skipped_steps = 0
        self.routing: dict[str, Decision] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, {**defaults, "layer": None})

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        config: MoLFConfig | None = None,
        *,
        lr: float = 5e-5,
        lora_lr: float | Sequence[float] | None = None,
        weight_decay: float = 0.1,
        lora_weight_decay: float | Sequence[float] = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        nonfinite: str = "raise",
    ) -> MoLFAdamW:
        """Build the optimizer for any module with linear layers, or with a LoRA adapter on them.

        Args:
            model: The model, plain or with a PEFT LoRA adapter whose rank is the sum of
                `config.ranks`; nothing in it is wrapped or moved. What `config` freezes gets
                `requires_grad=False`.
            config: What is routed and how; `MoLFConfig()` if not given.
            lr: Learning rate of the full experts and of everything that is not routed.
            lora_lr: Rate of the LoRA experts, one number or one per rank; None means `lr`.
            weight_decay: Decay of routed weights, embeddings and an untied head; biases and norms
                have none.
            lora_weight_decay: Decay of the LoRA factors, one number or one per rank.
            betas: Decay rates of the moments.
            eps: Added to the denominator of a step.
            nonfinite: `"raise"` or `"skip"`.

        Raises:
            ValueError: A value is not allowed, or no layer can be routed (see `find_layers`,
                `find_adapted`).
            TypeError: The model is no module, or the configuration no `MoLFConfig`.
        """
        config = MoLFConfig() if config is None else config
        for name, value, kind in (("model", model, nn.Module), ("config", config, MoLFConfig)):
            if not isinstance(value, kind):
                raise TypeError(
                    f"Invalid {name} of type {type(value).__name__}. Must be {kind.__name__}."
                )
        groups = build_groups(
            model,
            config,
            lr=lr,
            lora_lr=lora_lr,
            weight_decay=weight_decay,
            lora_weight_decay=lora_weight_decay,
        )
        optimizer = cls(groups, lr, betas, eps, weight_decay, nonfinite=nonfinite)
        keep_differentiable(model)
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        for parameter in model.parameters():
            if (
                parameter not in owned
            ):  # freeze_base, freeze_rest; and adapters that are not trained
                parameter.requires_grad_(False)
        return optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; without a `layer` it takes plain AdamW steps.

        Raises:
            ValueError: A hyper-parameter is out of range, or a parameter is complex.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the closure's loss, or None.

        The host waits for the device once, when it reads all layers' scores.

        Raises:
            RuntimeError: A gradient is infinite or NaN and `nonfinite="raise"`; nothing has been
                written. Also for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        routed = [group for group in self.param_groups if group["layer"] is not None]
        taking_part = [group for group in routed if _form_of(group).takes_part(group)]
        if len(taking_part) < len(routed) and not any(self.state.values()):
            _warn_of_missing_gradients(routed, taking_part)
        layers: list[RoutedLayer] = [_form_of(group)(group, self.state) for group in taking_part]
        rest = [
            (parameter, group)
            for group in self.param_groups
            if group["layer"] is None
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        parameters = [p for layer in layers for p in layer.with_gradients] + [p for p, _ in rest]
        self.routing = {}
        if not parameters:
            return loss
        with full_precision(parameters[0].device.type):
            self._step(layers, rest, parameters)
        return loss

    def _step(
        self,
        layers: list[RoutedLayer],
        rest: list[tuple[Tensor, dict[str, Any]]],
        parameters: list[Tensor],
    ) -> None:
        guard = FiniteGuard(parameters)
        sums = [layer.update_moments(guard) for layer in layers]
        home = parameters[0].device
        on_host = torch.cat([total.to(home) for total in (guard.gradient_sums, *sums)]).tolist()

        gradient_sums, score_sums = on_host[: len(parameters)], iter(on_host[len(parameters) :])
        if not all(map(math.isfinite, gradient_sums)):
            self._refuse(
                [p for p, s in zip(parameters, gradient_sums, strict=True) if not math.isfinite(s)]
            )
            return
        winners = [
            self._decide(layer, [next(score_sums) for _ in layer.experts]) for layer in layers
        ]
        for layer, indices in zip(layers, winners, strict=True):
            layer.apply(indices)
        for parameter, group in rest:
            _step_plain(parameter, group, self.state[parameter], guard)

    def _decide(self, layer: RoutedLayer, sums: list[float]) -> tuple[int, ...]:
        """Choose a layer's winners and record the decision."""
        scores = layer.scores(sums)
        if not all(map(math.isfinite, scores)):
            raise RuntimeError(
                f"Scores of layer {layer.name} are not finite although its gradient is: "
                f"{dict(zip(layer.experts, scores, strict=True))}. Its moments or factors have "
                "overflowed."
            )
        winners = select_winners(
            scores,
            score=layer.group["score"],
            top_k=layer.group["top_k"],
            has_full=layer.has_full,
            layer=layer.name,
            step=layer.steps_taken,
            seed=layer.group["seed"],
        )
        self.routing[layer.name] = Decision(
            tuple(layer.experts[winner] for winner in winners),
            dict(zip(layer.experts, scores, strict=True)),
        )
        return winners

    def _refuse(self, bad: list[Tensor]) -> None:
        """Raise for, or warn of, the parameters with a non-finite gradient."""
        names = [self._name_of(parameter) for parameter in bad[:3]]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        message = (
            f"Non-finite gradient in {', '.join(names)}{more}; no weight and no state was changed."
        )
        if self.nonfinite == "raise":
            raise RuntimeError(message + " nonfinite='skip' would skip such steps.")
        self.skipped_steps += 1
        warnings.warn(f"{message} Step skipped ({self.skipped_steps} so far).", stacklevel=4)

    def _name_of(self, parameter: Tensor) -> str:
        for group in self.param_groups:
            for index, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    names = group.get("param_names")
                    return names[index] if names else f"{group['layer'] or 'parameter'} [{index}]"
        raise KeyError("the parameter is not in this optimizer")

    def lora_factors(self, layer: str) -> list[tuple[Tensor, Tensor]]:
        """Return copies of a layer's factors, one (A [r, in], B [out, r]) per LoRA expert.

        Raises:
            ValueError: No routed layer has this name.
        """
        group = self._group_of(layer)
        return _form_of(group).read_factors(group, self.state)

    def set_lora_factors(self, layer: str, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Replace a layer's factors.

        Folded, the effective weight stays and its split into parts changes; of a PEFT model the
        adapter changes.

        Args:
            layer: Name of a routed layer.
            factors: (A [r, in], B [out, r]) for each LoRA expert.

        Raises:
            ValueError: No routed layer has this name, or a shape is wrong.
        """
        group = self._group_of(layer)
        expected = self.lora_factors(layer)
        given = [(tuple(A.shape), tuple(B.shape)) for A, B in factors]
        wanted = [(tuple(A.shape), tuple(B.shape)) for A, B in expected]
        if given != wanted:
            raise ValueError(f"Invalid factors for {layer}: shapes {given}. Must be {wanted}.")
        own = expected[0][0]  # its dtype and device
        stacked = (
            torch.cat([A.to(own) for A, _ in factors], 0),
            torch.cat([B.to(own) for _, B in factors], 1),
        )
        with torch.no_grad():
            _form_of(group).write_factors(group, self.state, *stacked)

    def _group_of(self, layer: str) -> dict[str, Any]:
        for group in self.param_groups:
            if group["layer"] is not None and group["layer"] == layer:
                return group
        names = [group["layer"] for group in self.param_groups if group["layer"]]
        raise ValueError(f"No routed layer {layer!r}. Routed are: {', '.join(names[:8])}, ...")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; every tensor keeps the saved dtype and so the saved bits.

        `torch.optim.Optimizer` casts floating-point state to the parameter's dtype, which would
        round float32 factors and moments of bfloat16 weights.

        Raises:
            ValueError: The saved groups route other layers, or with other ranks or scalings.
        """
        loaded: dict[str, Any] = {}

        def capture_last(_: Optimizer, given: dict[str, Any]) -> None:
            check_same_structure(given["param_groups"], self.param_groups)
            loaded.update(given)

        capture = self.register_load_state_dict_pre_hook(capture_last)
        restore = self.register_load_state_dict_post_hook(
            lambda _: self._restore_bits(loaded), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            capture.remove()
            restore.remove()

    def _restore_bits(self, loaded: dict[str, Any]) -> None:
        saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            for key, value in loaded["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    # A copy, also on the same device: two optimizers never share state.
                    self.state[parameter][key] = value.to(parameter.device, copy=True)
                elif value == {}:
                    # What flattened distributed checkpoints load where nothing was saved.
                    del self.state[parameter][key]

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: torch's part and our own attributes."""
        own = {key: getattr(self, key) for key in ("nonfinite", "skipped_steps", "routing")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and give groups of older or foreign checkpoints the keys they lack."""
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("layer", None)
        for group, replaced in zip(self.param_groups, before, strict=False):
            for key, value in replaced.items():
                group.setdefault(key, value)

    def __repr__(self) -> str:
        """Return a summary; one line per layer would fill screens."""
        routed = [group for group in self.param_groups if group["layer"] is not None]
        first = routed[0]
        rest = sum(len(group["params"]) for group in self.param_groups if group["layer"] is None)
        return (
            f"{type(self).__name__}({len(routed)} routed layers, ranks={list(first['ranks'])}, "
            f"score={first['score']!r}, top_k={first['top_k']}, lr={first['lr']:g}, "
            f"lora_lr={[first['lr'] * ratio for ratio in first['lora_lr_ratios']]}, "
            f"{rest} other parameters)"
        )


def _form_of(group: dict[str, Any]) -> type[FoldedLayer] | type[AdapterLayer]:
    """Where a layer's LoRA experts live: in the state of its weight, or in a PEFT adapter."""
    return AdapterLayer if group.get("adapter_scaling") is not None else FoldedLayer


def _warn_of_missing_gradients(
    routed: list[dict[str, Any]], taking_part: list[dict[str, Any]]
) -> None:
    """A layer without a gradient in the very first step may never get one."""
    names = {group["layer"] for group in taking_part}
    missing = [group["layer"] for group in routed if group["layer"] not in names]
    warnings.warn(
        f"{len(missing)} of {len(routed)} routed layers have no gradient in the first step (first: "
        f"{missing[0]}), so it does not train them. Under gradient checkpointing the reason is "
        "use_reentrant=True; use False.",
        stacklevel=4,
    )


def _step_plain(
    parameter: Tensor, group: dict[str, Any], state: dict[str, Any], guard: FiniteGuard
) -> None:
    """AdamW for a parameter that is not routed."""
    if "step" not in state:
        state.update(moment_state(parameter))
    decay = guard.decay_of(state["exp_avg"], group["betas"])
    for rows in row_blocks(parameter):
        update_moments(
            gradient(parameter)[rows], state["exp_avg"][rows], state["exp_avg_sq"][rows], decay
        )
    state["step"] += 1
    adamw_(
        parameter,
        state,
        AdamWStep(group["lr"], group["weight_decay"], group["betas"], group["eps"], state["step"]),
    )
