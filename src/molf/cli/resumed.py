"""`--resume`: read the options of the run from its directory; the command line takes precedence."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App, ArgumentCollection

from molf.cli.recipe import given_by
from molf.errors import InputError

# Of this call alone: the run's own values would not be meant.
_OWN = ("output_dir", "overwrite", "resume", "dry_run")
_NO = ("false", "no", "n", "0")


def apply_run(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Apply the options of the run to resume to options absent from command line and recipe.

    Raises:
        InputError: There is no run to resume, or an option must be given again.
    """
    resume = arguments.get("--resume", default=None)
    output = arguments.get("--output_dir", default=None)
    if commands != ("train",) or resume is None or output is None:
        return
    # Without output_dir, the check of the options rejects it.
    if not resume.tokens or resume.tokens[-1].value.lower() in _NO or not output.tokens:
        return
    from molf.job.record.resumed_run import is_started, stored_options
    from molf.paths import check_path, settled

    given = {argument.name.lstrip("-") for argument in arguments if argument.tokens}
    path = Path(output.tokens[-1].value)
    check_path(path, "output_dir")
    path = settled(path)
    if not is_started(path):
        if not given - {*_OWN, "config"} and "config" not in given:
            raise InputError(
                f"output_dir {path} holds no run to resume, and no options of a new one are given."
            )
        return  # a new run, as every start of a job script after the first resumes
    options, masked = stored_options(path)
    missing = [name for name in masked if name not in given]
    if missing:
        raise InputError(
            f"{path} was started with {missing[0]}={options[missing[0]]} and a query or user that "
            f"are not stored. Give --{missing[0]} again, with the whole address."
        )
    known = {name: value for name, value in options.items() if name not in _OWN}
    given_by(path / "config.yaml", known)(app, commands, arguments)
