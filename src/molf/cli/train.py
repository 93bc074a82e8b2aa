"""`molf train`: run a training, or a dry run, and print the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from molf.job.settings.settings import DATA, TrainSettings


def train_model(
    settings: TrainSettings = TrainSettings(),  # noqa: B008 (frozen)
    *,
    config: Annotated[Path | None, Parameter(group=DATA)] = None,
) -> None:
    """Fine-tune a model and measure it before and after.

    Args:
        settings: The options.
        config: A YAML file of these options, or a recipe by name; the command line has precedence.
    """
    if settings.dry_run:
        from molf.cli.plan_report import print_dry_run
        from molf.job.run import dry_run

        print_dry_run(dry_run(settings))
        return
    from molf.cli.lines import say
    from molf.cli.summary import print_summary
    from molf.job.record.result import FinishedError
    from molf.job.run import train
    from molf.ranks import disconnect, launched_rank
    from molf.streams import result_on_disk

    try:
        result = train(settings)
    except FinishedError as finished:
        say("note", str(finished))
        return
    disconnect()
    if launched_rank():
        return
    with result_on_disk(f"The run in {result.directory} is complete"):
        print_summary(result)
