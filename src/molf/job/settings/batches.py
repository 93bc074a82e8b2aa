"""Options for the examples of a forward pass: packing, no padding, similar lengths."""

from __future__ import annotations

from typing import Any

from molf.errors import InputError

GROUP_BY_LENGTH = "group_by_length"
SAMPLING_STRATEGIES = ("random", "sequential", GROUP_BY_LENGTH)
"""Orders of the examples; the names of transformers."""

# Fields of SFTConfig whose effect depends on the rows of a batch.
_EXCLUDED = {
    "neftune_noise_alpha": "its noise depends on the length of a row",
    "pad_to_multiple_of": "there is no padding",
}


def check_batches(settings: Any) -> None:
    """Check the options beside each other.

    Args:
        settings: `TrainSettings`, whose file imports this one.

    Raises:
        InputError: They exclude each other.
    """
    if not settings.joins_examples:
        return
    joined = "packing" if settings.packing else "padding_free"
    strategy = settings.train_sampling_strategy
    if strategy == GROUP_BY_LENGTH:
        raise InputError(
            f"Invalid train_sampling_strategy={strategy} with {joined}: rows without padding need "
            "no examples of similar length. Leave one of the two out."
        )
    for name, reason in _EXCLUDED.items():
        if name in settings.training_args:
            raise InputError(
                f"Invalid training_args.{name}={settings.training_args[name]} with {joined}: "
                f"{reason}. Leave one of the two out."
            )
