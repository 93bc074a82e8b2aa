"""Send the picture of the routing to the trackers of `report_to` that take images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.errors import reason_of
from molf.job.record.routing_log import RoutingWriter
from molf.job.trainer.routing_image import Pixels, routing_image

TAG = "routing/winners"


class RoutingImageCallback(TrainerCallback):
    """Sends the picture of all decisions after the last step, before the trackers close.

    Args:
        writer: The log of decisions.
        trackers: The trainer's callbacks; those of TensorBoard and W&B take images.

    Warns:
        UserWarning: The picture cannot be made or sent. The training continues.
    """

    def __init__(self, writer: RoutingWriter, trackers: Sequence[Any]) -> None:
        self._writer = writer
        self._trackers = trackers

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send it if this was the last step."""
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        taking = [one for one in self._trackers if _takes_images(one)]
        if not is_last or not state.is_world_process_zero or not taking:
            return
        try:
            self._writer.flush()
            pixels, experts = routing_image(self._writer.directory.parent)
            for tracker in taking:
                _send(tracker, pixels, experts, state.global_step)
        except Exception as error:  # of any library: a picture must not end a training
            warnings.warn(
                f"The picture of the routing was not sent to its tracker: {reason_of(error)}",
                stacklevel=2,
            )


def _takes_images(tracker: Any) -> bool:
    return getattr(tracker, "tb_writer", None) is not None or _wandb_of(tracker) is not None


def _wandb_of(tracker: Any) -> Any:
    """Return the W&B module of a tracker with a run; None of others."""
    found = getattr(tracker, "_wandb", None)
    return found if found is not None and getattr(found, "run", None) is not None else None


def _send(tracker: Any, pixels: Pixels, experts: Sequence[str], step: int) -> None:
    if (board := getattr(tracker, "tb_writer", None)) is not None:
        board.add_image(TAG, pixels, step, dataformats="HWC")
        return
    wandb = _wandb_of(tracker)
    caption = f"layers x steps; {', '.join(experts)} in the order of the colours"
    # The name of the step in the scalars of transformers' callback.
    wandb.log({TAG: wandb.Image(pixels, caption=caption), "train/global_step": step})
