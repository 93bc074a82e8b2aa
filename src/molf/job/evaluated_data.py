"""Warn of evaluations on records that the model was trained on."""

from __future__ import annotations

import warnings

from molf.data.selection import content_key
from molf.data.sources import absolute_sources, places
from molf.data.stdin import SHOWN, STDIN
from molf.job.record.finished_run import run_of
from molf.job.record.provenance import contents, file_records
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


def warn_of_trained_records(task: Task) -> None:
    """Warn if records that are measured are trained on, unless the task intends it."""
    # Records of equal content are held out together.
    if task.name in _EVALUATES_ON_TRAINING or task.data_records().held_out:
        return
    samples = task.evaluated_samples(task.evaluation_count)
    measured = [content_key(sample.content) for sample in samples]
    wanted = set(measured)
    trained = {key for one in task.training_samples if (key := content_key(one.content)) in wanted}
    if count := sum(key in trained for key in measured):
        warnings.warn(
            f"{count} of {len(measured)} evaluated records are also trained on, so their scores "
            "are those of memorised records. Leave them out of data. Without eval_data, a tenth of "
            "data is held out.",
            stacklevel=2,
        )
