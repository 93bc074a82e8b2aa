"""Measure the base before and the saved model after a training, with the same settings."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from molf.errors import InputError
from molf.job.attention import set_attention
from molf.job.base_model import read_and_free
from molf.job.failing import NotStartedError
from molf.job.inputs import EvaluationKey, Inputs
from molf.job.model.loading import LoadedModel, move
from molf.job.progress import Reporter
from molf.job.settings.resolved import ResolvedSettings
from molf.job.shards import Sharding
from molf.measure import Evaluation, EvaluationSettings, evaluate
from molf.measure.divergence import BaseLogits, read_base
from molf.measure.sharing import split_over
from molf.ranks import ranks
from molf.tasks import Task


class Evaluator:
    """Measures models on a run's task and plain text.

    Args:
        settings: The run's settings; those of the evaluation are used.
        task: The task with its records.
        forgetting_text: Plain text for `forgetting_loss`.
        device: Device of the models.
        reporter: Shows the progress.
        sharding: Processes that share each model; None if each has a whole one.

    Attributes:
        seconds: Time of all evaluations, and of reading the base again.
    """

    def __init__(
        self,
        settings: ResolvedSettings,
        task: Task,
        forgetting_text: str,
        device: torch.device,
        reporter: Reporter,
        sharding: Sharding | None = None,
    ) -> None:
        self._sharding = sharding
        self.seconds = 0.0
        self._task = task
        self._forgetting_text = forgetting_text
        self._device = device
        self._reporter = reporter
        self._settings = EvaluationSettings.of(settings)
        self._key = EvaluationKey(
            model=settings.model,
            dtype=settings.dtype,
            device=str(device),
            task=settings.task_options,
            forgetting_data=settings.forgetting_data,
            settings=self._settings,
            attention=settings.attn_implementation,
            has_part=bool(settings.few_shot) and bool(task.validation_samples),
        )

    def base(self, base: LoadedModel, inputs: Inputs) -> Evaluation:
        """Return the evaluation of the base, measured or as `inputs` kept it.

        Raises:
            NotStartedError: The base cannot be measured on the data.
        """
        devices = [self._device] if self._device.type == "cuda" else []
        started = time.perf_counter()
        try:
            # A base that is measured and one that was measured before must give the same training.
            with torch.random.fork_rng(devices):
                return inputs.base_evaluation(
                    self._key, lambda: self._evaluate(base, "Evaluating the base model")
                )
        except InputError as error:  # for example, all records are too long
            raise NotStartedError(str(error)) from error
        finally:
            self.seconds += time.perf_counter() - started

    def base_logits(self, inputs: Inputs) -> BaseLogits | None:
        """Return the base's logits, computed after the training or as `inputs` kept them.

        Warns:
            UserWarning: The base cannot be loaded any more; the result is None.
        """
        started = time.perf_counter()
        try:
            return inputs.base_logits(self._key, lambda: self._read_base(inputs))
        except (InputError, OSError) as error:  # the training is not lost for it
            warnings.warn(
                "kl_neutral and kl_task are not measured, since the base cannot be read again: "
                f"{error}",
                stacklevel=2,
            )
            return None
        finally:
            self.seconds += time.perf_counter() - started

    def saved(self, saved: LoadedModel, base: BaseLogits | None) -> Evaluation:
        """Return the evaluation of the saved model, compared with the base's logits."""
        started = time.perf_counter()
        evaluation = self._evaluate(saved, "Evaluating the saved model", base)
        self.seconds += time.perf_counter() - started
        return evaluation

    def _read_base(self, inputs: Inputs) -> BaseLogits:
        def read(base: LoadedModel) -> BaseLogits:
            model = self._on_device(base)
            with split_over(ranks()):
                return read_base(
                    model,
                    base.tokenizer,
                    self._task,
                    self._forgetting_text,
                    self._settings,
                    show,
                )

        dtype = getattr(torch, self._key.dtype)
        with self._reporter.evaluating("Reading the base model again") as show:
            return read_and_free(lambda: self._load(inputs, dtype), read)

    def _load(self, inputs: Inputs, dtype: torch.dtype) -> LoadedModel:
        if self._sharding is not None:
            return self._sharding.load(inputs.base, self._key.model, dtype)
        return ranks().everywhere(lambda: inputs.base(self._key.model, dtype))

    def _on_device(self, loaded: LoadedModel) -> Any:
        """Return the model on the device of the run: moved, or its shards; with its attention."""
        set_attention(loaded.model, self._key.attention, self._key.model)
        if self._sharding is not None:
            return self._sharding.cut(loaded.model)
        move(loaded.model, self._device)
        return loaded.model

    def _evaluate(
        self, loaded: LoadedModel, title: str, base: BaseLogits | None = None
    ) -> Evaluation:
        model = self._on_device(loaded)
        with self._reporter.evaluating(title) as show, split_over(ranks()):
            return evaluate(
                model,
                loaded.tokenizer,
                self._task,
                self._forgetting_text,
                self._settings,
                show,
                base=base,
            )
