"""An optimizer that steps units: all at once, one by one, or in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from molf.core.execute.executors import executor_of
from molf.core.hyper_parameters import readable
from molf.core.loading import (
    convert_state,
    has_step_dtypes,
    restore_tensors,
    without_tensors,
)
from molf.core.model.groups import parameter_name
from molf.core.options import OptimizerOptions
from molf.core.schedule.in_backward import BackwardSteps, check_no_scaler, release
from molf.core.schedule.one_by_one import take_one_by_one
from molf.core.schedule.processes import check_processes, has_processes
from molf.core.step.executor import Executor
from molf.core.step.fidelity import UpdateTally
from molf.core.step.guard import NonFiniteError, describe_bad, describe_number, unusable
from molf.core.step.layer import States
from molf.core.step.local_parts import LocalParts
from molf.core.step.step import Outcome, take_step
from molf.core.step.unit import PlainUnit, Unit, UnitKey
from molf.core.storage.accumulation import accumulate_in_float32
from molf.core.storage.collectives import ALONE, Processes
from molf.core.storage.offload import StateOffload
from molf.core.storage.sharding import (
    cut_dimension,
    cut_like,
    is_sharded,
    sharded_room,
    whole_tensor,
)
from molf.core.warn import warn


class UnitOptimizer(Optimizer):
    """Takes the steps of `molf.AdamW` and `MoLFAdamW`, which document the attributes.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters of groups that set none.
        options: Storage and execution.
    """

    _STEP_RESULTS: tuple[str, ...] = ("_tally",)  # copied by `_take_over`
    _PICKLED: tuple[str, ...] = (
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
    step_was_skipped = False
    _has_warned_of_no_gradient = False

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], options: OptimizerOptions
    ) -> None:
        self.kernels = options.kernels or "eager"
        self.state_offload = options.state_offload
        self.grad_accumulation_dtype = options.grad_accumulation_dtype
        self.optimizer_in_backward = options.optimizer_in_backward
        self.nonfinite = options.nonfinite
        self.skipped_steps = 0
        self.on_skipped: Callable[[str], None] | None = None
        self.measure_updates = False
        self._tally: UpdateTally | None = None
        self._required: dict[str, Tensor] = {}
        super().__init__(params, defaults)

    def _prepare(self) -> None:
        """Set up the executor, hooks and offload; also after copying and unpickling."""
        self._check_processes()
        # A copy keeps the executor of the original, with its caches.
        if not hasattr(self, "executor"):
            self.executor: Executor = executor_of(self.kernels)
        # GradScaler sets attributes on optimizers that declare this, so that `check_no_scaler` can
        # refuse it; its own error would be that there are no gradients.
        self._step_supports_amp_scaling = self.optimizer_in_backward
        if hasattr(self, "_backward"):  # a shallow copy: shares the hooks and the offload
            if self._backward is not None:
                self._backward.add(self)
            return
        self._backward: BackwardSteps | None = None
        self.offload = StateOffload() if self.state_offload else None
        if self.offload is not None:
            self.offload.keep_all(self.state)
        release(self._parameters(), self)
        if self.optimizer_in_backward:
            self._backward = BackwardSteps(self)
        self._follow()

    def _check_processes(self) -> None:
        check_processes(
            self.param_groups,
            self._name_of,
            optimizer_in_backward=self.optimizer_in_backward,
            grad_accumulation_dtype=self.grad_accumulation_dtype,
            state_offload=self.state_offload,
            kernels=self.kernels,
        )

    def _follow(self) -> None:
        """Prepare the parameters that are in the groups now; libraries may have swapped them."""
        if self.grad_accumulation_dtype is not None:
            accumulate_in_float32(self._parameters())
        if self._backward is not None:
            self._backward.watch()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _has_stepped(self) -> bool:
        """Return whether a parameter has taken a step."""
        # A step that was refused may have created states.
        return any((self.state.get(p) or {}).get("step") for p in self._parameters())

    def _home(self) -> torch.device:
        """The device of the first trained parameter."""
        trained = (p.device for p in self._parameters() if p.requires_grad)
        return next(trained, torch.device("cpu"))

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
                With several processes, if no parameter has a gradient.
            ValueError: There are several processes now, and an option is for one; parameters are
                distributed in a way that is not supported; or a rate, a decay or a beta is no
                number that a step can use.
        """
        if self._backward is not None:
            check_no_scaler(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # The first step warns of layers without gradients by itself.
        is_later = self._has_stepped()
        if self._backward is None:
            has_gradient = any(p.grad is not None for p in self._parameters())
            if not has_gradient:
                self._check_processes()
                self._refuse_stale()
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
        reads anyway: the host waits once for all. Each call replaces the one before; `zero_grad`
        may come between it and the step.

        Args:
            loss: The step's loss, of all its micro-batches, 0-dim. With sharded parameters every
                process gives its own, and all refuse the step if one is not finite. With DDP each
                process decides alone: give all the same number, such as the mean.
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
            # clip_grad_norm_ of sharded parameters returns a norm that is a sum to come.
            self._required["grad_norm"] = whole_tensor(grad_norm.detach())

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as torch does; an interrupted backward pass is forgotten."""
        super().zero_grad(set_to_none)
        if self._backward is not None:
            self._backward.close()
            self._end_step()
        self._follow()

    def _begin(self) -> None:
        """Clear the results of the last step; called by `step` and by the first gradient."""
        self._check_processes()
        self._tally = UpdateTally() if self.measure_updates else None
        self.step_was_skipped = False

    def _end_step(self) -> None:
        """Wait until offloaded state is back on the host."""
        if self.offload is not None:
            self.offload.end_step()

    def _take(self, units: Iterable[Unit]) -> bool:
        """Step the units that have gradients.

        Returns:
            Whether it was done; it may be skipped.
        """
        units = [unit for unit in units if unit.takes_part()]
        required, self._required = self._required, {}
        self._check_kinds(units)
        self.executor.check(named for unit in units for named in unit.named_parameters())
        self._convert_states(units)
        if self.offload is not None:
            outcome = take_one_by_one(
                units, self.state, self.offload, self.executor, self._tally, required
            )
            processes: Processes = ALONE
        else:
            local = LocalParts(units, self.state)
            processes = local.processes
            try:
                outcome = take_step(local.units, local.states, self.executor, self._tally, required)
            finally:
                local.store()
            outcome = outcome._replace(bad=local.originals(outcome.bad))
        if outcome.is_refused:
            self._settled_state()  # the caller may catch the error and read it
            wrong = {name: required[name] for name in outcome.wrong}
            self._refuse(outcome.bad, wrong, processes)
        self._finish(outcome)
        return not outcome.is_refused

    def _check_kinds(self, units: Iterable[Unit]) -> None:
        """Refuse, by name, gradients of a kind that no step can use."""
        for parameter in (p for unit in units for p in unit.parameters):
            if parameter.grad is not None and (reason := unusable(parameter)):
                raise RuntimeError(f"The gradient of {self._name_of(parameter)} {reason}")

    def _convert_states(self, units: Iterable[Unit]) -> None:
        """Convert the state of parameters whose dtype has changed, as `module.double()` does."""
        for unit in units:
            for place, parameter in enumerate(unit.parameters):
                state = self.state.get(parameter)
                if not state or has_step_dtypes(parameter, state):
                    continue
                self._settled_state()
                number, position = unit.key
                index = place if position is None else position
                new = convert_state(state, unit.group, index, number)
                state.clear()
                state.update(without_tensors(new))
                restore_tensors(self.state, parameter, new, self._keep)

    def _keep(self, parameter: Tensor, key: str, value: Tensor) -> Tensor:
        """Return a copy of a tensor for a parameter's state: on its device, cut as it is."""
        if self.offload is not None:
            return self.offload.keep(parameter, value)
        if is_sharded(parameter):
            return cut_like(value, parameter, cut_dimension(key))
        if is_sharded(value):
            raise ValueError(
                "The optimizer state is sharded and the parameters are not. Load it with "
                "torch.distributed.checkpoint."
            )
        return value.to(parameter.device, copy=True)

    def room(self, parameter: Tensor, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Allocate a tensor in the memory of a parameter's state, for a checkpoint to be read into.

        Args:
            parameter: A parameter of this optimizer.
            key: Key of the tensor in the parameter's state.
            shape: Shape of the whole tensor.
            dtype: Its dtype.

        Returns:
            The tensor, uninitialised, with the strides of the parameter if it has its shape. It is
            sharded if the parameter is.
        """
        if is_sharded(parameter):
            return sharded_room(parameter, cut_dimension(key), shape, dtype)
        if shape == parameter.shape:
            like = torch.empty_like(parameter, dtype=dtype, device="meta", requires_grad=False)
        else:
            like = torch.empty(shape, dtype=dtype, device="meta")
        if self.offload is not None and self.offload.moves(parameter):
            return self.offload.room(parameter, like)
        return torch.empty_like(like, device=parameter.device)

    def _end(self) -> None:
        """Hook after a completed step; no-op here."""

    def _take_over(self, other: UnitOptimizer | None) -> None:
        """Copy the results of a step from the optimizer that took it, of which this is a copy."""
        for key in self._STEP_RESULTS:
            setattr(self, key, getattr(other, key))

    def _refuse_stale(self) -> None:
        """Refuse a step without gradients if `fully_shard` may have replaced the parameters.

        Raises:
            RuntimeError: There are several processes, or one that may have sharded the model.
        """
        if has_processes():
            raise RuntimeError(
                "No parameter of the optimizer has a gradient. Was it built before fully_shard, "
                "which replaces the parameters of the model? Build it afterwards. Otherwise call "
                "loss.backward() before step()."
            )

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
        """Hook with the outcome of each group of units; no-op here."""

    def _settled_state(self) -> States:
        """The state, after offloaded state is back on the host."""
        if self.offload is not None:
            self.offload.finish()
        return self.state

    def _refuse(
        self, bad: list[Tensor], wrong: Mapping[str, Tensor], processes: Processes = ALONE
    ) -> None:
        """Raise for, or count, a step whose gradients or required numbers are not finite."""
        if "loss" in wrong or not bad:  # else the gradients say more than their norm
            reason = describe_number(*next(iter(wrong.items())), processes)
        else:
            reason = describe_bad(bad, self._name_of, processes)
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

    def _name_of(self, parameter: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    return parameter_name(group, position, number)
        raise KeyError("the parameter is not in this optimizer")

    def __copy__(self) -> Self:
        """Return an optimizer of the same parameters, groups and state, as torch does.

        With steps in the backward pass the hooks are shared too: a layer moves once, and `step` of
        either ends the pass.
        """
        copied = type(self).__new__(type(self))
        copied._backward, copied.offload = self._backward, self.offload
        copied.__setstate__(self.__getstate__())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: torch's part and our own attributes."""
        self._settled_state()
        return {**super().__getstate__(), **{key: getattr(self, key) for key in self._PICKLED}}

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
            if self._backward is not None and self._backward.remove(self):
                # A shallow copy whose groups and state are its own from now on.
                del self._backward
                self._prepare()
            self._follow()
