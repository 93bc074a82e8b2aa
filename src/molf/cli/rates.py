"""`molf lr`: a range test of learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from molf.job.settings.rates import HIGHEST, LOWEST, RateSettings
from molf.job.settings.settings import DATA, OPTIMIZATION


def find_rates(
    settings: RateSettings = RateSettings(),  # noqa: B008 (frozen)
    *,
    config: Annotated[Path | None, Parameter(group=DATA)] = None,
    lowest: Annotated[float, Parameter(name="--from", group=OPTIMIZATION)] = LOWEST,
    highest: Annotated[float, Parameter(name="--to", group=OPTIMIZATION)] = HIGHEST,
) -> None:
    """Train briefly with growing learning rates, and print rates to begin with.

    Args:
        settings: The options of `molf train`; no model is kept.
        config: A YAML file of these options, or a recipe by name; the command line has precedence.
        lowest: Rate of the first step of a sweep.
        highest: Rate of the last step.
    """
    from molf.job.ahead.rates import range_test

    result = range_test(settings, lowest=lowest, highest=highest)
    from molf.amounts import duration
    from molf.console import PlainConsole
    from molf.job.ahead.rate_texts import evidence_lines
    from molf.job.record.ownership import RATES, RATES_FIGURE, RATES_TABLE
    from molf.streams import result_on_disk

    with result_on_disk(f"The range test in {result.path} is complete"):
        console = PlainConsole()
        for sweep in result.sweeps:
            held = "" if sweep.held is None else f", {sweep.held} held at 0"
            console.lines(f"{sweep.option} of {result.method}{held}")
            console.lines(*(f"  {line}" for line in evidence_lines(sweep)))
            console.lines(*(f"  doubt       {line}" for line in sweep.doubts))
        files = (RATES_FIGURE, RATES_TABLE, RATES)
        console.lines(
            f"time      {duration(result.seconds)}",
            *(f"written   {result.path / name}" for name in files),
        )
