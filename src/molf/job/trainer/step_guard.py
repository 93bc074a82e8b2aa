"""Skip the step, or end the run, if the loss or a gradient is infinite or NaN.

The optimizers of `molf.core` check loss and gradients in their one host read per step. For torch's
AdamW, loss and norm are read here, once per step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.core.adamw import AdamW
from molf.core.step.guard import NonFiniteError
from molf.core.storage.sharding import is_sharded, local_part, whole_tensor
from molf.job.record.result import DivergedError, RunError
from molf.job.settings.defaults import ADAPTERS
from molf.job.settings.resolved import ResolvedSettings
from molf.job.trainer.callbacks import unwrapped
from molf.ranks import ranks
from molf.shown import listed

_SHOWN = 3  # names in a message


class StepGuard(TrainerCallback):
    """Skips steps with a loss or gradient that is not finite, and averages the other losses.

    The trainer calls it with each loss and to clip gradients. The decision is made after clipping,
    before the optimizer's step.

    Attributes:
        skipped_steps: Number of skipped steps.

    Args:
        settings: The run's settings; `nonfinite` and `max_skipped_steps` are used.
    """

    def __init__(self, settings: ResolvedSettings) -> None:
        self.skipped_steps = 0
        self._settings = settings
        self._in_a_row = 0
        self._has_moved = False
        self._reason: str | None = None  # why this step is skipped
        self._loss: Tensor | None = None  # sum over the micro-batches of this step
        self._norm: Tensor | None = None
        self._recent = _Mean()
        self._whole = _Mean()

    def state_dict(self) -> dict[str, Any]:
        """Return counts and sums of losses, between two steps."""
        return {
            "skipped_steps": self.skipped_steps,
            "in_a_row": self._in_a_row,
            "has_moved": self._has_moved,
            "recent": self._recent.state(),
            "whole": self._whole.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Replace counts and sums; losses are on `device`."""
        self.skipped_steps, self._in_a_row = state["skipped_steps"], state["in_a_row"]
        self._has_moved = state["has_moved"]
        self._recent = _Mean.of(state["recent"], device)
        self._whole = _Mean.of(state["whole"], device)

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, after its backward pass."""
        self._loss = loss if self._loss is None else self._loss + loss

    def check_before_backward(self, loss: Tensor) -> None:
        """Check a loss before its backward pass, if that pass updates the weights.

        Raises:
            NonFiniteError: The loss is not finite.
        """
        if self._settings.optimizer_in_backward and not math.isfinite(value := loss.item()):
            raise NonFiniteError(f"Non-finite loss ({value})")

    def clip(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip as accelerate does, but leave gradients unchanged if their norm is not finite.

        Returns:
            The norm before clipping, 0-dim.
        """
        parameters = list(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = whole_tensor(torch.nn.utils.get_total_norm(gradients, norm_type))
        if max_norm < math.inf:
            # torch would multiply all gradients by NaN, which hides the bad parameter.
            known = torch.where(norm.isfinite(), norm, 0.0)
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, known)
        self._norm = norm
        return norm

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Decide about the step, or pass the loss to the optimizer, which decides."""
        optimizer = unwrapped(optimizer)
        assert self._loss is not None, "the trainer hands over every loss"
        self._loss = mean_over_ranks(self._loss)
        if not isinstance(optimizer, AdamW):
            if self._norm is None:
                self.clip(model.parameters(), math.inf)
            self._decide(model, optimizer)
        elif not optimizer.optimizer_in_backward:
            optimizer.on_skipped = self._note
            optimizer.require_finite(self._loss, self._norm)

    def _decide(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        assert self._loss is not None
        assert self._norm is not None
        norm = self._norm.to(self._loss.device)  # that of offloaded shards is in host memory
        loss, norm = torch.stack([self._loss.float(), norm.float()]).tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        if math.isfinite(loss):
            reason = f"Non-finite gradient norm ({norm})"
            bad = _not_finite((name, p.grad) for name, p in model.named_parameters())
            if bad:
                reason = f"Non-finite gradient in {listed(bad, _SHOWN)}"
        else:
            reason = f"Non-finite loss ({loss})"
        if self._settings.nonfinite == "raise":
            raise NonFiniteError(reason)
        # Without gradients, torch's optimizers skip parameters, also their moments and decay.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._note(reason)

    def _note(self, reason: str) -> None:
        """Store the reason why this step is skipped."""
        self._reason = reason

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count the step as taken or as skipped.

        Raises:
            RunError: Too many were skipped in a row, or the weights are not finite.
        """
        loss, reason = self._loss, self._reason
        self._loss = self._norm = self._reason = None
        if reason is None:
            assert loss is not None
            self._recent.add(loss)
            self._whole.add(loss)
            self._in_a_row = 0
            self._has_moved |= any(group["lr"] > 0 for group in unwrapped(optimizer).param_groups)
            return
        self.skipped_steps += 1
        self._in_a_row += 1
        step = f"Step {state.global_step + 1} of {state.max_steps}"
        bad = nonfinite_weights(model)
        if bad:
            raise self._weights_error(f"{step}: {reason}", bad)
        if self._in_a_row >= self._settings.max_skipped_steps:
            many = f"{self._in_a_row} steps in a row" if self._in_a_row > 1 else "1 step"
            raise RunError(
                f"{step}: {reason}; {many} skipped (max_skipped_steps). {self._advice()}"
            )
        if self.skipped_steps == 1:
            warnings.warn(
                f"{step} is skipped: {reason}. Further skipped steps are only counted.",
                stacklevel=2,
            )

    def stopped(self, error: NonFiniteError, state: TrainerState, model: Any) -> DivergedError:
        """Return the error that ends the run, with the step, the cause and advice."""
        reason = str(error).split("; no weight")[0].rstrip(".")
        step = f"Step {state.global_step + 1} of {state.max_steps}"
        bad = nonfinite_weights(model)
        if bad:
            return self._weights_error(f"{step}: {reason}", bad)
        return DivergedError(f"{step}: {reason}. {self._advice()}")

    def check_weights(self, model: Any, state: TrainerState) -> None:
        """Check the weights after the last step.

        Raises:
            DivergedError: Some are not finite.
        """
        # No later loss would show weights that the last step made infinite or NaN.
        bad = nonfinite_weights(model)
        if bad:
            raise self._weights_error(f"Step {state.global_step} of {state.max_steps}", bad)

    def _weights_error(self, what: str, bad: list[str]) -> DivergedError:
        return DivergedError(
            f"{what}, with non-finite weights in {listed(bad, _SHOWN)}: "
            f"{self._advice(are_weights=True)}"
        )

    def take_mean_loss(self) -> float:
        """Return the mean loss of the steps since the last call; NaN if there were none."""
        recent, self._recent = self._recent, _Mean()
        return recent.value()

    def mean_loss(self) -> float:
        """Return the mean loss of all steps; NaN if there were none."""
        return self._whole.value()

    def _advice(self, *, are_weights: bool = False) -> str:
        settings = self._settings
        if not self._has_moved:
            if are_weights:
                return "the base model has them. Give another --model."
            way = "--no-bf16 or " if settings.bf16 else ""
            way += "--dtype float32 or " if settings.dtype != "float32" else ""
            return (
                "No weight has moved yet: the base model gives it for these examples. Try "
                f"{way}other --data."
            )
        rates = "--learning_rate"
        if settings.method in ADAPTERS or not settings.trains_dense:
            rates = "--lora_learning_rate"
        elif settings.method_config is not None or settings.has_adapter:
            rates = "--learning_rate and --lora_learning_rate"
        if are_weights:
            return f"an update was too large. Try a lower {rates}."
        advice = f"Try a lower {rates} or a longer warm-up (--warmup_ratio)"
        if settings.nonfinite == "raise" and not settings.optimizer_in_backward:
            advice += "; --nonfinite skip leaves such steps out"
        return f"{advice}."


