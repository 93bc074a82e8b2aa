"""Saved predictions: texts that a model answered with, to be scored without the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molf.errors import InputError


def check_predictions(predictions: Sequence[Any], records: int) -> dict[int, str]:
    """The predicted text of each record.

    Args:
        predictions: `{"index": i, "prediction": text}`, further keys ignored.
        records: How many records the data file has; those not predicted may be absent.

    Raises:
        InputError: Something else is among them, an index is unknown or comes twice, or there
            are none.
    """
    if not predictions:
        raise InputError("There are no predictions to score.")
    texts: dict[int, str] = {}
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
        if index in texts:
            raise InputError(f"{where}: index {index} comes twice.")
        if not isinstance(text, str):
            raise InputError(f"{where}: prediction must be a text, not {type(text).__name__}.")
        texts[index] = text
    return texts
