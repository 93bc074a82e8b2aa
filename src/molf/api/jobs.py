"""`molf.train`, `evaluate`, `plan`, `find_rates`, `probe`: the commands as functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.api.options import parsed
from molf.api.run import Run
from molf.errors import InputError
from molf.ranks import launched_rank
from molf.tasks import TASKS

if TYPE_CHECKING:
    from molf.job.ahead.evidence import RangeTest
    from molf.measure import Evaluation
    from molf.planning.request import TrainingPlan


def train(recipe: str | Path | None = None, /, **options: Any) -> Run:
    """Fine-tune a model and measure it before and after, as `molf train` does.

    Progress and warnings go to standard error; nothing is printed to standard output.

    Args:
        recipe: A YAML file of options, or the name of a shipped recipe.
        **options: The options of `molf train` by name, such as `model="Qwen/Qwen2.5-1.5B"`,
            `ranks=[16, 64]`, `output_dir=Path("out")`. They replace those of the recipe; None is
            as if left out.

    Returns:
        The run.

    Raises:
        InputError: An option, the data or the model is wrong. Nothing was written.
        RunError: The training failed; the run's directory has the traceback.
        StoppedError: A signal stopped the training; `resume=True` continues it.
    """
    from molf.job.record.result import FinishedError
    from molf.job.run import train as train_run
    from molf.job.settings.settings import TrainSettings

    arguments = parsed("train", options, recipe)
    settings = arguments.get("settings", TrainSettings())
    if settings.dry_run or arguments.get("print_config"):
        raise InputError("dry_run and print_config are for the command line.")
    try:
        result = train_run(settings)
    except FinishedError:
        return Run(settings.output_dir)
    if launched_rank():  # rank 0 writes all files
        return Run(result.directory)
    if arguments.get("spectra", True):
        from molf.job.extract.spectra import spectra_at_end

        spectra_at_end(result.directory, result.training_seconds)
    if arguments.get("report", True):
        from molf.report.build import page_at_end

        page_at_end(result.directory)
    return Run(result.directory)


def evaluate(model: str | Path | None = None, /, **options: Any) -> dict[str, Evaluation]:
    """Measure a model on tasks, as `molf eval` does.

    Args:
        model: A local directory in transformers format, or a Hub id; None with `predictions`.
        **options: The options of `molf eval` by name; `task` is required, one or several.

    Returns:
        The evaluation of each task by its name.

    Raises:
        InputError: An option, the data or the model is wrong.
    """
    from molf.cli.evaluation import evaluate_checkpoint, score_saved_texts, write_evaluations

    if "task" not in options:
        raise InputError(f"Give task, one of {', '.join(TASKS)}, or several; given: none.")
    arguments = parsed("eval", options)
    chosen = arguments["options"]
    if (model is None) == (chosen.predictions is None):
        raise InputError("Give a model, or predictions with saved texts: one of the two.")
    found = score_saved_texts(chosen) if model is None else evaluate_checkpoint(str(model), chosen)
    write_evaluations(chosen, found)
    if chosen.output_dir is not None and arguments.get("report", True):
        from molf.report.build import page_at_end

        page_at_end(chosen.output_dir)
    return found


def plan(
    recipe: str | Path | None = None,
    /,
    *,
    device: str | None = None,
    num_gpus: int | None = None,
    num_nodes: int | None = None,
    **options: Any,
) -> TrainingPlan:
    """Predict the parameters and memory of a training, as `molf plan` does.

    Only the model's `config.json` is read, from a local directory or the Hub.

    Args:
        recipe: A YAML file of options, or the name of a shipped recipe.
        device: Kind of device of the training, `cuda` (default) or `cpu`.
        num_gpus: GPUs of each machine, which share weights, gradients and optimizer state; 1 by
            default.
        num_nodes: Machines; 1 by default.
        **options: The options of `molf train` by name. They replace those of the recipe; None is
            as if left out. Those that change no memory have no effect.

    Raises:
        InputError: An option or the model is wrong, or the training cannot be planned.
    """
    from molf.job.ahead.plan import plan as plan_training
    from molf.job.settings.settings import TrainSettings

    if options.get("json"):
        raise InputError("json is for the command line; TrainingPlan.record() returns its values.")
    machines = {"device": device, "num_gpus": num_gpus, "num_nodes": num_nodes}
    arguments = parsed("plan", {**options, **machines}, recipe)
    return plan_training(
        arguments.get("settings", TrainSettings()),
        **{name: arguments[name] for name in machines if name in arguments},
    )


def find_rates(
    recipe: str | Path | None = None,
    /,
    *,
    from_: float | None = None,
    to: float | None = None,
    **options: Any,
) -> RangeTest:
    """Train briefly with growing rates, and suggest rates to begin with, as `molf lr` does.

    A method with two rates is swept twice, each time from the same weights with the other rate 0.

    Args:
        recipe: A YAML file of options, or the name of a shipped recipe.
        from_: Rate of the first step of a sweep (option `from`); 1e-6 by default.
        to: Rate of the last step; 1 by default.
        **options: The options of `molf lr` by name. They replace those of the recipe; None is as
            if left out.

    Returns:
        The suggestions with their evidence, the curves, and the directory of the files.

    Raises:
        InputError: An option, the data or the model is wrong, or matplotlib is not installed.
            Nothing was written.
        RunError: The test failed; its directory has the traceback.

    Example:
        >>> found = molf.find_rates(data="records.jsonl", task="custom")
        >>> run = molf.train(data="records.jsonl", task="custom", **found.suggestions)
    """
    from molf.job.ahead.rates import range_test
    from molf.job.settings.rates import RateSettings

    arguments = parsed("lr", {**options, "from": from_, "to": to}, recipe)
    return range_test(
        arguments.get("settings", RateSettings()),
        **{name: arguments[name] for name in ("lowest", "highest") if name in arguments},
    )


def probe(recipe: str | Path | None = None, /, **options: Any) -> Run:
    """Route a few steps in little memory, and write their assignment, as `molf probe` does.

    Args:
        recipe: A YAML file of options, or the name of a shipped recipe.
        **options: The options of `molf probe` by name. They replace those of the recipe; None is
            as if left out.

    Returns:
        The probe. It has `routing` and `assignment`, no model and no metrics. Give its `path` as
        the option `assignment` of method `hybrid`.

    Raises:
        InputError: An option, the data or the model is wrong. Nothing was written.
        RunError: The probe failed; its directory has the traceback.
    """
    from molf.job.advice.choices import check_chosen
    from molf.job.ahead.probe import probe as probe_run
    from molf.job.settings.probe import ProbeSettings

    arguments = parsed("probe", options, recipe)
    if {"figures", "plan"} & arguments.keys():
        raise InputError("figures and plan are for the command line.")
    by, share = arguments.get("by", "wins"), arguments.get("share")
    check_chosen(by, share)
    settings = arguments.get("settings", ProbeSettings())
    return Run(probe_run(settings, by=by, share=share).directory)
