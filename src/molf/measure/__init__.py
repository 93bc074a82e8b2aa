"""Evaluation of a model: a task's metrics, and the loss on unrelated text (forgetting).

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from molf.measure.metric import Evaluation, Metric, bootstrap_mean, wilson
from molf.measure.plain_text import default_plain_text, read_plain_text
from molf.measure.settings import EvaluationSettings, Progress

if TYPE_CHECKING:
    from molf.measure.divergence import BaseLogits

__all__ = [
    "Evaluable",
    "Evaluation",
    "EvaluationSettings",
    "Metric",
    "Progress",
    "bootstrap_mean",
    "default_plain_text",
    "evaluate",
    "read_plain_text",
    "wilson",
]


class Evaluable(Protocol):
    """Anything that measures a model, such as a `molf.tasks.Task`."""

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        settings: EvaluationSettings,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Measure a transformers causal language model."""


_FORGETTING_WINDOW = 256  # tokens; short enough that a few pages give an interval over windows


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Evaluable,
    forgetting_text: str,
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
    *,
    base: BaseLogits | None = None,
) -> Evaluation:
    """Measure a model on a task and on held-out plain text.

    The model runs in evaluation mode; its own mode is restored at the end.

    Args:
        model: Any transformers causal language model, or a PEFT model of one, on its device.
        tokenizer: Its tokenizer; must be a fast one with an EOS token.
        task: The task with its records.
        forgetting_text: Plain text for `forgetting_loss`, such as `task.default_forgetting_text()`.
        settings: Batch size, limits and seed.
        progress: Called after each batch.
        base: Logits of the model that this one was tuned from (`molf.measure.divergence`).

    Returns:
        The task's evaluation with `forgetting_loss` added to its metrics, and with `base` also
        `kl_neutral` and `kl_task`.

    Raises:
        InputError: The task or the text cannot be measured, or the base has another vocabulary.
    """
    from molf.measure.forgetting import forgetting_loss

    settings = settings or EvaluationSettings()
    if settings.split_special_tokens:  # False keeps the tokenizer's own setting
        tokenizer.split_special_tokens = True
    # First, so that a base of another vocabulary is refused before a long evaluation.
    divergences = _divergences(model, base, settings, progress)
    evaluation = task.evaluate(model, tokenizer, settings, progress)
    evaluation.metrics["forgetting_loss"] = forgetting_loss(
        model,
        tokenizer,
        forgetting_text,
        min(settings.max_length, _FORGETTING_WINDOW),
        settings.batch_size,
        seed=settings.seed,
        progress=progress,
    )
    evaluation.metrics.update(divergences)
    return evaluation


def _divergences(
    model: Any, base: BaseLogits | None, settings: EvaluationSettings, progress: Progress | None
) -> dict[str, Metric]:
    if base is None:
        return {}
    from molf.measure.divergence import kl_metrics

    return kl_metrics(model, base, settings, progress)