def mean_over_ranks(number: Tensor) -> Tensor:
    """Return the mean of a 0-dim number over all processes, which all must call it."""
    count = ranks().count
    if count == 1:
        return number
    total = number.detach().clone()
    torch.distributed.all_reduce(total)
    return total / count


class _Mean:
    """The mean of losses, summed on their device, without a host read per step."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, loss: Tensor) -> None:
        self._sum = loss.clone() if self._sum is None else self._sum + loss
        self._count += 1

    def state(self) -> list[Any]:
        return [self._sum, self._count]

    @classmethod
    def of(cls, state: Sequence[Any], device: torch.device) -> _Mean:
        mean = cls()
        total, mean._count = state
        mean._sum = None if total is None else total.to(device)
        return mean

    def value(self) -> float:
        return math.nan if self._sum is None else self._sum.item() / self._count


def nonfinite_weights(model: nn.Module) -> list[str]:
    """Return the names of trained weights with infinity or NaN; synchronizes with the device."""
    return _not_finite(
        (name, p.detach()) for name, p in model.named_parameters() if p.requires_grad
    )


def _not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Return the names of the tensors with infinity or NaN; of shards, those of all processes."""
    listed = [(name, tensor) for name, tensor in tensors if tensor is not None]
    bad = _not_finite_here((name, local_part(tensor)) for name, tensor in listed)
    if not any(is_sharded(tensor) for _, tensor in listed):
        return bad
    everywhere = {name for part in ranks().gather(bad) for name in part}
    return [name for name, _ in listed if name in everywhere]


def _not_finite_here(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    # By minimum and maximum: `isfinite` would allocate a mask of the tensor's size.
    extremes = [
        (name, torch.stack(torch.aminmax(tensor)).float())
        for name, tensor in tensors
        if tensor.numel()
    ]
    return [name for name, pair in extremes if not pair.isfinite().all()]
