"""AdamW for weights of any precision; base class of `MoLFAdamW`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from molf.core.accumulation import accumulate_in_float32
from molf.core.adam import gradient
from molf.core.executor import Executor
from molf.core.executors import executor_of
from molf.core.fidelity import UpdateFidelity, UpdateTally
from molf.core.groups import check_group, name_by_place, parameter_name
from molf.core.guard import NonFiniteError, unusable
from molf.core.hyper_parameters import readable, separate, storable
from molf.core.in_backward import (
    BackwardSteps,
    check_in_backward,
    check_no_float16,
    check_no_scaler,
    release,
)
from molf.core.kernels import (
    check_float32_moments,
    check_kernel_group,
    known_kernels,
)
from molf.core.loading import fitted, is_fitted, loadable
from molf.core.moments import block_of_8bit, check_state_dtype
from molf.core.offload import StateOffload
from molf.core.one_by_one import take_one_by_one
from molf.core.processes import check_processes
from molf.core.routed import States
from molf.core.step import Outcome, take_step
from molf.core.storage import (
    LOW,
    check_known_rounding,
    check_rounding,
    fold_low,
    rounding_of,
    stored_values,
)
from molf.core.unit import PlainUnit, Unit, UnitKey
from molf.core.warn import warn

_log = logging.getLogger(__name__)


class AdamW(Optimizer):
    """AdamW with decoupled decay, as `torch.optim.AdamW`, for weights of any precision.

    Steps are computed in float32 (float64 for float64 weights). bfloat16 weights are exact by
    default: the low 16 bits of their float32 values are in the optimizer's state, and training
    equals float32 training bit for bit, given the same gradients. Compare `MoLFAdamW` with it: both
    share their code. A complex parameter takes the steps of its real and imaginary parts.
    `torch.compile` does not trace `step`.

    Args:
        params: Parameters or parameter groups, with or without names.
        lr: Learning rate: a number, or a tensor with one element, which schedulers write in place;
            each group has its own. The same holds for `eps` and `weight_decay`.
        betas: Decay rates of the first and second moments.
        eps: Added to the denominator of a step.
        weight_decay: Decoupled decay.
        weight_rounding: Rounding of bfloat16 weights: `"exact"`, `"stochastic"` (unbiased, drawn
            from seed, parameter name and step) or `"nearest"` (loses small updates). None: exact
            for bfloat16 weights; float32 weights are not rounded.
        state_dtype: `"float32"`, or `"8bit"`: moments of matrices with at least 4,096 elements are
            8-bit (torchao), with one scale per 64 to 256 numbers of a row.
        seed: Seed of stochastic rounding.
        nonfinite: Reaction, before anything is written, to a gradient with infinity or NaN, to one
            whose moments would overflow, and to a `require_finite` loss that is not finite.
            `"raise"`: raise a RuntimeError (`NonFiniteError`). `"skip"`: skip the step and count it
            in `skipped_steps`; the first one warns.
        grad_accumulation_dtype: `"float32"`: gradients of bfloat16 weights are accumulated in
            float32; one process only. None: in bfloat16.
        optimizer_in_backward: Whether every parameter (all of a routed layer together) is updated
            during the backward pass, as soon as its gradient is complete, and the gradient is
            freed. Call `step` after each backward pass. Accumulation, clipping, loss scaling
            (float16), several processes and `nonfinite="skip"` are refused. The host waits for the
            device once per layer.
        kernels: `"triton"`: Triton kernels of `molf.core.fused` (CUDA, float32 or bfloat16 weights,
            float32 states), not yet run on a GPU. None and `"eager"`: torch operations.
        state_offload: Whether the state of parameters on CUDA is in pinned host memory and copied
            to the device layer by layer: the same bits in less memory and more time. The host waits
            for the device once per layer. Not with `"triton"`; not yet run on a GPU.

    Attributes:
        skipped_steps: Number of steps that `nonfinite="skip"` has skipped.
        step_was_skipped: Whether the last step was skipped.
        on_skipped: If set, called with the reason of each skipped step; replaces the warning.
        executor: Runs the operations of a step; copies of the optimizer get a copy.
        measure_updates: If True, `update_fidelity` is measured in each step.

    Raises:
        ValueError: A value is not allowed, or `weight_rounding` applies to no weight.
        ImportError: `state_dtype="8bit"` without torchao, or `kernels="triton"` without triton.
    """

    step_was_skipped = False
    _has_warned_of_no_gradient = False

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
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"Invalid nonfinite={nonfinite!r}. Must be 'raise' or 'skip'.")
        if grad_accumulation_dtype not in (None, "float32"):
            raise ValueError(
                f"Invalid grad_accumulation_dtype={grad_accumulation_dtype!r}. "
                "Must be 'float32' or None."
            )
        if optimizer_in_backward:
            check_in_backward(nonfinite, grad_accumulation_dtype)
        self.kernels = known_kernels(kernels)
        if state_offload and self.kernels == "triton":
            raise ValueError(
                "kernels='triton' does not support state_offload=True: the kernels go through all "
                "states at once. Leave one of them out."
            )
        self.state_offload = state_offload
        self.grad_accumulation_dtype = grad_accumulation_dtype
        self.optimizer_in_backward = optimizer_in_backward
        self.nonfinite = nonfinite
        self.skipped_steps = 0
        self.on_skipped: Callable[[str], None] | None = None
        self.measure_updates = False
        self._tally: UpdateTally | None = None
        self._required: dict[str, Tensor] = {}
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
        super().__init__(params, defaults)
        check_rounding(self._parameters(), weight_rounding)
        _warn_of_rounding(self.param_groups)
        if state_dtype == "8bit" and not any(self._in_8bit(group) for group in self.param_groups):
            warn(
                "state_dtype='8bit' changes nothing: no trained tensor has 4,096 or more elements "
                "in rows that blocks of 64 to 256 divide (LoRA factors are never 8-bit)."
            )
        self._prepare()
        if self._offload and not any(map(self._offload.moves, self._parameters())):
            warn("state_offload=True is without effect: no trained parameter is on CUDA.")
        how = "the Triton kernels" if self.kernels == "triton" else "eager torch operations"
        if self._offload:
            how += ", and keeps its state in host memory"
        _log.info("%s takes its steps with %s.", type(self).__name__, how)

    def _prepare(self) -> None:
        """Set up the executor, the hooks and the offload; also after a copy or unpickling."""
        self._check_processes()
        if not hasattr(self, "executor"):
            self.executor: Executor = executor_of(self.kernels)
        # GradScaler then calls `step` with its attributes, and `check_no_scaler` refuses it by
        # name. Otherwise it would raise an error about missing gradients.
        self._step_supports_amp_scaling = self.optimizer_in_backward
        if hasattr(self, "_backward"):  # a shallow copy, which shares hooks and offload
            if self._backward is not None:
                self._backward.share(self)
            return
        self._backward: BackwardSteps | None = None
        self._offload = StateOffload() if self.state_offload else None
        if self._offload is not None:
            self._offload.keep_all(self.state)
        release(self._parameters(), self)
        if self.optimizer_in_backward:
            self._backward = BackwardSteps(self)
        self._follow()

    def _check_processes(self) -> None:
        check_processes(
            self._parameters(),
            optimizer_in_backward=self.optimizer_in_backward,
            grad_accumulation_dtype=self.grad_accumulation_dtype,
        )

    def _follow(self) -> None:
        """Prepare the current parameters of the groups; libraries may have replaced them."""
        if self.grad_accumulation_dtype is not None:
            accumulate_in_float32(self._parameters())
        if self._backward is not None:
            self._backward.watch()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; without a `layer` its parameters, linear layers included, are not routed.

        Parameters without names are named by position if others have names.

        Raises:
            ValueError: A hyper-parameter is out of range, or a parameter is a conjugate view.
        """
        if not isinstance(param_group, dict):
            return super().add_param_group(param_group)  # raises
        own_rounding = param_group.get("weight_rounding")  # without the optimizer's default
        before = list(self.param_groups)
        nameless = [group for group in before if "param_names" not in group]
        try:
            name_by_place(param_group, before)
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            check_group(group)
            separate(group, before)
            check_known_rounding(group["weight_rounding"])
            check_rounding(group["params"], own_rounding)
            check_state_dtype(group["state_dtype"])
            if self.kernels == "triton":
                check_kernel_group(group, len(before), self._home())
            if self.optimizer_in_backward:
                check_no_float16(group["params"])
            if hasattr(self, "_backward"):  # after the constructor, which does this for all groups
                release(group["params"], self)
                self._follow()
        except Exception:
            self.param_groups[:] = before
            for group in nameless:
                group.pop("param_names", None)
            raise

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the closure's loss, or None.

        The host waits for the device once; with `state_offload` once per layer. With
        `optimizer_in_backward` it updates the remaining layers and ends the backward pass.

        Args:
            closure: Computes the loss and its gradients; called first, with gradients enabled.

        Raises:
            RuntimeError: A gradient is infinite or NaN, its moments would overflow, or a number of
                `require_finite` is not finite, and `nonfinite="raise"`. Nothing was written (with
                `optimizer_in_backward`: nothing of its layer). Also for sparse gradients.
            ValueError: An option does not support several processes; or a learning rate, decay or
                beta is not a valid number.
        """
        if self._backward is not None:
            check_no_scaler(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_later = any(self.state.values())
        if self._backward is None:
            has_gradient = any(p.grad is not None for p in self._parameters())
            self._begin()
            taken = self._take(self._units())
        else:
            has_gradient, taken = self._backward.finish() > 0, True
            self._take_over(self._backward.owner)
        self._end_step()
        if is_later and not has_gradient:
            self._warn_of_no_gradient()
        if taken:
            self._end()
        self._follow()
        return loss

    @torch._disable_dynamo
    def require_finite(self, loss: Tensor, grad_norm: Tensor | None = None) -> None:
        """Refuse the next step, as for a bad gradient, if the loss is not finite.

        The number is checked in `step`, without a further wait of the host.

        Args:
            loss: Loss of all micro-batches of the step, 0-dim.
            grad_norm: Norm of the step's gradients, 0-dim, if known.

        Raises:
            ValueError: `optimizer_in_backward=True`: layers are updated before `step`.
        """
        # A loss of NaN may have finite gradients.
        if self._backward is not None:
            raise ValueError(
                "require_finite is not possible with optimizer_in_backward=True: layers move "
                "before step(). Check the loss before loss.backward()."
            )
        self._required = {"loss": loss.detach()}
        if grad_norm is not None:
            self._required["grad_norm"] = grad_norm.detach()

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as torch does; discard an interrupted backward pass."""
        super().zero_grad(set_to_none)
        self._required = {}
        if self._backward is not None:
            self._backward.close()
            self._end_step()
        self._follow()

    def _begin(self) -> None:
        """Reset the results of the last step; `step` and the first gradient call it."""
        self._check_processes()
        self._tally = UpdateTally() if self.measure_updates else None
        self.step_was_skipped = False

    def _end_step(self) -> None:
        """Wait until offloaded state is back on the host."""
        if self._offload is not None:
            self._offload.end_step()

    def _take(self, units: Iterable[Unit]) -> bool:
        """Step the units that have gradients.

        Returns:
            False if the step was skipped.
        """
        units = [unit for unit in units if unit.takes_part()]
        required, self._required = self._required, {}
        self._check_kinds(units)
        self._fit_states(units)
        if self._offload is None:
            outcome = take_step(units, self.state, self.executor, self._tally, required)
        else:
            outcome = take_one_by_one(
                units, self.state, self._offload, self.executor, self._tally, required
            )
        if outcome.is_refused:
            self._settled_state()  # the caller may catch the error and read it
            self._refuse(outcome.bad, {name: required[name] for name in outcome.wrong})
        self._finish(outcome)
        return not outcome.is_refused

    def _check_kinds(self, units: Iterable[Unit]) -> None:
        """Refuse gradients that are sparse, sharded or on the meta device."""
        for parameter in (p for unit in units for p in unit.parameters):
            if parameter.grad is not None and (reason := unusable(parameter)):
                raise RuntimeError(f"The gradient of {self._name_of(parameter)} {reason}")

    def _fit_states(self, units: Iterable[Unit]) -> None:
        """Convert the state of parameters whose dtype has changed, as `module.double()` does."""
        for unit in units:
            for place, parameter in enumerate(unit.parameters):
                state = self.state.get(parameter)
                if not state or is_fitted(parameter, state):
                    continue
                self._settled_state()
                number, position = unit.key
                new = fitted(state, unit.group, place if position is None else position, number)
                state.clear()
                state.update(_plain(new))
                self._restore(parameter, new)

    def _end(self) -> None:
        """Run after a completed step; no-op here."""

    def _take_over(self, other: AdamW | None) -> None:
        """Copy the results of a step from the optimizer that took it (this is a shallow copy)."""
        for key in self._OF_STEP:
            setattr(self, key, getattr(other, key))

    def _warn_of_no_gradient(self) -> None:
        if not self._has_warned_of_no_gradient:
            self._has_warned_of_no_gradient = True
            warn(
                "No parameter has a gradient in this step, so none was updated: call "
                "loss.backward() between zero_grad() and step(). Later steps are not reported."
            )

    def _units(self, *, to_step: bool = True) -> Iterator[Unit]:
        """Yield all units of the current groups; `to_step` converts their hyper-parameters."""
        for number, group in enumerate(self.param_groups):
            yield from self._units_of(number, readable(group) if to_step else group)

    def _unit_of(self, key: UnitKey) -> Unit:
        """Return one unit for a step."""
        # The other units of its group are not created: a group may have thousands.
        group = readable(self.param_groups[key.group])
        if key.position is None:
            (unit,) = self._units_of(key.group, group)
            return unit
        return PlainUnit(key, group, [group["params"][key.position]])

    def _units_of(self, number: int, group: dict[str, Any]) -> list[Unit]:
        """Return the units of a group; here every parameter is one unit."""
        return [
            PlainUnit(UnitKey(number, position), group, [parameter])
            for position, parameter in enumerate(group["params"])
        ]

    def _take_and_free(self, key: UnitKey) -> None:
        """Step a unit and free its gradients."""
        unit = self._unit_of(key)
        self._take([unit])
        unit.free_gradients()

    def _finish(self, outcome: Outcome) -> None:
        """Store the outcome of a step; no-op here."""

    @property
    def update_fidelity(self) -> UpdateFidelity | None:
        """Share of the last step's updates lost to rounding; None if not measured.

        The host waits for the device.
        """
        return self._tally.result() if self._tally else None

    @torch.no_grad()
    def float32_weights(self) -> dict[Tensor, Tensor]:
        """Return copies of all bfloat16 parameters as float32, low halves included.

        Use them for a float32 checkpoint.
        """
        states = self._settled_state()
        return {
            parameter: stored_values(parameter, states.get(parameter) or {})
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.dtype == torch.bfloat16
        }

    @torch.no_grad()
    def restore_float32(self) -> None:
        """Convert bfloat16 parameters to float32 in place; remove the low halves from the state.

        One parameter at a time, so that memory does not grow. With `state_offload` the parameters
        are in host memory afterwards. The optimizer must not step any more.
        """
        states = self._settled_state()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = states.get(parameter) or {}
                if parameter.dtype != torch.bfloat16 or LOW not in state:
                    continue
                low = state.pop(LOW)
                high = parameter.detach().to(low.device)
                # `.data` keeps the parameter object, and with it tied weights.
                parameter.data = stored_values(high, {LOW: low})

    def reset_low_halves(self) -> None:
        """Set the low halves to zero: the float32 values become the bfloat16 parameters.

        Call it after the parameters were replaced. Without it the next step starts up to half a
        unit in the last place away from the new values.
        """
        for state in self._settled_state().values():
            if LOW in state:
                state[LOW].zero_()

    def _settled_state(self) -> States:
        """Wait until offloaded state is back on the host; return the state."""
        if self._offload is not None:
            self._offload.finish()
        return self.state

    def _refuse(self, bad: list[Tensor], wrong: Mapping[str, Tensor]) -> None:
        """Raise, or count a skipped step."""
        # A bad loss is the cause of bad gradients; a bad norm is their consequence.
        if "loss" in wrong or not bad:
            name, number = next(iter(wrong.items()))
            reason = f"Non-finite {name.replace('grad_norm', 'gradient norm')} ({number.item()})"
        else:
            reason = self._describe(bad)
        if self._backward is not None:
            raise NonFiniteError(
                f"{reason}; it has not moved, but {self._backward.count()} layers and other "
                "parameters whose gradients came before it in this backward pass have "
                "(optimizer_in_backward=True)."
            )
        message = f"{reason}; no weight and no state was changed."
        if self.nonfinite == "raise":
            raise NonFiniteError(message + " nonfinite='skip' would skip such steps.")
        self.skipped_steps += 1
        self.step_was_skipped = True
        if self.on_skipped is not None:
            self.on_skipped(reason)
        elif self.skipped_steps == 1:
            warn(f"{message} Step skipped; later ones are only counted, in skipped_steps.")

    def _describe(self, bad: list[Tensor]) -> str:
        """Return a message with the names of the bad gradients and the reason."""
        nonfinite = [p for p in bad if not gradient(p).isfinite().all()]
        named = nonfinite or bad
        names = [self._name_of(parameter) for parameter in named[:3]]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        if nonfinite:
            return f"Non-finite gradient in {', '.join(names)}{more}"
        return (
            f"Gradient too large in {', '.join(names)}{more} (finite, but its moments or those of "
            "the LoRA factors would overflow)"
        )

    def _name_of(self, parameter: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    return self._name(number, position)
        raise KeyError("the parameter is not in this optimizer")

    def _name(self, group_number: int, position: int) -> str:
        return parameter_name(self.param_groups[group_number], position, group_number)

    def _home(self) -> torch.device:
        """Return the device of the first parameter."""
        return next((p.device for p in self._parameters()), torch.device("cpu"))

    @staticmethod
    def _in_8bit(group: dict[str, Any]) -> bool:
        """Return whether a group has a tensor with 8-bit moments under `state_dtype="8bit"`."""
        dense = group["params"]
        if group.get("adapter_scaling") is not None:
            dense = dense[:-2]
        return any(block_of_8bit(parameter) for parameter in dense)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as `torch.optim.Optimizer` does; wait for offloaded state."""
        self._settled_state()
        packed = super().state_dict()
        for group in packed["param_groups"]:  # copies that torch made
            group.update({key: storable(value) for key, value in group.items()})
        return packed

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; tensors keep their bits if the dtype of the arithmetic is the same.

        Otherwise moments and factors are converted, and low halves are joined with the weights,
        which must be loaded before. A state of `torch.optim.AdamW` without amsgrad is accepted.
        Parameters keep their names.

        Raises:
            ValueError: The saved groups have other layers, ranks or scalings; parameters have other
                names or shapes (an adapter's own name may differ); a value is out of range; the
                state is another optimizer's; or moments are 8-bit with `kernels="triton"`.
        """
        # torch's `load_state_dict` casts floating-point state to the parameter's dtype, which would
        # round float32 moments of bfloat16 weights, and moves it to the parameter's device, which
        # may have no room for an offloaded state. So torch loads the state without its tensors.
        loaded: dict[str, Any] = {}

        def capture_last(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            loaded.update(loadable(given, self.param_groups))
            if self.kernels == "triton":
                for group in loaded["param_groups"]:
                    check_float32_moments(group)
            own = {i for group in loaded["param_groups"] for i in group["params"]}
            plain = {i: _plain(s) if i in own else s for i, s in loaded["state"].items()}
            return {**loaded, "state": plain}

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
        self._settled_state()
        for number, group in enumerate(self.param_groups):
            separate(group, self.param_groups[:number])
        saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
        lost = []
        for saved_id, parameter in zip(saved_ids, self._parameters(), strict=True):
            if not self._restore(parameter, loaded["state"].get(saved_id, {})):
                lost.append(parameter)
        if lost:
            warn(
                f"The lower halves of {len(lost)} bfloat16 weights of the saved state are not used "
                f"(first: {self._name_of(lost[0])}): they belong to other weights. Load the model "
                "before the optimizer."
            )

    def _restore(self, parameter: Tensor, values: Mapping[str, Any]) -> bool:
        """Copy tensors into a parameter's state; join low halves with a parameter not bfloat16.

        Returns:
            False if low halves were dropped, because they belong to other values.
        """
        for key, value in values.items():
            if isinstance(value, Tensor):
                # A copy, also on the same device: two optimizers must not share state.
                self.state[parameter][key] = (
                    self._offload.keep(parameter, value)
                    if self._offload is not None
                    else value.to(parameter.device, copy=True)
                )
            elif value == {}:
                # Flattened distributed checkpoints load {} for values that were not saved.
                del self.state[parameter][key]
        if LOW not in self.state.get(parameter, {}) or parameter.dtype == torch.bfloat16:
            return True
        low = self.state[parameter].pop(LOW)
        return fold_low(parameter, low.to(parameter.device))

    def __copy__(self) -> AdamW:
        """Return an optimizer that shares parameters, groups and state, as torch does.

        It also shares the hooks of `optimizer_in_backward`: a layer is updated once, and `step` of
        either optimizer ends the pass.
        """
        copied = type(self).__new__(type(self))
        copied._backward, copied._offload = self._backward, self._offload
        copied.__setstate__(self.__getstate__())
        return copied

    _OF_STEP: tuple[str, ...] = ("_tally",)
    _OWN: tuple[str, ...] = (
        "nonfinite",
        "skipped_steps",
        "step_was_skipped",
        "_has_warned_of_no_gradient",
        "measure_updates",
        "grad_accumulation_dtype",
        "optimizer_in_backward",
        "kernels",
        "executor",
        "state_offload",
        "_tally",
    )

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles."""
        self._settled_state()
        return {**super().__getstate__(), **{key: getattr(self, key) for key in self._OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes; add keys that groups of other checkpoints lack."""
        self._required = {}
        self.__dict__.setdefault("on_skipped", None)
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("layer", None)
        for group, replaced in zip(self.param_groups, before, strict=False):
            for key, value in replaced.items():
                group.setdefault(key, value)
        if not before:  # a copy or an unpickled optimizer
            self._prepare()
        elif hasattr(self, "_backward"):
            if self._backward is not None and self._backward.leave(self):
                # This shallow copy no longer shares groups and state.
                del self._backward
                self._prepare()
            self._follow()


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's state without its tensors."""
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def _warn_of_rounding(groups: Sequence[dict[str, Any]]) -> None:
    pairs = [(p, group["weight_rounding"]) for group in groups for p in group["params"]]
    nearest = {p.dtype for p, rounding in pairs if rounding_of(p, rounding) == "nearest"}
    for dtype in nearest:
        way_out = "Leave weight_rounding out: bfloat16 weights are then exact."
        if dtype != torch.bfloat16:
            way_out = "Load the model in bfloat16, whose weights can be exact, or in float32."
        warn(
            f"Trained weights are {dtype} and rounded to nearest, so small updates are lost (at lr "
            f"2e-5, most of them). {way_out}"
        )
