"""Saved predictions: texts that a model answered with, to be scored without the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from molf.errors import InputError
from molf.tasks.fields import text_value


def left_out_prediction(index: int, reason: str) -> dict[str, Any]:
    """The entry of a record that was drawn but not asked: `check_predictions` passes it over."""
    return {"index": index, "prediction": None, "left_out": reason}


@dataclass(frozen=True)
class SavedPredictions:
    """Predictions that were read back.

    Attributes:
        texts: The predicted text of each record.
        left_out: The reason for each record that was drawn but not asked.
    """

    texts: dict[int, str]
    left_out: dict[int, str]


def check_predictions(predictions: Sequence[Any], records: int) -> SavedPredictions:
    """Check saved predictions.

    Args:
        predictions: `{"index": i, "prediction": text}`, further keys ignored.
        records: How many records the data file has.

    Raises:
        InputError: Something else is among them, an index is unknown or comes twice, or there
            are none.
    """
    if not predictions:
        raise InputError("There are no predictions to score.")
    saved = SavedPredictions({}, {})
    for position, entry in enumerate(predictions):
        where = f"Prediction {position}"
        if not isinstance(entry, dict):
            raise InputError(f"{where} is not an object but {type(entry).__name__}.")
        for key in ("index", "prediction"):
            if key not in entry:
                raise InputError(f"{where} lacks the field {key!r}.")
        index, text = entry["index"], entry["prediction"]
        if not isinstance(index, int) or isinstance(index, bool):
            raise InputError(f"{where}: index must be an integer, not {index!r}.")
        if not 0 <= index < records:
            raise InputError(
                f"{where}: unknown index {index}. The data has records 0 to {records - 1}."
            )
        if index in saved.texts or index in saved.left_out:
            raise InputError(f"{where}: index {index} comes twice.")
        reason = entry.get("left_out")
        if isinstance(text, str):
            saved.texts[index] = text_value(text, f"{where}: prediction")
        elif text is None and isinstance(reason, str):
            saved.left_out[index] = text_value(reason, f"{where}: left_out")
        else:
            raise InputError(f"{where}: prediction must be a text, not {type(text).__name__}.")
    return saved


def predicted_sample(
    saved: SavedPredictions,
    sample: Collection[int],
    held_out: Collection[int],
    unscorable: Collection[int] = (),
) -> Collection[int]:
    """The records that are to be scored: `sample`, or `held_out` if just these are predicted.

    Args:
        saved: The predictions.
        sample: The records that the options say.
        held_out: Those of them that a training with these options would have held out.
        unscorable: Records that may have a prediction or not.
    """
    predicted = (saved.texts.keys() | saved.left_out.keys()) - set(unscorable)
    return held_out if predicted and predicted == set(held_out) - set(unscorable) else sample


def restrict_to_sample(saved: SavedPredictions, sample: Collection[int]) -> SavedPredictions:
    """The predictions for the records that are to be scored, in their order.

    A file that stops half-way must not pass for a whole one, so every record needs its prediction,
    or the reason why it has none. What is beyond the sample is not scored.

    Args:
        saved: The predictions.
        sample: The records to be scored.

    Raises:
        InputError: Records are not predicted, or all are left out.
    """
    if lacking := sorted(set(sample) - saved.texts.keys() - saved.left_out.keys()):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(
            f"The predictions lack record {lacking[0]}{more} of the {len(sample)} to be scored. "
            "Give the data, max_samples and seed that they were made with."
        )
    if saved.texts.keys().isdisjoint(sample):
        raise InputError(f"No prediction can be scored: all {len(sample)} are left out.")
    return SavedPredictions(
        {index: saved.texts[index] for index in sorted(sample) if index in saved.texts},
        {index: saved.left_out[index] for index in sorted(sample) if index in saved.left_out},
    )
