"""Register the commands and set how their options are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from cyclopts import App, ArgumentCollection, Parameter

from molf.cli.helping import EXAMPLES, CommonOptions, WholeNames, epilogue
from molf.cli.recipes.apply import apply_recipe, apply_run
from molf.cli.values import check_directory, check_values
from molf.ranks import check_alone


def _as_written(name: str) -> str:
    """Keep underscores in options, as in TrainingArguments; dashes work as well."""
    return name


# Also of each group of commands: the generator of the documentation does not inherit it.
_PARAMETERS = Parameter(name_transform=_as_written, negative_iterable=())


def check_launcher(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse commands other than `molf train` in several processes.

    Raises:
        InputError: A launcher started several.
    """
    if commands and commands != ("train",):
        check_alone(" ".join(("molf", *commands)))


app = App(
    name="molf",
    help="Fine-tune language models without choosing between full fine-tuning and LoRA.",
    help_format="plaintext",
    help_formatter=WholeNames(),
    version=version("molf"),
    version_flags=("--version", "-V"),
    # check_values runs twice: on the command line, then with values of a recipe or a run added.
    config=(check_launcher, check_directory, check_values, apply_recipe, apply_run, check_values),
    default_parameter=_PARAMETERS,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # main turns it into an exit code
)
recipes = App(
    name="recipes",
    help="List, copy and check recipes: files of options for --config.",
    default_parameter=_PARAMETERS,
)
# Each command is imported on use, so that `molf --help` needs no torch.
for parent, name, function, text in (
    (app, "train", "train:train_model", "Fine-tune and measure a model; without options, a demo."),
    (app, "eval", "eval:evaluate_model", "Measure a model on tasks."),
    (app, "data", "data:preview_data", "Show the records of a training, and the text with loss."),
    (app, "plan", "plan:plan_model", "Predict parameters, memory and fitting GPUs of a training."),
    (
        app,
        "routing",
        "runs.routing:show_routing",
        "Print the share of updates that each expert won.",
    ),
    (app, "report", "runs.report:report_runs", "Write a page of charts and tables of runs."),
    (app, "compare", "runs.compare:compare_runs", "Compare methods over the seeds of many runs."),
    (app, "advise", "advice.advise:advise_run", "Assign full or LoRA per layer from a run."),
    (app, "probe", "advice.probe:probe_model", "Find an assignment by a few steps of routing."),
    (app, "lr", "rates:find_rates", "Find learning rates to begin with, by a short sweep."),
    (app, "generate", "texts.commands:generate_text", "Print a model's answers to prompts."),
    (app, "chat", "texts.commands:chat_with", "Talk to a model."),
    (app, "export", "export:export_run", "Write a run's model or adapter in another type."),
    (app, "push", "push:push_run", "Upload a run's model or adapter to the Hugging Face Hub."),
    (recipes, "ls", "recipes.commands:list_recipes", "Print the shipped recipes."),
    (recipes, "cp", "recipes.commands:copy_recipe", "Copy a shipped recipe."),
    (
        recipes,
        "schema",
        "recipes.commands:print_schema",
        "Print the JSON schema of recipes.",
    ),
    (
        recipes,
        "validate",
        "recipes.commands:validate_recipes",
        "Check recipes; run nothing.",
    ),
):
    many: dict[str, Any] = {}
    if name in EXAMPLES:
        many = {"help_formatter": CommonOptions(), "help_epilogue": epilogue(name)}
    parent.command(f"molf.cli.{function}", name=name, help=text, **many)
app.command(recipes)
app.register_install_completion_command(
    help="Install completion of commands and options for this shell (bash, zsh, fish)."
)


@app.command(name="help")
def show_help(*command: str) -> None:
    """Print the help of molf, or of a command.

    Args:
        command: The command, such as `train` or `recipes ls`.
    """
    app([*command, "--help"], exit_on_error=False, print_error=False)


study = App(
    name="study",
    help="Run many trainings from one file, and compare methods fairly.",
    default_parameter=_PARAMETERS,
)
for _name, _function, _help in (
    ("run", "run_study", "Run the trials of a study with workers on this machine."),
    ("work", "work_on_study", "Run trials of a study as one of many workers."),
    ("status", "show_status", "Print progress, expected end, failures and best trials."),
    ("report", "report_study", "Write tables, figures and CSV files of a study."),
    ("restore", "restore_study", "Take finished trials from CSV files of a report."),
    ("stop", "stop_study", "Let the workers of a study end after their trial."),
):
    study.command(f"molf.cli.study:{_function}", name=_name, help=_help)
app.command(study)


_SOURCES = ("__data", "__eval_data", "__validation_data")


def join_stdin(tokens: Sequence[str]) -> list[str]:
    """Return the arguments with `--data -` as `--data=-`: cyclopts reads a hyphen as an option.

    The same with a weight (`-:2`) or further sources (`-,a.jsonl`).
    """
    joined: list[str] = []
    for token in tokens:
        is_stdin = token == "-" or token.startswith(("-,", "-:"))
        if is_stdin and joined and joined[-1].replace("-", "_") in _SOURCES:
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def join_booleans(tokens: Sequence[str]) -> list[str]:
    """Return the arguments with `--bf16 true` as `--bf16=true`, like transformers' own parser."""
    # Fast path: reading the options imports the settings.
    if not any(token.lower() in ("true", "false") for token in tokens):
        return list(tokens)
    booleans = _boolean_options()
    joined: list[str] = []
    for token in tokens:
        # Only after a boolean option: `true` may also be the value of another one.
        name = joined[-1].lstrip("-").replace("-", "_") if joined else ""
        if token.lower() in ("true", "false") and name in booleans:
            joined[-1] += f"={token.lower()}"
        else:
            joined.append(token)
    return joined


def _boolean_options() -> set[str]:
    from dataclasses import fields

    from molf.cli.eval_options import EvalOptions
    from molf.job.settings.settings import TrainSettings

    return {"report", "spectra", "plan", "chat", "json", "jsonl"} | {  # of the commands themselves
        option.name
        for options in (TrainSettings, EvalOptions)
        for option in fields(options)
        if str(option.type).startswith("Annotated[bool")
    }
