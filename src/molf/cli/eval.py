"""`molf eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from molf.errors import InputError
from molf.tasks import TASKS
from molf.train.settings import DATA, EVALUATION, OUTPUT


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The options of `molf eval`."""

    task: Annotated[str, Parameter(choices=TASKS, group=DATA)]
    """What is measured."""
    data: Annotated[str | None, Parameter(group=DATA)] = None
    """Records to evaluate on: a JSON, JSONL or Parquet file, a folder of them, or a Hub id."""
    max_samples: Annotated[int | None, Parameter(group=DATA)] = None
    """Evaluate on at most this many records, drawn by the seed."""
    max_length: Annotated[int, Parameter(group=DATA)] = 1024
    """Longest text in tokens; longer ones are left out and counted."""
    forgetting_data: Annotated[str | None, Parameter(group=EVALUATION)] = None
    """Plain text to measure the loss on; the task brings one."""
    predictions: Annotated[Path | None, Parameter(group=EVALUATION)] = None
    """Score these saved texts instead of a model: JSONL of {"index": i, "prediction": text}."""
    per_device_eval_batch_size: Annotated[int, Parameter(group=EVALUATION)] = 32
    """Examples per forward pass."""
    seed: Annotated[int, Parameter(group=EVALUATION)] = 42
    """Seed of the draw of records and of the intervals."""
    output_dir: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    """Write eval.json and predictions.jsonl here."""
    overwrite: Annotated[bool, Parameter(group=OUTPUT)] = False
    """Replace an earlier evaluation in output_dir."""


def evaluate_model(
    model: str | None = None,
    /,
    *,
    options: EvalOptions,
    config: Annotated[Path | None, Parameter(group=DATA)] = None,
) -> None:
    """Measure a model on a task.

    Args:
        model: A local directory in transformers format, or a Hub id.
        options: The options.
        config: A YAML file of these options; the command line wins over it.
    """
    from molf.cli.evaluation import evaluate_checkpoint, score_saved_texts
    from molf.cli.summary import print_evaluation

    if (model is None) == (options.predictions is None):
        given = "neither" if model is None else "both"
        raise InputError(f"Give a model or --predictions FILE with saved texts; given: {given}.")
    if model is None:
        print_evaluation(score_saved_texts(options))
    else:
        print_evaluation(evaluate_checkpoint(model, options))
