"""AdamW with the optimizer's own storage of weights and moments, of any precision."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from molf.core.assignment.assignment import Assignment
from molf.core.assignment.groups import assignment_groups
from molf.core.execute.kernel_checks import check_float32_moments, check_kernel_group
from molf.core.hyper_parameters import separate, storable
from molf.core.loading import load
from molf.core.model.groups import check_group, dense_parameters, differences, name_by_place
from molf.core.model.quantised import keep_differentiable
from molf.core.options import OptimizerOptions, check_word
from molf.core.schedule.in_backward import check_no_float16, release
from molf.core.schedule.unit_optimizer import UnitOptimizer
from molf.core.step.fidelity import UpdateFidelity
from molf.core.storage.moments import check_state_dtype, warn_without_8bit
from molf.core.storage.sharding import as_sharded, is_sharded, local_part
from molf.core.storage.weights import (
    LOW,
    check_rounding,
    join_in_place,
    stored_values,
    warn_of_nearest,
)
from molf.core.warn import warn

_log = logging.getLogger(__name__)


class AdamW(UnitOptimizer):
    """AdamW with decoupled decay, as `torch.optim.AdamW`, for weights of any precision.

    Steps are computed in float32 (float64 for float64 weights). bfloat16 weights are exact by
    default: the 16 bits that they cannot hold are in the optimizer's state, and training follows
    float32 training bit for bit, given the same gradients. This is full fine-tuning to compare
    `MoLFAdamW` with: both are made of the same code. A complex parameter takes the steps of its
    real and imaginary parts. `torch.compile` does not trace `step`.

    Args:
        params: Parameters or parameter groups, with or without names.
        lr: Learning rate: a number, or a tensor with one element, which stays one; each group has
            its own, and schedulers write into it. The same holds for `eps` and `weight_decay`.
        betas: Decay rates of the first and second moments.
        eps: Added to the denominator of a step.
        weight_decay: Decoupled decay.
        weight_rounding: How bfloat16 weights are written: `"exact"`, `"stochastic"` (unbiased,
            drawn from seed, parameter name and step alone) or `"nearest"` (small updates are lost;
            to compare with). None is exact for bfloat16 weights, and nothing for float32 ones.
        state_dtype: `"float32"`, or `"8bit"`: moments of matrices from 4,096 elements on are
            kept in blocks of 8 bits (torchao), 64 to 256 numbers of a row to a scale.
        seed: Seed of stochastic rounding.
        nonfinite: Reaction, before anything is written, to a gradient with infinity or NaN, to
            one whose moments would overflow, and to a `require_finite` loss that is not finite.
            `"raise"`: raise a RuntimeError (`NonFiniteError`). `"skip"`: skip the whole step and
            count it in `skipped_steps`; the first one warns.
        grad_accumulation_dtype: `"float32"` keeps the gradients of bfloat16 weights in float32, so
            that micro-batches add up without rounding; for one process. None leaves them in
            bfloat16.
        optimizer_in_backward: Whether every parameter (of a routed layer: all together) is updated
            during the backward pass, as soon as its gradient is complete, and the gradient is
            freed. Call `step` after each backward pass. Refused, because they need all gradients
            at once: accumulation, clipping, loss scaling (float16), several processes,
            `nonfinite="skip"`. The host waits for the device once per layer.
        kernels: `"triton"` Triton kernels (`molf.core.execute.triton`; CUDA, float32 or bfloat16
            weights, float32 states), not yet run on a GPU. None and `"eager"`: torch operations.
        state_offload: Whether the state of parameters on CUDA is in pinned host memory and copied
            to the device layer by layer: the same bits in less memory and more time. The host waits
            for the device once per layer. Not with `"triton"`; not yet run on a GPU.

    Attributes:
        skipped_steps: Number of steps that `nonfinite="skip"` has skipped.
        step_was_skipped: Whether the last step was skipped.
        on_skipped: Called with the reason of each skipped step in place of the one warning, if set.
        executor: Runs the operations of a step; copies of the optimizer get a copy.
        offload: Keeps states in host memory; None without `state_offload`.
        measure_updates: Whether the updates that rounding loses are measured in each step, for
            `update_fidelity`; False at first.

    Raises:
        ValueError: A value is not allowed, or `weight_rounding` applies to no weight.
        ImportError: `state_dtype="8bit"` without torchao, or `kernels="triton"` without triton.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        weight_rounding: str | None = None,
        state_dtype: str = "float32",
        seed: int = 0,
        nonfinite: str = "raise",
        grad_accumulation_dtype: str | None = None,
        optimizer_in_backward: bool = False,
        kernels: str | None = None,
        state_offload: bool = False,
    ) -> None:
        options = OptimizerOptions(
            weight_rounding=weight_rounding,
            state_dtype=state_dtype,
            grad_accumulation_dtype=grad_accumulation_dtype,
            optimizer_in_backward=optimizer_in_backward,
            state_offload=state_offload,
            kernels=kernels,
            nonfinite=nonfinite,
        )
        options.check_libraries()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_rounding": weight_rounding,
            "state_dtype": state_dtype,
            "seed": seed,
            "layer": None,
        }
        super().__init__(params, defaults, options)
        groups = self.param_groups
        check_rounding(self._parameters(), weight_rounding)
        warn_of_nearest((p, group["weight_rounding"]) for group in groups for p in group["params"])
        if state_dtype == "8bit":
            warn_without_8bit(p for group in groups for p in dense_parameters(group))
        self._prepare()
        if self.offload is not None and not any(map(self.offload.moves, self._parameters())):
            warn("state_offload=True is without effect: no trained parameter is on CUDA.")
        how = "the Triton kernels" if self.kernels == "triton" else "eager torch operations"
        if self.offload is not None:
            how += ", and keeps its state in host memory"
        _log.info("%s takes its steps with %s.", type(self).__name__, how)

    @classmethod
    def from_assignment(
        cls,
        model: nn.Module,
        assignment: Assignment,
        *,
        lr: float | Tensor = 5e-5,
        lora_lr: float | Tensor | None = None,
        weight_decay: float = 0.1,
        lora_weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Build the optimizer of a model that `molf.with_assignment` has prepared.

        All trained parameters are in plain AdamW groups, in this order: weights and other matrices;
        biases, norms and other vectors; LoRA factors; magnitudes of DoRA. Schedulers scale the
        rates of all groups alike.

        Args:
            model: The result of `molf.with_assignment(model, assignment)`.
            assignment: The assignment.
            lr: Learning rate of `full` weights and of the rest.
            lora_lr: Learning rate of the adapter; None: `lr`.
            weight_decay: Decay of weights and of the rest's matrices; biases, norms, vectors and
                parameters that the model marks have none, as with `MoLFAdamW.from_model`.
            lora_weight_decay: Decay of the LoRA factors.
            betas: Decay rates of the moments.
            eps: Added to the denominator of a step.
            seed: Of stochastic rounding.
            **options: The other keywords of `AdamW`: `weight_rounding`, `state_dtype` (of the dense
                weights: moments of LoRA factors are float32), `nonfinite`,
                `grad_accumulation_dtype`, `optimizer_in_backward`, `kernels`, `state_offload`.

        Raises:
            TypeError: `assignment` is no `Assignment`.
            ValueError: The model was not prepared with this assignment, nothing is trained, or a
                value is not allowed.
            ImportError: An option needs a library that is not installed.

        Warns:
            UserWarning: Parameters are trained that the model does not save: they were made
                trainable after `with_assignment`.
        """
        groups = assignment_groups(
            model,
            assignment,
            lr=lr,
            lora_lr=lora_lr,
            weight_decay=weight_decay,
            lora_weight_decay=lora_weight_decay,
        )
        keep_differentiable(model)  # an evaluation between steps must not re-pack 4-bit weights
        return cls(groups, lr, betas, eps, weight_decay, seed=seed, **options)

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; without a `layer` it takes plain AdamW steps, as linear layers in it do.

        Parameters may come without names beside others that have some: they are named by place.

        Raises:
            ValueError: A hyper-parameter is out of range, a parameter is a conjugate view, or the
                group has an option of torch's optimizers that would change its steps (`maximize`).
        """
        if not isinstance(param_group, dict):
            return super().add_param_group(param_group)  # which refuses it
        own_rounding = param_group.get("weight_rounding")  # not that of the whole optimizer
        before = list(self.param_groups)
        nameless = [group for group in before if "param_names" not in group]
        try:
            name_by_place(param_group, before)
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            check_group(group)
            if other := differences(group):
                raise ValueError(
                    f"Invalid options of a group: {', '.join(other)}. Steps are plain AdamW's."
                )
            separate(group, before)
            check_word("weight_rounding", group["weight_rounding"])
            check_rounding(group["params"], own_rounding)
            check_state_dtype(group["state_dtype"])
            if self.kernels == "triton":
                check_kernel_group(group, len(before), self._home())
            if self.optimizer_in_backward:
                check_no_float16(group["params"])
            if hasattr(self, "_backward"):  # later than the constructor, which does it for all
                release(group["params"], self)
                self._follow()
        except Exception:
            # A rejected group must not stay: the optimizer goes on without it.
            self.param_groups[:] = before
            for group in nameless:
                group.pop("param_names", None)
            raise

    @property
    def update_fidelity(self) -> UpdateFidelity | None:
        """Losses of the last step's updates by rounding; None if they were not measured.

        The host waits for the device.
        """
        return self._tally.result() if self._tally else None

    @torch.no_grad()
    def float32_weights(self) -> dict[Tensor, Tensor]:
        """Return a copy of every bfloat16 parameter's float32 values, lower halves included.

        A checkpoint in float32 should hold these values. Values of sharded parameters are sharded.
        """
        states = self._settled_state()
        return {
            parameter: _float32_of(parameter, states.get(parameter) or {})
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.dtype == torch.bfloat16
        }

    @torch.no_grad()
    def restore_float32(self) -> None:
        """Convert bfloat16 parameters to float32, lower halves included.

        The lower halves leave the state, one parameter after the other, so that exact bfloat16
        weights take no more memory than before. With `state_offload` the parameters are in host
        memory afterwards. The optimizer must not step afterwards.

        Raises:
            RuntimeError: Parameters are sharded.
        """
        if any(map(is_sharded, self._parameters())):
            # fully_shard keeps memory of its own for each parameter.
            raise RuntimeError(
                "restore_float32 is not possible with sharded parameters, whose dtype fully_shard "
                "fixes. float32_weights() returns their values."
            )
        join_in_place(self._parameters(), self._settled_state())

    def reset_low_halves(self) -> None:
        """Set the lower halves to zero.

        Call it after the values of bfloat16 parameters were replaced from outside. Without it the
        next step starts within half a unit in the last place of the new values.
        """
        for state in self._settled_state().values():
            if LOW in state:
                local_part(state[LOW]).zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as `torch.optim.Optimizer` does, after offloaded state is back."""
        self._settled_state()
        # A hook, so that those of users run later: they see all of the state, and may replace it.
        hook = self.register_state_dict_post_hook(
            lambda _, packed: self._complete(packed["param_groups"]), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _complete(self, groups: list[dict[str, Any]]) -> None:
        """Complete the groups of a state that is saved, in place; they are torch's copies."""
        for group in groups:
            group.update({key: storable(value) for key, value in group.items()})

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; every tensor keeps the saved bits, if the arithmetic has the same dtype.

        Otherwise moments and factors are converted, and the lower halves of exact bfloat16 weights
        are added to the weights, which must be loaded before. The state of `torch.optim.AdamW` can
        be loaded too, without amsgrad. Parameters keep the names that they have here.

        Raises:
            ValueError: The saved groups route other layers, or with other ranks or scalings; their
                parameters have other names or shapes (an adapter's own name may differ); a value is
                out of range; the state is another optimizer's; or moments are 8-bit, which the
                kernels cannot use.
            ImportError: Moments are 8-bit, and torchao is not installed.
        """
        self._settled_state()
        load(self, state_dict, super().load_state_dict, self._keep, self._check_saved_group)

    def _check_saved_group(self, group: dict[str, Any]) -> None:
        """Refuse a saved group that the options of this optimizer do not support."""
        if self.kernels == "triton":
            check_float32_moments(group)


def _float32_of(parameter: Tensor, state: dict[str, Any]) -> Tensor:
    """Return a copy of a parameter's float32 values, sharded as it is."""
    local = {key: local_part(value) for key, value in state.items() if key == LOW}
    values = stored_values(local_part(parameter), local)
    if not is_sharded(parameter):
        return values
    return as_sharded(values, parameter, 0, parameter.shape[0])
