"""AdamW with the optimizer's own storage of weights and moments, for what is not routed."""

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
        seed: Of stochastic rounding.
        nonfinite: What a gradient does that has infinity or NaN, or is so large that moments would
            overflow, and a loss that `require_finite` was given; it is found before anything is
            written. `"raise"` a RuntimeError (`NonFiniteError`), or `"skip"` the whole step: the
            first warns, and all are counted in `skipped_steps`.
        grad_accumulation_dtype: `"float32"` keeps the gradients of bfloat16 weights in float32, so
            that micro-batches add up without rounding; for one process. None leaves them in
            bfloat16.
        optimizer_in_backward: Whether every parameter (of a routed layer: all together) moves as
            soon as its gradient is complete, during the backward pass, and the gradient is freed.
            `step` after each backward pass only finishes what is left. Nothing that needs all
            gradients at once is possible: accumulation, clipping, loss scaling (float16), several
            processes, `nonfinite="skip"`. The host waits for the device once per layer.
        kernels: `"triton"` takes steps with the Triton kernels of `molf.core.fused` (CUDA, float32
            or bfloat16 weights, float32 states). They have not run on a GPU yet. None and
            `"eager"`: with torch operations.
        state_offload: Whether the state of parameters on CUDA lives in pinned host memory and is on
            the device layer by layer, while a layer takes its step: the same bits in less memory
            and more time. The host waits for the device once per layer. Not with `"triton"`, and
            not run on a GPU yet.

    Attributes:
        skipped_steps: How many steps `nonfinite="skip"` has skipped.
        step_was_skipped: Whether the last one was.
        on_skipped: Called with the reason of each skipped step in place of the one warning, if set.
        executor: Runs the operations of a step; copies of the optimizer get a copy.
        measure_updates: Set it to True, and `update_fidelity` says of each following step what
            rounding has lost.

    Raises:
        ValueError: A value is not allowed, or nothing is there to be rounded as asked.
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
        """Say who computes, how and where things are kept, and when; also for copies."""
        self._check_processes()
        if not hasattr(self, "executor"):
            self.executor: Executor = executor_of(self.kernels)
        # Then GradScaler says that it is there, so that it can be refused; it would only say that
        # there are no gradients.
        self._step_supports_amp_scaling = self.optimizer_in_backward
        if hasattr(self, "_backward"):  # a shallow copy, which shares all that is made here
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
        """Prepare the parameters that are in the groups now; libraries may have swapped them."""
        if self.grad_accumulation_dtype is not None:
            accumulate_in_float32(self._parameters())
        if self._backward is not None:
            self._backward.watch()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; without a `layer` it takes plain AdamW steps, as linear layers in it do.

        Parameters may come without names beside others that have some: they are named by place.

        Raises:
            ValueError: A hyper-parameter is out of range, or a parameter is a conjugate view.
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
            separate(group, before)
            check_known_rounding(group["weight_rounding"])
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
            self.param_groups[:] = before
            for group in nameless:
                group.pop("param_names", None)
            raise

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the closure's loss, or None.

        The host waits for the device once; with `state_offload` once per layer. With
        `optimizer_in_backward` most of the step is taken already, and what is left is finished;
        `zero_grad` and `step` end a backward pass.

        Args:
            closure: Computes the loss and its gradients; called first, with gradients enabled.

        Raises:
            RuntimeError: A gradient is infinite or NaN, or so large that its moments would
                overflow, or what `require_finite` was given is not finite, and `nonfinite="raise"`;
                nothing has been written (with `optimizer_in_backward`: nothing of its layer). Also
                for sparse gradients.
            ValueError: There are several processes now, and an option is for one; or a rate, a
                decay or a beta is no number that a step can use.
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
        """Have the next step refused, as for a bad gradient, if the loss is not finite.

        A loss of NaN may leave finite gradients. The numbers are read with those that the step
        reads anyway: the host waits once for all.

        Args:
            loss: The step's loss, of all its micro-batches, 0-dim.
            grad_norm: The norm of its gradients, if that is known, 0-dim.

        Raises:
            ValueError: `optimizer_in_backward=True`: layers move before `step`.
        """
        if self._backward is not None:
            raise ValueError(
                "require_finite is not possible with optimizer_in_backward=True: layers move "
                "before step(). Look at the loss before loss.backward()."
            )
        self._required = {"loss": loss.detach()}
        if grad_norm is not None:
            self._required["grad_norm"] = grad_norm.detach()

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as torch does; an interrupted backward pass is forgotten."""
        super().zero_grad(set_to_none)
        self._required = {}
        if self._backward is not None:
            self._backward.close()
            self._end_step()
        self._follow()

    def _begin(self) -> None:
        """Forget what the last step has left; `step` and the first gradient call it."""
        self._check_processes()
        self._tally = UpdateTally() if self.measure_updates else None
        self.step_was_skipped = False

    def _end_step(self) -> None:
        """Have all state where it lives."""
        if self._offload is not None:
            self._offload.end_step()

    def _take(self, units: Iterable[Unit]) -> bool:
        """Step the units that have gradients.

        Returns:
            Whether it was done; it may be skipped.
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
        """Refuse, by name, gradients of a kind that no step can use."""
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
        """Look back on a step that was taken: nothing to see here."""

    def _take_over(self, other: AdamW | None) -> None:
        """Show what a step has left on the optimizer that took it, of which this is a copy."""
        for key in self._OF_STEP:
            setattr(self, key, getattr(other, key))

    def _warn_of_no_gradient(self) -> None:
        if not self._has_warned_of_no_gradient:
            self._has_warned_of_no_gradient = True
            warn(
                "No parameter has a gradient in this step, and so none has moved: loss.backward() "
                "comes between zero_grad() and step(). Later steps like this one are not reported."
            )

    def _units(self, *, to_step: bool = True) -> Iterator[Unit]:
        """All units of the groups as they are now; `to_step` reads their hyper-parameters."""
        for number, group in enumerate(self.param_groups):
            yield from self._units_of(number, readable(group) if to_step else group)

    def _unit_of(self, key: UnitKey) -> Unit:
        """One unit, to step; the others of its group are not made."""
        group = readable(self.param_groups[key.group])
        if key.position is None:
            (unit,) = self._units_of(key.group, group)
            return unit
        return PlainUnit(key, group, [group["params"][key.position]])

    def _units_of(self, number: int, group: dict[str, Any]) -> list[Unit]:
        """The units of a group: here every parameter is one."""
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
        """Keep what a subclass wants of a step."""

    @property
    def update_fidelity(self) -> UpdateFidelity | None:
        """What rounding has lost of the last step's updates; None where it was not measured.

        The host waits for the device.
        """
        return self._tally.result() if self._tally else None

    @torch.no_grad()
    def float32_weights(self) -> dict[Tensor, Tensor]:
        """Return a copy of every bfloat16 parameter's float32 values, lower halves included.

        They are what a checkpoint in float32 should hold.
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
        """Turn bfloat16 parameters into the float32 values they stand for, for good.

        The lower halves leave the state, one parameter after the other, so that exact bfloat16
        weights take no more memory than before. A parameter ends up where its lower half was: with
        `state_offload` in host memory. The optimizer must not step afterwards.
        """
        states = self._settled_state()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = states.get(parameter) or {}
                if parameter.dtype != torch.bfloat16 or LOW not in state:
                    continue
                low = state.pop(LOW)
                high = parameter.detach().to(low.device)
                parameter.data = stored_values(high, {LOW: low})  # the same one, so that ties stay

    def reset_low_halves(self) -> None:
        """Forget the lower halves: bfloat16 parameters stand for what they are.

        To be called where their values were replaced for good from outside. Without it the next
        step starts within half a unit in the last place of them.
        """
        for state in self._settled_state().values():
            if LOW in state:
                state[LOW].zero_()

    def _settled_state(self) -> States:
        """The state, once all of it is where it lives."""
        if self._offload is not None:
            self._offload.finish()
        return self.state

    def _refuse(self, bad: list[Tensor], wrong: Mapping[str, Tensor]) -> None:
        """Raise for, or count, a step with gradients or required numbers that are no use."""
        if "loss" in wrong or not bad:  # else the gradients say more than their norm
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
        """Say which gradients are no use, and why."""
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
        """The device of the first parameter."""
        return next((p.device for p in self._parameters()), torch.device("cpu"))

    @staticmethod
    def _in_8bit(group: dict[str, Any]) -> bool:
        """Whether 8-bit moments would be kept for a group."""
        dense = group["params"]
        if group.get("adapter_scaling") is not None:
            dense = dense[:-2]
        return any(block_of_8bit(parameter) for parameter in dense)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as `torch.optim.Optimizer` does, once all of it is where it lives."""
        self._settled_state()
        packed = super().state_dict()
        for group in packed["param_groups"]:  # torch's copies
            group.update({key: storable(value) for key, value in group.items()})
        return packed

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; every tensor keeps the saved bits, if the arithmetic has the same dtype.

        Otherwise moments and factors are converted, and the lower halves of exact bfloat16 weights
        are added to the weights, which must be loaded before. `torch.optim.Optimizer` casts
        floating-point state to the parameter's dtype, which would round float32 factors and moments
        of bfloat16 weights, and moves it all to the parameter's device, where an offloaded state
        may have no room. So it is given none of the tensors. The
        state of `torch.optim.AdamW` is taken too, without amsgrad. Parameters keep the names that
        they have here.

        Raises:
            ValueError: The saved groups route other layers, or with other ranks or scalings; their
                parameters have other names or shapes (an adapter's own name may differ); a value is
                out of range; the state is another optimizer's; or moments are 8-bit, which the
                kernels cannot use.
        """
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
                f"(first: {self._name_of(lost[0])}): the weights here are not those that they "
                "belong to. Load the model before the optimizer."
            )

    def _restore(self, parameter: Tensor, values: Mapping[str, Any]) -> bool:
        """Keep copies of the tensors of a parameter's state; lower halves go where they belong.

        Returns:
            Whether all are of use; lower halves are not, if the parameter has other values.
        """
        for key, value in values.items():
            if isinstance(value, Tensor):
                # A copy, also on the same device: two optimizers never share state.
                self.state[parameter][key] = (
                    self._offload.keep(parameter, value)
                    if self._offload is not None
                    else value.to(parameter.device, copy=True)
                )
            elif value == {}:
                # What flattened distributed checkpoints load where nothing was saved.
                del self.state[parameter][key]
        if LOW not in self.state.get(parameter, {}) or parameter.dtype == torch.bfloat16:
            return True
        low = self.state[parameter].pop(LOW)
        return fold_low(parameter, low.to(parameter.device))

    def __copy__(self) -> AdamW:
        """Return an optimizer of the same parameters, groups and state, as torch does.

        With steps in the backward pass the hooks are shared too: a layer moves once, and `step` of
        either ends the pass.
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
        """Return what copies and pickles hold: torch's part and our own attributes."""
        self._settled_state()
        return {**super().__getstate__(), **{key: getattr(self, key) for key in self._OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and give groups of older or foreign checkpoints the keys they lack."""
        self._required = {}
        self.__dict__.setdefault("on_skipped", None)
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("layer", None)
        for group, replaced in zip(self.param_groups, before, strict=False):
            for key, value in replaced.items():
                group.setdefault(key, value)
        if not before:  # a copy, whose parameters are others
            self._prepare()
        elif hasattr(self, "_backward"):
            if self._backward is not None and self._backward.leave(self):
                # A shallow copy whose groups and state are its own from now on.
                del self._backward
                self._prepare()
            self._follow()


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state without its tensors."""
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
