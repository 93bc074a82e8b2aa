"""Optimizer factory for the `optimizer_cls_and_kwargs` slot of Hugging Face's Trainer and TRL."""

from __future__ import annotations

from typing import Any

from torch import nn

from molf.core.adamw import AdamW
from molf.core.assignment.assignment import Assignment
from molf.core.config import MoLFConfig
from molf.core.optimizer import MoLFAdamW

# The Trainer calls `factory()(model, **kwargs)` if the slot holds no optimizer class. A class would
# get parameters without module names.


class MoLFFactory:
    """Builds the routing optimizer from the trainer's model."""

    def __call__(self, model: nn.Module, **kwargs: Any) -> MoLFAdamW:
        """Return `MoLFAdamW.from_model(model, **kwargs)`."""
        return MoLFAdamW.from_model(model, **kwargs)


class AssignmentFactory:
    """Builds the optimizer of an assigned model from the trainer's model."""

    def __call__(self, model: nn.Module, **kwargs: Any) -> AdamW:
        """Return `AdamW.from_assignment(model, **kwargs)`."""
        return AdamW.from_assignment(model, **kwargs)


def trainer_optimizer(
    config: MoLFConfig | Assignment | None = None, *, lr: float, **kwargs: Any
) -> tuple[type[MoLFFactory] | type[AssignmentFactory], dict[str, Any]]:
    """Return the value for `Trainer(..., optimizer_cls_and_kwargs=...)`.

    The Trainer's own `learning_rate`, `weight_decay` and Adam options are ignored. Its schedule is
    applied.

    Args:
        config: Settings of the method, or the assignment that `molf.with_assignment` was given;
            default `MoLFConfig()`.
        lr: Learning rate; the Trainer's is ignored.
        **kwargs: Further keywords of `MoLFAdamW.from_model`, with an assignment of
            `AdamW.from_assignment` (`lora_lr`, `weight_decay`, ...).

    Raises:
        TypeError: `config` is neither, but a path, for example.

    Example:
        >>> trainer = SFTTrainer(model, args=args, train_dataset=data,
        ...     optimizer_cls_and_kwargs=molf.trainer_optimizer(config, lr=5e-5))
    """
    # The class, not an instance: the Trainer calls it first.
    if isinstance(config, Assignment):
        return AssignmentFactory, {"assignment": config, "lr": lr, **kwargs}
    if config is not None and not isinstance(config, MoLFConfig):
        raise TypeError(
            f"Invalid config of type {type(config).__name__}. Must be a molf.MoLFConfig or a "
            "molf.Assignment."
        )
    return MoLFFactory, {"config": config or MoLFConfig(), "lr": lr, **kwargs}
