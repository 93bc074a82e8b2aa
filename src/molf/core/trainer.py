"""The way into Hugging Face's Trainer and TRL: a factory for their documented optimizer slot."""

from __future__ import annotations

from typing import Any

from torch import nn

from molf.core.config import MoLFConfig
from molf.core.optimizer import MoLFAdamW


class MoLFFactory:
    """Builds the optimizer once the trainer knows the model.

    The Trainer calls `factory()(model, **kwargs)` for anything in the slot that is not an optimizer
    class; unlike a class, a factory sees module names.
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> MoLFAdamW:
        """Return `MoLFAdamW.from_model(model, **kwargs)`."""
        return MoLFAdamW.from_model(model, **kwargs)


def trainer_optimizer(
    config: MoLFConfig | None = None, *, lr: float, **kwargs: Any
) -> tuple[type[MoLFFactory], dict[str, Any]]:
    """Return what `Trainer(..., optimizer_cls_and_kwargs=...)` takes.

    The Trainer hands a factory the model and these keywords, and nothing else: `learning_rate`,
    `weight_decay` and the Adam options of its own arguments are not read. Its schedule applies.

    Args:
        config: The method's settings.
        lr: Learning rate; what the Trainer's arguments say does not matter.
        **kwargs: Further keywords of `MoLFAdamW.from_model` (`lora_lr`, `weight_decay`, ...).

    Example:
        >>> trainer = SFTTrainer(model, args=args, train_dataset=data,
        ...     optimizer_cls_and_kwargs=molf.trainer_optimizer(config, lr=5e-5))
    """
    return MoLFFactory, {"config": config or MoLFConfig(), "lr": lr, **kwargs}
