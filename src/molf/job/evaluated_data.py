"""Warn of evaluations on records that the model was trained on."""

from __future__ import annotations

import warnings

from molf.data.records import data_files
from molf.data.sources import absolute_sources, places
from molf.data.stdin import SHOWN, STDIN
from molf.job.record.finished_run import run_of
from molf.job.record.provenance import contents, file_records, same_files
from molf.job.settings.resolved import ResolvedSettings
from molf.tasks import Task

# Tasks that edit facts, and measure them on the requests of the training.
_EVALUATES_ON_TRAINING = ("fact", "demo-fact")


def warn_of_training_data(model: str, task: Task) -> None:
    """Warn if a run's model is evaluated on the data that the run was trained on.

    Args:
        model: The evaluated model; a run's `model/` has its `config.yaml` beside it.
        task: The task, loaded for evaluation only.
    """
    description = task.description()
    if task.name in _EVALUATES_ON_TRAINING:
        return
    if description.get("eval_part") == "validation":
        _warn_of_validation_part(model, task)
        return
    if description.get("evaluated_split") != "train":
        return
    run = run_of(model)
    if run is None:
        return
    data = absolute_sources(str(description["evaluated_on"]))
    recorded = run.config["run"].get("data") or {}
    trained_on = contents((recorded.get("files") or {}).get("data") or [])
    evaluated_on = contents(file_records({"data": data}).get("data", []))
    # Standard input has one name for all contents.
    is_same = data == run.config.get("data") and STDIN not in places(data)
    if is_same or trained_on & evaluated_on:
        shown = SHOWN if data == STDIN else data
        warnings.warn(
            f"{run.path} was trained on {shown}, so this measures memorised records. Give "
            "other records with --data; those that the run held out are measured in its eval.json.",
            stacklevel=2,
        )


def _warn_of_validation_part(model: str, task: Task) -> None:
    """Warn if a run's model is evaluated on a validation part that the run was trained on."""
    run = run_of(model)
    if run is None or run.config.get("task") != task.name:
        return
    data = str(task.description()["data"])
    recorded = run.config.get("data")
    if recorded is not None and absolute_sources(data) != recorded:
        return
    validated = run.config["run"]["task"]
    if (validated.get("eval_part"), validated.get("validation_share")) != (
        task.description()["eval_part"],
        task.description()["validation_share"],
    ):
        warnings.warn(
            f"{run.path} was not trained beside this validation part of {data}, so this measures "
            "memorised records. Give the eval_part and the validation_share of the run.",
            stacklevel=3,
        )


def warn_of_other_splitting(model: str, *, split_special_tokens: bool) -> None:
    """Warn if a run's model is evaluated with another `split_special_tokens` than the run's."""
    run = run_of(model)
    if run is None or bool(run.config.get("split_special_tokens")) == split_special_tokens:
        return
    trained, give = ("with", "Give") if not split_special_tokens else ("without", "Leave out")
    warnings.warn(
        f"{run.path} was trained {trained} --split_special_tokens, so control tokens that texts "
        f"spell out are other tokens here than in training. {give} --split_special_tokens.",
        stacklevel=2,
    )


def warn_of_equal_data(settings: ResolvedSettings) -> None:
    """Warn if training and evaluation data are the same, unless the task intends it."""
    data, eval_data = settings.data, settings.eval_data
    if settings.task in _EVALUATES_ON_TRAINING or data is None or eval_data is None:
        return
    # From a folder with splits, one split is trained on and another is evaluated.
    if len(data_files(eval_data)) == 1 and same_files(data, eval_data):
        warnings.warn(
            f"eval_data {eval_data} has the records of data, so the evaluation measures the "
            "training records. Leave eval_data out to have a tenth of data held out.",
            stacklevel=2,
        )
