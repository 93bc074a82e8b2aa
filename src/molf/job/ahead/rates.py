"""A range test of learning rates (Smith, arXiv 1506.01186): one sweep per rate of a method."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from molf.inputs import check_installed
from molf.job.ahead.evidence import Floats, RangeTest, SweptRate, evidence_of
from molf.job.ahead.short import short_training
from molf.job.inputs import Inputs
from molf.job.progress import Reporter
from molf.job.record.directory import RunDirectory
from molf.job.record.ownership import A_RANGE_TEST
from molf.job.settings.rates import HIGHEST, LOWEST, RateSettings, check_range
from molf.job.settings.resolved import ResolvedSettings
from molf.ranks import check_alone

if TYPE_CHECKING:
    from molf.job.opening import Opening


def range_test(
    settings: RateSettings,
    *,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    reporter: Reporter | None = None,
    inputs: Inputs | None = None,
) -> RangeTest:
    """Train briefly with growing rates, and write the curves of the loss and a suggestion.

    Args:
        settings: The options.
        lowest: The rate of the first step.
        highest: The rate of the last step.
        reporter: Shows the progress; on standard error if not given.
        inputs: Returns task and base; loaded if not given.

    Raises:
        InputError: The options, the data or the model are wrong. Nothing was written.
        RunError: The test failed; its directory holds the traceback.
    """
    check_alone("molf lr")
    check_range(lowest, highest)
    check_installed("matplotlib", "molf lr")
    name = f"lr-{settings.method}"
    with short_training(settings.training, name, reporter, inputs, A_RANGE_TEST) as short:
        from molf.job.ahead.rate_files import write_files, write_start

        opening, directory = short.opening, short.directory
        record = write_start(short, (lowest, highest))
        rates = np.geomspace(lowest, highest, opening.data.steps)
        begun = time.perf_counter()
        sweeps: list[SweptRate] = []
        for option in swept_options(opening.settings):
            if sweeps:
                opening = short.reopened()
            sweeps.append(_sweep(option, rates, opening, short.reporter))
        seconds = time.perf_counter() - begun
        result = RangeTest(directory.path, settings.method, tuple(sweeps), seconds)
        write_files(directory, result, record)
        directory.complete()
    return result


def swept_options(settings: ResolvedSettings) -> tuple[str, ...]:
    """Return the options of the rates that the method's experts use."""
    from molf.job.ahead.sweep import DENSE, LORA

    has_lora = settings.has_adapter or (
        settings.method_config is not None and settings.assigned is None
    )
    return (*([DENSE] if settings.trains_dense else []), *([LORA] if has_lora else []))


def _sweep(option: str, rates: Floats, opening: Opening, reporter: Reporter) -> SweptRate:
    """Train with a growing rate, in place, and return the sweep; the model is freed."""
    from molf.disk.files import scratch_directory
    from molf.job.ahead.sweep import DENSE, FIRST, LORA, Sweep
    from molf.job.record.result import DivergedError
    from molf.job.training import run_training

    settings = opening.settings
    both = len(swept_options(settings)) > 1
    other = LORA if option == DENSE else DENSE
    reporter.say(
        f"Sweep of {option} from {rates[0]:g} to {rates[-1]:g}"
        + (f", {other} held at 0" if both else "")
    )
    sweep = Sweep(option, rates, float(getattr(settings, option)))
    with (
        scratch_directory("lr") as scratch,  # logs of the training, which rates.csv replaces
        RunDirectory(scratch / "sweep", overwrite=False) as place,
    ):
        try:
            run_training(opening, place, reporter, callbacks=[sweep], keeps_model=False)
        except DivergedError:
            if len(sweep.losses) < FIRST:  # not by the growing rate
                raise
            sweep.end_with_infinite_loss()
    opening.base.model = None
    steps = len(sweep.losses)
    losses = np.array(sweep.losses)
    return SweptRate(
        option,
        other if both else None,
        rates[:steps],
        losses,
        np.array(sweep.won),
        evidence_of(rates[:steps], losses, diverged=sweep.diverged),
        sweep.passes,
    )
