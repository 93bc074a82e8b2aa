"""Save the trained model with its card, and load it again."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from molf.disk.files import write_text
from molf.job.model.card import measured_adapter_card, model_card
from molf.job.model.loading import LoadedModel, load_model
from molf.job.model.saved_tensors import Stored
from molf.job.model.saving import Fallback, save_model
from molf.job.opening import Opening
from molf.job.record.directory import RunDirectory
from molf.job.record.ownership import ADAPTER, LOW_HALVES, MODEL
from molf.job.trainer.result import Training
from molf.measure import Evaluation
from molf.tasks import Task


class TrainedModel:
    """The model that a run trained, in `model/` of its directory.

    Args:
        opening: The run's settings and base.
        directory: The run's directory.
        task: The task, for the card.
        training: The result of the training.
        before: Metrics of the base model, for the card.

    Attributes:
        training: As given.
        before: As given.
    """

    def __init__(
        self,
        opening: Opening,
        directory: RunDirectory,
        task: Task,
        training: Training,
        before: Evaluation,
    ) -> None:
        self._opening = opening
        self._directory = directory
        self._task = task
        self.training = training
        self.before = before

    def save(self) -> dict[str, Any]:
        """Write the model, free it and the base, and return the record of the saved model.

        Raises:
            SaveError: It cannot be written; the message names the place of the weights.
        """
        opening, directory = self._opening, self._directory
        settings, storing = opening.settings, opening.storing
        # A base that was trained dequantised differs from the stored one: no update is measured.
        dequantised = settings.merge_base == "dequantised"
        stored = save_model(
            self.training.model,
            opening.base,
            storing,
            self._card(after=None),
            directory / MODEL,
            start_dtype=None if dequantised else getattr(torch, settings.dtype),
            halves_path=directory / LOW_HALVES,
            fallback=Fallback.of(settings, directory.path),
        )
        record = {"dtype": settings.save_dtype, "rounding": storing.rounding.kind, **_sizes(stored)}
        del stored
        self.free()
        return record

    def free(self) -> None:
        """Free the trained model and the base, so that the saved model has their memory."""
        self.training.model = self._opening.base.model = None
        gc.collect()

    def load(self) -> LoadedModel:
        """Return the saved model, in host memory and in the type of the training.

        Raises:
            FileNotFoundError: It was deleted.
        """
        path = self._directory / MODEL
        if not path.is_dir():
            raise FileNotFoundError(f"the saved model was deleted before it was measured: {path}")
        dtype = getattr(torch, self._opening.settings.dtype)
        if self._opening.sharding is not None:
            return self._opening.sharding.load(load_model, str(path), dtype)
        return load_model(str(path), dtype)

    def write_card(
        self, saved: LoadedModel, after: Evaluation, saved_record: Mapping[str, Any]
    ) -> None:
        """Write the card with all metrics, and those of the adapter into its card.

        Args:
            saved: The result of `load`.
            after: Its metrics.
            saved_record: The result of `save`.
        """
        card = self._card(after, saved_record)
        path = self._directory / MODEL
        if path.is_dir():
            write_text(path / "README.md", card)
        else:  # the directory was deleted during the evaluation
            save_model(saved.model, self._opening.base, self._opening.storing, card, path)
        of_adapter = self._directory / ADAPTER / "README.md"
        if of_adapter.is_file():
            text = of_adapter.read_text(encoding="utf-8")
            described = self._opening.settings, self._task.description(), self.before, after
            write_text(of_adapter, measured_adapter_card(text, *described))

    def _card(self, after: Evaluation | None, saved: Mapping[str, Any] | None = None) -> str:
        return model_card(
            self._opening.settings,
            self._task.description(),
            self.before,
            after,
            routing=self.training.shares_and_meaning,
            saved=saved,
        )


def _sizes(stored: Stored) -> dict[str, Any]:
    """Return the bytes of the low halves, and the share of the update that was saved."""
    record: dict[str, Any] = {}
    if stored.low_halves:
        record["low_halves_bytes"] = sum(half.nbytes for half in stored.low_halves.values())
    return {**record, **(stored.update.record() if stored.update is not None else {})}
