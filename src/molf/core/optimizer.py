"""MoLFAdamW: AdamW that chooses, per linear layer and step, the experts that are updated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molf.core.adamw import AdamW
from molf.core.assignment.assigned import Evidence
from molf.core.assignment.history import LayerHistory
from molf.core.config import MoLFConfig
from molf.core.hyper_parameters import readable
from molf.core.model.coverage import Coverage
from molf.core.model.groups import build_groups, check_shapes, cover
from molf.core.model.owners import Owners, without_gradient
from molf.core.model.quantised import keep_differentiable
from molf.core.model.wrappers import check_ddp_waits_for
from molf.core.options import OptimizerOptions, check_exclusions, score_exclusions
from molf.core.step.decision import Decision
from molf.core.step.local_parts import LocalParts
from molf.core.step.step import Outcome
from molf.core.step.unit import LayerUnit, Unit, UnitKey
from molf.core.warn import warn

_HISTORY = "history"  # key of a layer's counts of decisions in a saved group


class MoLFAdamW(AdamW):
    """Full fine-tuning and LoRA in one optimizer (arXiv 2605.07111).

    Build it with `from_model`. For a plain model each routed weight holds `W + sum_i s_i B_i A_i`;
    the LoRA factors and all moments are optimizer state (folded form). For a PEFT LoRA model the
    experts are slices of its adapter (adapter form), with a frozen base (MoLF-Efficient) or beside
    a trained base weight. In each step every expert of a layer gets its exact gradient and updates
    its moments; the `top_k` experts with the highest score take an AdamW step.

    Every routed layer is one parameter group with the layer's name and structure: `[weight]` or
    `[weight, bias]`, followed by `[lora_A, lora_B]` in the adapter form. Parameters that are not
    routed (embeddings, norms) are in plain AdamW groups. Rates of LoRA experts are stored as ratios
    to the group's `lr`, so schedulers scale both. In the folded form, gradient clipping uses the
    dense gradients only.

    Args:
        params: Parameter groups of `from_model`.
        lr: Learning rate of the full experts and of parameters that are not routed.
        betas: Decay rates of the first and second moments.
        eps: Added to the denominator of a step (the score uses 1e-8).
        weight_decay: Decoupled decay of groups that set none.
        seed: Seed of stochastic rounding for groups that set none.
        **options: The other keywords of `AdamW`: `weight_rounding`, `state_dtype`, `nonfinite`,
            `grad_accumulation_dtype`, `optimizer_in_backward`, `kernels`, `state_offload`.

    Attributes:
        routing: Decision of every layer in the last step, by layer name.
        evidence: Counts of the decisions so far, by layer, for `molf.Assignment.of`.
        coverage: Share of the model that is routed, and the rest by kind and name;
            `print(optimizer.coverage)`. None unless the optimizer was built by `from_model`.
    """

    _STEP_RESULTS = (*AdamW._STEP_RESULTS, "routing", "_is_first", "_history", "_steps")
    _PICKLED = (*AdamW._PICKLED, "routing", "coverage", "_history", "_steps")
    _owners: Owners | None = None  # not copied: the model of a copy is another one
    _is_first = False  # whether the current step is the first

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float | Tensor = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        groups = list(params)
        if not any(isinstance(group, dict) and group.get("layer") is not None for group in groups):
            raise ValueError(
                "No parameter group names a routed layer. Build the optimizer with "
                "MoLFAdamW.from_model(model, config)."
            )
        self.routing: dict[str, Decision] = {}
        self.coverage: Coverage | None = None
        self._history: dict[str, LayerHistory] = {}
        self._steps = 0
        super().__init__(groups, lr, betas, eps, weight_decay, seed=seed, **options)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        config: MoLFConfig | None = None,
        *,
        lr: float | Tensor = 5e-5,
        lora_lr: float | Sequence[float] | None = None,
        weight_decay: float = 0.1,
        lora_weight_decay: float | Sequence[float] = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        nonfinite: str = "raise",
        weight_rounding: str | None = None,
        state_dtype: str = "float32",
        grad_accumulation_dtype: str | None = None,
        optimizer_in_backward: bool = False,
        kernels: str | None = None,
        state_offload: bool = False,
    ) -> MoLFAdamW:
        """Build the optimizer for any module with linear layers, or with a LoRA adapter on them.

        Args:
            model: The model, plain or with a PEFT LoRA adapter whose rank is the sum of
                `config.ranks`. It is not wrapped. Parameters that `config` freezes get
                `requires_grad=False`.
            config: Settings of the method; default `MoLFConfig()`.
            lr: Learning rate of the full experts and of parameters that are not routed.
            lora_lr: Learning rate of the LoRA experts, one number or one per rank; None: `lr`.
            weight_decay: Decay of routed weights, embeddings, an untied head and other matrices.
                Biases, norms, vectors, rates of state-space layers (`A_log`) and parameters that
                the model marks have none (`molf.core.model.decay`).
            lora_weight_decay: Decay of the LoRA factors, one number or one per rank.
            betas: Decay rates of the moments.
            eps: Added to the denominator of a step.
            nonfinite: Reaction, before anything is written, to a gradient with infinity or NaN, to
                one whose moments would overflow, and to a `require_finite` loss that is not finite.
                `"raise"`: raise a RuntimeError. `"skip"`: skip the step and count it in
                `skipped_steps`; the first one warns.
            weight_rounding: Rounding of bfloat16 weights. `"exact"` (default): the low 16 bits of
                the float32 value are in the optimizer's state. `"stochastic"`: unbiased, drawn from
                `config.seed`, parameter name and step. `"nearest"`: loses small updates.
            state_dtype: `"float32"`, or `"8bit"`: moments of dense matrices with at least 4,096
                elements are 8-bit (torchao), with one scale per 64 to 256 numbers of a row.
            grad_accumulation_dtype: `"float32"`: gradients of bfloat16 weights are accumulated in
                float32.
            optimizer_in_backward: Whether each layer is routed and updated during the backward
                pass, as soon as its gradients are complete, and the gradients are freed. Call
                `step` after each backward pass. Accumulation, clipping and `nonfinite="skip"` are
                refused. The host waits once per layer.
            kernels: `"triton"`: Triton kernels (`molf.core.execute.triton`; a plain model on CUDA,
                float32 or bfloat16 weights, float32 states), not yet run on a GPU. None and
                `"eager"`: torch operations.
            state_offload: Whether the state of parameters on CUDA, folded LoRA factors included, is
                in pinned host memory and copied to the device layer by layer: the same bits in less
                memory and more time. The host waits once per layer. Not with `"triton"`; not yet
                run on a GPU.

        Raises:
            ValueError: A value is not allowed, no layer can be routed (`find_layers`,
                `find_adapted`), `weight_rounding` applies to no weight, or DDP waits for the
                gradient of a parameter that `config` freezes.
            ImportError: `state_dtype="8bit"` without torchao, or `kernels="triton"` without triton.
            TypeError: `model` is not a module, or `config` not a `MoLFConfig`.
        """
        config = MoLFConfig() if config is None else config
        for name, value, kind in (("model", model, nn.Module), ("config", config, MoLFConfig)):
            if not isinstance(value, kind):
                raise TypeError(
                    f"Invalid {name} of type {type(value).__name__}. Must be {kind.__name__}."
                )
        options = OptimizerOptions(
            weight_rounding=weight_rounding,
            state_dtype=state_dtype,
            grad_accumulation_dtype=grad_accumulation_dtype,
            optimizer_in_backward=optimizer_in_backward,
            state_offload=state_offload,
            kernels=kernels,
            nonfinite=nonfinite,
        )
        groups = build_groups(
            model,
            config,
            lr=lr,
            lora_lr=lora_lr,
            weight_decay=weight_decay,
            lora_weight_decay=lora_weight_decay,
        )
        trained = {parameter for group in groups for _, parameter in group["params"]}
        check_ddp_waits_for(model, trained)
        optimizer = cls(
            groups, lr, betas, eps, weight_decay, seed=config.seed, **options.as_keywords()
        )
        keep_differentiable(model)  # an evaluation between steps must not re-pack 4-bit weights
        optimizer.coverage = cover(model, optimizer.param_groups, config)
        optimizer._owners = Owners(model, optimizer.param_groups)
        owned = set(optimizer._parameters())
        for parameter in model.parameters():
            if parameter not in owned:  # by freeze_base or freeze_rest, or of another adapter
                parameter.requires_grad_(False)
        return optimizer

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one with a `layer` is a routed layer, with the keys of `from_model`.

        Raises:
            ValueError: A value is not allowed, or a layer of this name is in the optimizer.
        """
        if isinstance(param_group, dict):
            self._check_score_options(param_group)
            layer = param_group.get("layer")
            # Decisions, counts and draws are kept by name.
            if layer is not None and any(own["layer"] == layer for own in self.param_groups):
                raise ValueError(f"Layer {layer!r} is in the optimizer already. Rename the group.")
        super().add_param_group(param_group)

    def _check_saved_group(self, group: dict[str, Any]) -> None:
        super()._check_saved_group(group)
        self._check_score_options(group)

    def _check_score_options(self, group: dict[str, Any]) -> None:
        """Refuse a score that these options of the optimizer do not support."""
        if group.get("layer") is None or "score" not in group:
            return
        check_exclusions(
            {
                **score_exclusions(group["score"]),
                "kernels": self.kernels,
                "optimizer_in_backward": self.optimizer_in_backward,
                "state_offload": self.state_offload,
            }
        )

    def _begin(self) -> None:
        """Reset the results of the last step; `step` and the first gradient call it."""
        super()._begin()
        self.routing = {}
        self._steps += 1
        self._is_first = not self._has_stepped()
        if self._owners is None:  # without owners this alone finds groups that were split
            for group in self._layer_groups():
                check_shapes(group)
        else:
            self._owners.check(self.param_groups, self.state)
            if self._is_first and self._backward is None:
                routed = (p for group in self._layer_groups() for p in group["params"])
                has_any = any(p.grad is not None for p in self._parameters())
                if has_any and all(p.grad is None for p in routed):
                    self._owners.refuse_without_gradients(self.param_groups)

    def _end(self) -> None:
        if self._backward is not None:  # it reaches the last layer first
            names = [group["layer"] for group in self._layer_groups()]
            self.routing = {name: self.routing[name] for name in names if name in self.routing}
        if self._is_first:
            if self._owners is not None and not self.routing and self._has_stepped():
                # Not before: with steps in the backward pass this is known at their end only.
                self._owners.refuse_without_gradients(self.param_groups)
            self._warn_of_missing_gradients()

    def _layer_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["layer"] is not None]

    def _warn_of_missing_gradients(self) -> None:
        """Warn of layers without a gradient in the first step, which may never get one."""
        groups = {group["layer"]: group for group in self._layer_groups()}
        missing = without_gradient(list(groups), self.routing)
        if not missing:
            return
        what = (
            f"{len(missing)} of {len(groups)} routed layers have no gradient in the first step "
            f"(first: {missing[0]})"
        )
        is_trained = any(p.requires_grad for name in missing for p in groups[name]["params"])
        if is_trained and not self._has_stepped():
            what += (
                ", nor has any other parameter: call loss.backward() before step(), on the loss of "
                "the model that the optimizer was built from."
            )
        else:
            what += ", and are not updated without one."
            if self._owners is not None:
                what += f" {self._owners.why_without_gradient([groups[x] for x in missing])}"
        warn(what)

    def _units_of(self, number: int, group: dict[str, Any]) -> list[Unit]:
        """Return the units of a group; a routed layer is one unit."""
        if group["layer"] is None:
            return super()._units_of(number, group)
        return [LayerUnit(UnitKey(number, None), group, group["params"])]

    def _finish(self, outcome: Outcome) -> None:
        self.routing |= outcome.routing
        for layer, decision in outcome.routing.items():
            if layer not in self._history:
                self._history[layer] = LayerHistory(decision.scores)
            self._history[layer].add(self._steps, decision.winners, decision.scores)

    @property
    def evidence(self) -> dict[str, Evidence]:
        """Counts of the decisions so far, by layer; part of `state_dict`.

        A routed layer without any decision has an entry too. Torch's distributed checkpoints leave
        the counts out where they flatten the state (`flatten_optimizer_state_dict`).
        """
        none = Evidence(decisions=0, wins=())
        counted = {name: history.evidence() for name, history in self._history.items()}
        return {group["layer"]: counted.get(group["layer"], none) for group in self._layer_groups()}

    @property
    def model(self) -> nn.Module | None:
        """The model that `from_model` was given, without wrappers; None if it was deleted."""
        return None if self._owners is None else self._owners.model

    def _complete(self, groups: list[dict[str, Any]]) -> None:
        """Add the counts of each layer's decisions to the groups of a state that is saved."""
        super()._complete(groups)
        for group in groups:
            if history := self._history.get(group["layer"]):
                group[_HISTORY] = [self._steps, list(history.experts), *history.as_values()]

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with the counts of its decisions; `AdamW.load_state_dict` has the errors."""
        super().load_state_dict(state_dict)
        self._history, self._steps = {}, 0
        for group in self.param_groups:
            if (saved := group.pop(_HISTORY, None)) is not None:  # older states have none
                self._steps, experts, *values = saved
                self._history[group["layer"]] = LayerHistory.of_values(experts, values)

    def lora_factors(self, layer: str) -> list[tuple[Tensor, Tensor]]:
        """Return copies of a layer's factors, one (A [r, in], B [out, r]) per LoRA expert.

        With `state_offload` they are in host memory. The factors of a sharded layer are gathered:
        every process must call it.

        Raises:
            ValueError: No routed layer has this name.
        """
        with torch.no_grad():
            local = self._local_parts_of(layer)
            return local.units[0].read_factors(local.states)

    def set_lora_factors(self, layer: str, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Replace a layer's factors.

        In the folded form `W_eff` stays and W changes; in the adapter form the adapter changes.
        With sharded parameters every process must call it, with the same whole factors.

        Args:
            layer: Name of a routed layer.
            factors: (A [r, in], B [out, r]) for each LoRA expert.

        Raises:
            ValueError: No routed layer has this name, or shapes differ.
        """
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
            local = self._local_parts_of(layer)
            local.units[0].write_factors(local.states, *stacked)
            local.store()
            if self.offload is not None:  # new tensors are on the parameter's device
                parameters = self._layer_unit(layer).parameters
                self.offload.keep_all({p: self.state.get(p, {}) for p in parameters})

    def _local_parts_of(self, layer: str) -> LocalParts[LayerUnit]:
        return LocalParts([self._layer_unit(layer)], self._settled_state())

    def _layer_unit(self, layer: str) -> LayerUnit:
        for number, group in enumerate(self.param_groups):
            if group["layer"] is not None and group["layer"] == layer:
                return LayerUnit(UnitKey(number, None), group, group["params"])
        names = [group["layer"] for group in self._layer_groups()]
        raise ValueError(f"No routed layer {layer!r}. Routed are: {', '.join(names[:8])}, ...")

    def __repr__(self) -> str:
        """Return a summary in one line, not one per layer."""
        routed = self._layer_groups()
        first = readable(routed[0])
        rest = sum(len(group["params"]) for group in self.param_groups if group["layer"] is None)
        return (
            f"{type(self).__name__}({len(routed)} routed layers, ranks={list(first['ranks'])}, "
            f"score={first['score']!r}, top_k={first['top_k']}, lr={first['lr']:g}, "
            f"lora_lr={[first['lr'] * ratio for ratio in first['lora_lr_ratios']]}, "
            f"{rest} other parameters)"
        )
