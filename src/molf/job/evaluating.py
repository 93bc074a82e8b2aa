"""Measure the base before and the saved model after a training, with the same settings."""

from __future__ import annotations

import time

import torch

from molf.errors import InputError
from molf.job.failing import UnusableDataError
from molf.job.inputs import EvaluationKey, Inputs
from molf.job.model.loading import LoadedModel, move
from molf.job.progress import Reporter
from molf.job.settings.resolved import ResolvedSettings
from molf.measure import Evaluation, EvaluationSettings, evaluate
from molf.tasks import Task


class Evaluator:
    """Measures models on a run's task and plain text.

    Args:
        settings: The run's settings; those of the evaluation are used.
        task: The task with its records.
        forgetting_text: Plain text for `forgetting_loss`.
        device: Device of the models.
        reporter: Shows the progress.

    Attributes:
        seconds: Time of all evaluations.
    """

    def __init__(
        self,
        settings: ResolvedSettings,
        task: Task,
        forgetting_text: str,
        device: torch.device,
        reporter: Reporter,
    ) -> None:
        self.seconds = 0.0
        self._task = task
        self._forgetting_text = forgetting_text
        self._device = device
        self._reporter = reporter
        self._settings = EvaluationSettings(
            batch_size=settings.per_device_eval_batch_size,
            max_length=settings.max_length,
            seed=settings.seed,
            split_special_tokens=settings.split_special_tokens,
        )
        self._key = EvaluationKey(
            model=settings.model,
            dtype=settings.dtype,
            device=str(device),
            task=settings.task_options,
            forgetting_data=settings.forgetting_data,
            settings=self._settings,
        )

    def base(self, base: LoadedModel, inputs: Inputs) -> Evaluation:
        """Return the evaluation of the base, measured or as `inputs` kept it.

        Raises:
            UnusableDataError: The base cannot be measured on the data.
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
            raise UnusableDataError(str(error)) from error
        finally:
            self.seconds += time.perf_counter() - started

    def saved(self, saved: LoadedModel) -> Evaluation:
        """Return the evaluation of the saved model."""
        started = time.perf_counter()
        evaluation = self._evaluate(saved, "Evaluating the saved model")
        self.seconds += time.perf_counter() - started
        return evaluation

    def _evaluate(self, loaded: LoadedModel, title: str) -> Evaluation:
        move(loaded.model, self._device)
        with self._reporter.evaluating(title) as show:
            return evaluate(
                loaded.model,
                loaded.tokenizer,
                self._task,
                self._forgetting_text,
                self._settings,
                show,
            )
