"""Saved predictions: generated answers, scored without the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molf.data.fields import text_value
from molf.errors import InputError
from molf.shown import listed


def left_out_prediction(index: int, reason: str) -> dict[str, Any]:
    """Return the entry of an evaluated record without an answer; `check_predictions` skips it."""
    return {"index": index, "prediction": None, "left_out": reason}


@dataclass(frozen=True)
class SavedPredictions:
    """Predictions read from a file.

    Attributes:
        texts: The predicted text, by record index.
        left_out: The reason for each record without a prediction.
    """

    texts: dict[int, str]
    left_out: dict[int, str]


def check_predictions(
    predictions: Sequence[Any],
    records: int,
    copied_fields: Callable[[int], Mapping[str, str]] = lambda index: {},
) -> SavedPredictions:
    """Check saved predictions.

    Args:
        predictions: `{"index": i, "prediction": text}`; other keys are ignored, except those of
            `copied_fields`.
        records: Number of records in the data file.
        copied_fields: Returns fields of a record; a prediction with these fields must have the
            same values.

    Raises:
        InputError: There are no predictions, one has another form, an index is unknown or
            duplicate, or a field of `copied_fields` differs.
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
            raise InputError(f"{where}: index must be an integer, not {index!r:.100}.")
        if not 0 <= index < records:
            raise InputError(
                f"{where}: unknown index {index}. The data has records 0 to {records - 1}."
            )
        if index in saved.texts or index in saved.left_out:
            raise InputError(f"{where}: index {index} comes twice.")
        _check_same_record(entry, copied_fields(index), where)
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
    samples_of_runs: Iterable[Collection[int]],
    unscorable: Callable[[Collection[int]], Collection[int]] = lambda indices: (),
) -> Collection[int]:
    """Return the records to score: `sample`, or a set of `samples_of_runs` that matches exactly.

    Args:
        saved: The predictions.
        sample: The records selected by the options.
        samples_of_runs: Sets of records that earlier runs on this data may have evaluated.
        unscorable: Returns those of some records that cannot be scored; their predictions may be
            missing.
    """
    predicted = saved.texts.keys() | saved.left_out.keys()
    candidates = [sample, *samples_of_runs]
    for candidate in candidates:
        if predicted == set(candidate):
            return candidate
    for candidate in candidates[1:]:
        differing = predicted ^ set(candidate)
        # `unscorable` may run queries: call it only where few records differ.
        if 2 * len(differing) <= len(candidate) and differing <= set(unscorable(differing)):
            return candidate
    return sample


def _check_same_record(entry: dict[str, Any], fields: Mapping[str, str], where: str) -> None:
    """Compare a prediction's copied fields with its record; a prompt may have text around it."""
    for name, value in fields.items():
        given = entry.get(name)
        if not isinstance(given, str):
            continue
        value = value.strip()
        if value not in given if name == "prompt" else value != given.strip():
            raise InputError(
                f"{where} was made on other data: record {entry['index']} has the {name} "
                f"{value!r:.80}, and not {given.strip()!r:.80}. Give the data that the predictions "
                "were made with."
            )


def restrict_to_sample(saved: SavedPredictions, sample: Collection[int]) -> SavedPredictions:
    """Return the predictions for the records to score, in the order of the records.

    Every record needs a prediction or a reason for its absence, so that a truncated file is
    rejected. Predictions for other records are not scored.

    Args:
        saved: The predictions.
        sample: The records to score.

    Raises:
        InputError: Records have no prediction, or all are left out.
    """
    if lacking := sorted(set(sample) - saved.texts.keys() - saved.left_out.keys()):
        raise InputError(
            f"The predictions lack record {listed(lacking, 1)} of the {len(sample)} to be scored. "
            "Give the data, max_samples and seed that they were made with."
        )
    if saved.texts.keys().isdisjoint(sample):
        raise InputError(f"No prediction can be scored: all {len(sample)} are left out.")
    return SavedPredictions(
        {index: saved.texts[index] for index in sorted(sample) if index in saved.texts},
        {index: saved.left_out[index] for index in sorted(sample) if index in saved.left_out},
    )
