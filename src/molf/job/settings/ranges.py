"""Ranges of the numeric options of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from molf.errors import InputError

MOST_COUNTED = 2**31  # of examples, tokens or ranks, which tensors of them would have as a size

_POSITIVE = (
    "max_samples",
    "max_eval_samples",
    "max_length",
    "num_train_epochs",
    "max_steps",
    "max_skipped_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "adam_epsilon",
    "learning_rate",
    "loraplus_lr_ratio",
)
_COUNTED = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "max_length",
)
_NOT_NEGATIVE = (
    "lora_learning_rate",
    "weight_decay",
    "lora_weight_decay",
    "max_grad_norm",
    "few_shot",
    "seed",
)
_BELOW_ONE = ("warmup_ratio", "adam_beta1", "adam_beta2")


def check_ranges(values: Mapping[str, Any]) -> None:
    """Check the numbers of the options of a training.

    Args:
        values: The options by name; None stands for the default.

    Raises:
        InputError: A number is out of its range.
    """
    for name in _POSITIVE:
        value = values[name]
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"Invalid {name}={value}. Must be finite and greater than 0.")
    for name in _NOT_NEGATIVE:
        value = values[name]
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"Invalid {name}={value}. Must be finite and at least 0.")
    for name in _COUNTED:
        value = values[name]
        if value is not None and value >= MOST_COUNTED:
            raise InputError(f"Invalid {name}={value}. Must be below 2**31.")
    ranks = values["ranks"] or (0,)
    if max(ranks) >= MOST_COUNTED:
        raise InputError(f"Invalid ranks={','.join(map(str, ranks))}. Must be below 2**31.")
    for name in _BELOW_ONE:
        if not 0 <= values[name] < 1:
            raise InputError(f"Invalid {name}={values[name]}. Must be in [0, 1).")
    if values["seed"] >= 2**32:  # the limit of numpy's generators
        raise InputError(f"Invalid seed={values['seed']}. Must be below 2**32.")
