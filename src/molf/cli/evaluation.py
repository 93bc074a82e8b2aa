"""Run `molf eval`: measure a model or saved texts, and write the results."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from molf.cli.eval_options import EvalOptions
from molf.data.files import Record, read_json
from molf.data.sources import places
from molf.disk.files import write_json, write_jsonl
from molf.disk.locks import InUseError, Lock
from molf.errors import InputError
from molf.job.base_model import NoBaseError, find_base, read_base_model
from molf.job.evaluated_data import warn_of_other_splitting, warn_of_training_data
from molf.job.model.path import check_model
from molf.job.progress import Reporter, make_reporter
from molf.job.record.directory import check_output, locking_runs
from molf.job.record.ownership import AN_EVALUATION, EVALUATION, PREDICTIONS, predictions_in
from molf.job.record.result import RunError, evaluation_record
from molf.measure import Evaluation, EvaluationSettings, evaluate
from molf.measure.harness import PREFIX, Harness
from molf.measure.settings import Progress
from molf.paths import check_inputs_outside, check_path
from molf.streams import ignoring_print_errors
from molf.tasks import Task, load_task

if TYPE_CHECKING:
    import torch

    from molf.job.model.loading import LoadedModel
    from molf.measure.divergence import BaseLogits

_LOCK_SECONDS = 10.0  # longer than another evaluation takes to write its files


def evaluate_checkpoint(model: str, options: EvalOptions) -> dict[str, Evaluation]:
    """Load a checkpoint once and measure it on each task; return the evaluations by task.

    Raises:
        InputError: The options, the data or the model are wrong.
    """
    check_model(model)
    base = _find_base(model, options)
    _check_output(options)
    tasks = _load_tasks(model, options)

    from molf.job.libraries import quiet_libraries

    sources = (model, base.path, *places(options.data), options.forgetting_data)
    with ignoring_print_errors(), quiet_libraries(), locking_runs(sources):
        # Before the models, so that a wrong task of the harness is reported in seconds.
        harness = _load_harness(options)
        reporter = make_reporter()
        if base.path is not None and tasks:
            base = _read_base(base, model, tasks, options, reporter)
        loaded = _load(model)
        evaluations: dict[str, Evaluation] = {}
        for name in options.task:
            title = f"Evaluating {model} on {name}"
            if name in tasks:
                with reporter.evaluating(title) as show:
                    evaluations[name] = _evaluate(loaded, name, tasks[name], options, base, show)
                _warn_of_faults(evaluations[name])
            elif harness is not None:
                reporter.say(title)  # the harness shows its own progress
                found = harness.evaluate(loaded.model, loaded.tokenizer, name.removeprefix(PREFIX))
                evaluations.update(found)
    return evaluations


@dataclass(frozen=True)
class _Base:
    """The base that a model is compared with.

    Attributes:
        path: A directory or a Hub id; None if it is not known.
        unread: The reason why its logits are not known; empty before they are read.
        logits: Its logits by task.
    """

    path: str | None
    unread: str = ""
    logits: Mapping[str, BaseLogits] = field(default_factory=dict)


def _find_base(model: str, options: EvalOptions) -> _Base:
    try:
        return _Base(find_base(model, options.base))
    except NoBaseError as error:
        return _Base(None, str(error))


def _load_tasks(model: str, options: EvalOptions) -> dict[str, tuple[Task, str]]:
    """Return each task of this package with its neutral text, by name."""
    tasks = {task.name: load_task(task) for task in options.task_options}
    texts = {name: task.forgetting_text(options.forgetting_data) for name, task in tasks.items()}
    for task in tasks.values():
        warn_of_training_data(model, task)
    if tasks:
        warn_of_other_splitting(model, split_special_tokens=options.split_special_tokens)
    return {name: (task, texts[name]) for name, task in tasks.items()}


def _read_base(
    base: _Base,
    model: str,
    tasks: Mapping[str, tuple[Task, str]],
    options: EvalOptions,
    reporter: Reporter,
) -> _Base:
    """Return the base with its logits; without, if it is that of a run and cannot be read."""
    settings = EvaluationSettings.of(options)
    with reporter.evaluating(f"Reading the base model {base.path}") as show:
        try:
            logits = read_base_model(str(base.path), model, tasks, settings, _device(), show)
        except InputError as error:
            if options.base is not None:
                raise
            return replace(base, unread=f"the base of the run cannot be read: {error}")
    return replace(base, logits=logits)


def _load(model: str) -> LoadedModel:
    from molf.job.model.loading import load_model, move
    from molf.measure.causality import check_causal
    from molf.measure.generate import padding_id

    loaded = load_model(model)
    move(loaded.model, _device())
    check_causal(model, loaded.model, padding_id(loaded.tokenizer))
    return loaded


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _evaluate(
    loaded: LoadedModel,
    name: str,
    task: tuple[Task, str],
    options: EvalOptions,
    base: _Base,
    show: Progress,
) -> Evaluation:
    """Measure a model on a task, and compare it with the base."""
    settings, logits = EvaluationSettings.of(options), base.logits.get(name)
    found = evaluate(loaded.model, loaded.tokenizer, *task, settings, show, base=logits)
    if logits is None:
        found.notes["kl_not_measured"] = base.unread
    return found


def score_saved_texts(options: EvalOptions) -> dict[str, Evaluation]:
    """Score the texts of `--predictions` without a model; return the evaluation by task.

    Raises:
        InputError: The options, the data or the predictions are wrong.
    """
    predictions = _read_predictions(Path(str(options.predictions)))
    _check_output(options)
    (task,) = options.task_options
    # The answers exist already, so no few-shot examples are drawn for their questions.
    scored = load_task(replace(task, few_shot=0)).score_predictions(predictions)
    return {task.name: scored}


def _warn_of_faults(evaluation: Evaluation) -> None:
    """Warn where measured texts differ from their records."""
    count = len([entry for entry in evaluation.predictions if entry.get("left_out") is None])
    for fault, number in evaluation.notes.get("records_with_faults", {}).items():
        warnings.warn(f"{number} of {count} examples: {fault}.", stacklevel=2)


def _load_harness(options: EvalOptions) -> Harness | None:
    if not options.harness_tasks:
        return None
    return Harness(
        options.harness_tasks,
        few_shot=options.few_shot,
        max_samples=options.max_samples,
        batch_size=options.per_device_eval_batch_size,
    )


def _read_predictions(path: Path) -> list[Record]:
    check_path(path, "predictions")
    if path.is_dir() and (path / PREDICTIONS).is_file():
        raise InputError(f"predictions {path} is a directory. Give its file: {path / PREDICTIONS}.")
    try:
        return read_json(path)
    except InputError as error:
        raise InputError(f"predictions: {error}") from error


def _check_output(options: EvalOptions) -> None:
    path = options.output_dir
    if path is None:
        return
    check_output(path, overwrite=options.overwrite, ownership=AN_EVALUATION)
    inputs = ("data", "forgetting_data", "predictions")
    check_inputs_outside(path, {name: getattr(options, name) for name in inputs})


def write_evaluations(options: EvalOptions, evaluations: Mapping[str, Evaluation]) -> None:
    """Write eval.json and the predictions to `output_dir`, if one is given.

    Print the metrics first: the evaluation may have taken hours, and writing may fail.

    Raises:
        InputError: The directory meanwhile holds files that must not be replaced.
        RunError: The disk is full or cannot be written.
    """
    if options.output_dir is None:
        return
    _check_output(options)
    try:
        _write(options.output_dir, evaluations)
    except InUseError as error:
        raise InputError(
            f"output_dir {options.output_dir} is in use by another process."
        ) from error
    except OSError as error:
        raise RunError(
            f"The evaluation could not be written to {options.output_dir}: "
            f"{error.strerror or error}. The metrics are those printed above."
        ) from error


def _write(directory: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Write eval.json and the predictions, one file per task.

    The files of an earlier evaluation are replaced; other files in the directory stay.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with Lock(directory, wait=_LOCK_SECONDS):
        earlier = predictions_in(directory)
        records, written = [], []
        for name, evaluation in evaluations.items():
            if evaluation.predictions:
                file = PREDICTIONS if len(evaluations) == 1 else f"predictions-{name}.jsonl"
                written.append(directory / file)
                write_jsonl(written[-1], evaluation.predictions)
            metrics = evaluation_record(evaluation)
            records.append({"task": name, "metrics": metrics, "notes": evaluation.notes})
        write_json(directory / EVALUATION, records[0] if len(records) == 1 else {"tasks": records})
        # Last: until then an earlier evaluation is complete.
        for path in earlier:
            if path not in written:
                path.unlink()
