"""Check a recipe and report all its errors, without running anything."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError

from molf.cli.recipes.apply import apply_run, given_by, read_recipe, read_recipe_text
from molf.errors import InputError

_RUN_COMMAND = re.compile(r"\s*#\s*molf\s+([\w-]+)")
_COMMANDS = ("train", "eval")


@dataclass(frozen=True)
class Findings:
    """Errors and warnings of a recipe.

    Attributes:
        command: The command that the recipe is for.
        errors: One line per error.
        warnings: One line per warning.
    """

    command: str
    errors: list[str]
    warnings: list[str]


def validate_recipe(path: Path) -> Findings:
    """Check every option of a recipe with the checks of its command.

    The command is taken from the first line of the file (`# molf eval ...`); otherwise it is
    `train`. Data and models need not exist.
    """
    try:
        text = read_recipe_text(path)
        options = read_recipe(path, text)
    except InputError as error:
        return Findings("", [str(error)], [])
    command = _command(text)
    if command not in _COMMANDS:
        return Findings(
            command, [f"molf {command} takes no recipe; {' and '.join(_COMMANDS)} do."], []
        )
    with warnings.catch_warnings():
        # Parts of the options warn for no reason; warnings are collected below from all together.
        warnings.simplefilter("ignore")
        accepted, errors = _sort_out(path, command, options)
        if command == "eval":
            return Findings(command, errors, [])
        errors += _tracker_errors(path, accepted)
    errors += _training_args_errors(accepted)
    return Findings(command, errors, _training_warnings(path, accepted))


def _command(text: str) -> str:
    lines = text.splitlines()
    found = _RUN_COMMAND.match(lines[0]) if lines else None
    return found[1] if found else "train"


def _sort_out(
    path: Path, command: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the options that are valid together, and an error for each other option."""
    if _error(path, command, options) is None:
        return dict(options), []
    accepted: dict[str, Any] = {}
    # Options are added one at a time, as long as all added ones are valid together. `method` and
    # `task` come first, so that an error names the option that does not fit them. A rejected
    # option is tried again, because it may depend on an option later in the file.
    waiting = sorted(options, key=lambda name: name not in ("method", "task", "tasks"))
    while True:
        errors: dict[str, str] = {}
        for name in waiting:
            error = _error(path, command, {**accepted, name: options[name]})
            if error is None:
                accepted[name] = options[name]
            else:
                errors[name] = error
        if len(errors) in (0, len(waiting)):
            return accepted, [f"{name}: {error}" for name, error in errors.items()]
        waiting = list(errors)


def _error(path: Path, command: str, options: Mapping[str, Any]) -> str | None:
    try:
        parse_options(path, command, options)
    except (CycloptsError, InputError) as error:
        # The printed line begins with the file and the option already.
        return " ".join(str(error).replace(f" from {path}", "").split())
    return None


@cache
def _reader(command: str) -> App:
    """Return the parser of a command. Cached: making it takes longer than parsing."""
    from molf.cli.app import app

    functions = {
        "train": "molf.cli.train:train_model",
        "plan": "molf.cli.plan:plan_model",
        "lr": "molf.cli.rates:find_rates",
        "probe": "molf.cli.advice.probe:probe_model",
        "eval": "molf.cli.eval:evaluate_model",
    }
    reader = App(default_parameter=app.default_parameter, result_action="return_value")
    reader.command(functions[command], name=command)
    return reader


def parse_options(
    path: Path, command: str, options: Mapping[str, Any], *, resumes: bool = False
) -> dict[str, Any]:
    """Return the arguments that a command would be called with, given the options of a recipe.

    Args:
        path: The recipe, for messages.
        command: `train`, `plan`, `lr`, `probe` or `eval`.
        options: Its options.
        resumes: Whether `resume` adds the options of the run, as it does for the command.

    Raises:
        CycloptsError: An option is unknown, or cannot be converted.
        InputError: A value is wrong.
    """
    from molf.cli.values import check_values

    reader = _reader(command)
    further = (apply_run,) if resumes else ()
    reader.config = (given_by(path, options), *further, check_values)
    # A recipe of `molf eval` may leave its required task to the command line.
    task = ["--task", "sql"] if command == "eval" and not {"task", "tasks"} & set(options) else []
    _, bound, _ = reader.parse_args([command, *task], exit_on_error=False, print_error=False)
    return dict(bound.arguments)


def _tracker_errors(path: Path, options: Mapping[str, Any]) -> list[str]:
    """Return an error if `report_to` names a tracker that transformers does not have."""
    from molf.job.settings.settings import TrainSettings
    from molf.job.settings.training_arguments import check_trackers

    # The recipe may be run on another machine, so its trackers need not be installed here.
    settings = parse_options(path, "train", options).get("settings", TrainSettings())
    try:
        check_trackers(settings.report_to, must_be_installed=False)
    except InputError as error:
        return [str(error)]
    return []


def _training_args_errors(options: Mapping[str, Any]) -> list[str]:
    """Return the errors of `training_args`."""
    from molf.job.settings.training_arguments import check_training_args

    extra = options.get("training_args")
    if not isinstance(extra, dict) or not extra:
        return []
    given = {name: str(value) for name, value in extra.items()}
    # First checked against TRL's source: importing TRL takes seconds.
    errors = _refusals(check_training_args, given)
    if errors:
        return errors
    from molf.job.libraries import quiet_libraries

    with quiet_libraries():
        from molf.job.trainer.sft_config import parse_training_args

        return _refusals(parse_training_args, given)


def _refusals(check: Callable[[dict[str, str]], object], given: Mapping[str, str]) -> list[str]:
    """Return the message for each argument that the check rejects."""
    messages = []
    for name, value in given.items():
        try:
            check({name: value})
        except InputError as error:
            messages.append(str(error))
    return messages


def _training_warnings(path: Path, options: Mapping[str, Any]) -> list[str]:
    """Return the warnings of `molf train`, and a line for a missing required option."""
    from molf.job.settings.resolved import resolve
    from molf.job.settings.settings import TrainSettings

    lines = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = parse_options(path, "train", options).get("settings", TrainSettings())
        try:
            resolve(settings, datetime.now())
        except InputError as error:  # no model: it may follow on the command line
            lines.append(str(error))
            resolve(replace(settings, model="MODEL"), datetime.now())
    return list(dict.fromkeys([*(str(warning.message) for warning in caught), *lines]))
