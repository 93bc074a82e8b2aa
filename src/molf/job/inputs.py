"""The inputs of a run that several runs of one process can share.

A run calls `Inputs` for the task's data, the base model, and the base's evaluation and logits. A
caller that makes many runs passes a subclass that keeps them in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from molf.measure import Evaluation, EvaluationSettings
from molf.tasks import Task, TaskOptions, load_task

if TYPE_CHECKING:
    import torch

    from molf.job.model.loading import LoadedModel
    from molf.measure.divergence import BaseLogits


@dataclass(frozen=True)
class EvaluationKey:
    """Everything that the evaluation and logits of a base depend on, apart from file contents.

    Attributes:
        model: A directory or a Hub id.
        dtype: Type of the weights.
        device: Device of the model.
        task: Options of the task.
        forgetting_data: File of the plain text; None for the task's own.
        settings: Settings of the evaluation.
        attention: Attention of the model; None for transformers' choice.
        has_part: Whether demonstrations leave out a validation part (`Task.with_part`).
    """

    model: str
    dtype: str
    device: str
    task: TaskOptions
    forgetting_data: str | None
    settings: EvaluationSettings
    attention: str | None = None
    has_part: bool = False


class Inputs:
    """Loads and measures everything anew. A subclass may return results of earlier runs.

    The random numbers of a training do not depend on these functions.
    """

    def task(self, options: TaskOptions) -> Task:
        """Return the task with its records. The run does not change it.

        Raises:
            InputError: The data is missing, unreachable or invalid.
        """
        return load_task(options)

    def base(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """Return the base model, in host memory.

        The run trains it in place: return a `LoadedModel.copy()` of one that is kept.

        Args:
            model: A directory or a Hub id.
            dtype: Type of the weights.

        Raises:
            InputError: The model is missing or not supported.
        """
        from molf.job.model.loading import load_model

        return load_model(model, dtype)

    def base_evaluation(self, key: EvaluationKey, measure: Callable[[], Evaluation]) -> Evaluation:
        """Return the evaluation of the base. The run does not change it.

        Args:
            key: Equal keys have equal evaluations. It is hashable.
            measure: Measures the base of this run, and shows the progress.

        Raises:
            InputError: The base cannot be measured on the task.
        """
        return measure()

    def base_logits(self, key: EvaluationKey, measure: Callable[[], BaseLogits]) -> BaseLogits:
        """Return the base's logits, which the saved model is compared with.

        Called after the training, when neither base nor trained model is in memory.

        Args:
            key: Equal keys have equal logits. It is hashable.
            measure: Calls `base` again, computes the logits, and frees the model.

        Raises:
            InputError: The base cannot be loaded again.
        """
        return measure()
