"""`molf train`: run a training, or a dry run, and print the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from molf.job.settings.settings import DATA, OUTPUT, TrainSettings


def train_model(
    settings: TrainSettings = TrainSettings(),  # noqa: B008 (frozen)
    *,
    config: Annotated[Path | None, Parameter(group=DATA)] = None,
    report: Annotated[bool, Parameter(group=OUTPUT)] = True,
    spectra: Annotated[bool, Parameter(group=OUTPUT)] = True,
    print_config: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False,
) -> None:
    """Fine-tune a model and measure it before and after.

    Args:
        settings: The options.
        config: A YAML file of these options, or a recipe by name; the command line has precedence.
        report: Write report.html into the run, a page of charts and tables (`molf report`).
        spectra: Measure the spectrum of each linear layer's change, in at most 3% of the training's
            time, for that page (`spectra.json`).
        print_config: Check the options, print all of them with their defaults as YAML, and stop.
    """
    if print_config:
        from molf.cli.recipes.commands import print_options

        print_options(settings)
        return
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
        result = None
    disconnect()
    if result is None or launched_rank():
        return
    if spectra:
        from molf.job.extract.spectra import spectra_at_end

        spectra_at_end(result.directory, result.training_seconds)
    page = None
    if report:
        from molf.report.build import page_at_end

        page = page_at_end(result.directory)
    with result_on_disk(f"The run in {result.directory} is complete"):
        print_summary(result, page)
