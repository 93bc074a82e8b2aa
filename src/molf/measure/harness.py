"""Tasks of lm-evaluation-harness (Gao et al., EleutherAI), on a loaded model.

The harness uses its own data, prompts, lengths and seeds, so that its scores are comparable with
published ones.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from molf.errors import InputError
from molf.measure.metric import Evaluation, Metric
from molf.shown import suggestion

PREFIX = "lm-eval:"
"""Prefix of the harness's task names in molf."""

_Z = 1.959963984540054  # the standard normal's 97.5% quantile
_NO_FILTER = "none"  # the harness names a metric "acc,none", or "exact_match,strict-match"
_STDERR = "_stderr"


class Harness:
    """The harness's tasks of these names; their data is read before a model is loaded.

    Args:
        names: Tasks, groups or tags of the harness, without `PREFIX`.
        few_shot: Demonstrations before each question; None for the task's own number.
        max_samples: Number of first records of each task to use; None for all.
        batch_size: Sequences per forward pass.

    Raises:
        InputError: The harness is not installed, has no such task, or cannot get a task's data.
    """

    def __init__(
        self,
        names: Sequence[str],
        few_shot: int | None = None,
        max_samples: int | None = None,
        batch_size: int = 1,
    ) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError(
                f"{PREFIX}{names[0]} needs lm-evaluation-harness, which is not installed: "
                "pip install 'molf[lm-eval]'."
            )
        # Its warnings are about defaults of its own task files; users cannot act on them.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager, get_task_dict

        self._few_shot = few_shot
        self._max_samples = max_samples
        self._batch_size = batch_size
        self._manager = TaskManager()
        for name in names:
            _check_name(name, self._manager.all_tasks)
        try:
            get_task_dict(list(names), self._manager)
        except OSError as error:  # data is neither cached nor reachable
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"Data of {', '.join(PREFIX + name for name in names)} cannot be read: {lines[0]}"
            ) from error

    def evaluate(self, model: Any, tokenizer: Any, name: str) -> dict[str, Evaluation]:
        """Measure a model on a task, or on a group or tag of tasks.

        Args:
            model: A transformers causal language model, on its device.
            tokenizer: Its tokenizer.
            name: One of the names given.

        Returns:
            One evaluation, by the prefixed name; that of a group has its tasks in the table
            `by_task`. A tag without a score of its own gives one evaluation for each of its tasks.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        batch_size = self._batch_size
        if batch_size > 1 and _padding_counts(model, tokenizer):
            batch_size = 1  # the harness makes its own batches, of any lengths
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[name],
            num_fewshot=self._few_shot,
            batch_size=batch_size,
            limit=self._max_samples,
            log_samples=False,
            task_manager=self._manager,
        )
        metrics = {row: _metrics(results, row) for row in results["results"]}
        metrics = {row: found for row, found in metrics.items() if found}
        if not metrics:
            raise ValueError(f"{PREFIX}{name}: lm-evaluation-harness returned no metric.")
        own = metrics.pop(name, None)
        if own is None:
            return {
                f"{PREFIX}{row}": Evaluation(found, notes=self._notes(results, row))
                for row, found in metrics.items()
            }
        return {
            f"{PREFIX}{name}": Evaluation(
                own,
                notes=self._notes(results, name),
                tables={"by_task": metrics} if metrics else {},
            )
        }

    def _notes(self, results: Mapping[str, Any], row: str) -> dict[str, Any]:
        """Return the settings that are needed to reproduce the score."""
        notes = {
            "measured_by": f"lm-evaluation-harness {version('lm_eval')}",
            "task_version": results.get("versions", {}).get(row),
            "few_shot": results.get("n-shot", {}).get(row),
            "first_records_only": self._max_samples,
        }
        return {name: note for name, note in notes.items() if note is not None}


def _padding_counts(model: Any, tokenizer: Any) -> bool:
    from molf.measure.generate import padding_id
    from molf.measure.padding import ANY, generation_batches, right_padding_counts

    pad_id = padding_id(tokenizer)
    return generation_batches(model, pad_id) != ANY or right_padding_counts(model, pad_id)


def _check_name(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(
            f"{PREFIX}{name}: lm-evaluation-harness has no task "
            f"{name!r}.{suggestion(name, known, 3)} `lm_eval ls tasks` lists them."
        )


def _metrics(results: Mapping[str, Any], row: str) -> dict[str, Metric]:
    """Return a task's or group's metrics; the interval is NaN without a standard error."""
    values = results["results"][row]
    count = _count(results, row)
    metrics = {}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith(_STDERR) or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{name}{_STDERR},{filtered}")
        half = _Z * error if isinstance(error, (int, float)) else float("nan")
        shown = name if filtered == _NO_FILTER else f"{name},{filtered}"
        metrics[shown] = Metric(float(value), value - half, value + half, count)
    return metrics


def _count(results: Mapping[str, Any], row: str) -> int:
    """Return the number of records of a task, or of all tasks of a group."""
    counts = results["n-samples"].get(row)
    if counts is not None:
        return int(counts["effective"])
    return sum(_count(results, part) for part in results.get("group_subtasks", {}).get(row, ()))
