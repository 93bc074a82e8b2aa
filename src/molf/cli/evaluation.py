"""The work of `molf eval`: a model or saved texts, measured, and written where asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from molf.cli.eval import EvalOptions
from molf.errors import InputError
from molf.evaluate import Evaluation, EvaluationSettings, evaluate, read_plain_text
from molf.tasks import Task, TaskOptions, load_task
from molf.train.files import write_json, write_jsonl
from molf.train.model_path import check_model
from molf.train.progress import make_reporter
from molf.train.result import evaluation_record
from molf.train.run_directory import EVALUATION, PREDICTIONS, RunDirectory, check_output


def evaluate_checkpoint(model: str, options: EvalOptions) -> Evaluation:
    """Measure a checkpoint.

    Raises:
        InputError: The options, the data or the model are wrong.
    """
    check_model(model)
    _check_output(options)
    settings = EvaluationSettings(
        batch_size=options.per_device_eval_batch_size,
        max_length=options.max_length,
        seed=options.seed,
    )
    task = _load_task(options)
    if options.forgetting_data is None:
        forgetting_text = task.default_forgetting_text()
    else:
        forgetting_text = read_plain_text(options.forgetting_data)

    from molf.train.libraries import quiet_libraries

    with quiet_libraries():
        import torch

        from molf.train.model_loading import load_model

        loaded = load_model(model)
        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        with make_reporter().evaluating(f"Evaluating {model}") as show:
            evaluation = evaluate(
                loaded.model, loaded.tokenizer, task, forgetting_text, settings, show
            )
    _write(options, task, evaluation)
    return evaluation


def score_saved_texts(options: EvalOptions) -> Evaluation:
    """Score the texts of `--predictions`, without a model.

    Raises:
        InputError: The options, the data or the predictions are wrong.
    """
    predictions = _read_predictions(Path(str(options.predictions)))
    _check_output(options)
    task = _load_task(options)
    evaluation = task.score_predictions(predictions)
    _write(options, task, evaluation)
    return evaluation


def _load_task(options: EvalOptions) -> Task:
    return load_task(
        TaskOptions(
            name=options.task,
            data=options.data,
            max_eval_samples=options.max_samples,
            seed=options.seed,
            evaluation_only=True,
        )
    )


def _read_predictions(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"predictions {path} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise InputError(f"predictions {path} cannot be read: {error.strerror}.") from error
    predictions = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                predictions.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"predictions {path}, line {number}: not JSON: {error.msg}."
                ) from error
    return predictions


def _check_output(options: EvalOptions) -> None:
    if options.output_dir is not None:
        check_output(options.output_dir, overwrite=options.overwrite, marker=EVALUATION)


def _write(options: EvalOptions, task: Task, evaluation: Evaluation) -> None:
    if options.output_dir is None:
        return
    directory = RunDirectory(options.output_dir, overwrite=options.overwrite, marker=EVALUATION)
    write_jsonl(directory / PREDICTIONS, evaluation.predictions)
    write_json(
        directory / EVALUATION,
        {"task": task.name, "metrics": evaluation_record(evaluation), "notes": evaluation.notes},
    )
    directory.complete()
