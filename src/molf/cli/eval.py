"""`molf eval`: options, and printing of the metrics."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from molf.cli.eval_options import EvalOptions
from molf.console import PlainConsole
from molf.errors import InputError
from molf.job.settings.settings import DATA, OUTPUT
from molf.streams import OutputError, stop_output

if TYPE_CHECKING:
    from molf.measure import Evaluation


def evaluate_model(
    model: str | None = None,
    /,
    *,
    options: EvalOptions,
    config: Annotated[Path | None, Parameter(group=DATA)] = None,
    report: Annotated[bool, Parameter(group=OUTPUT)] = True,
) -> None:
    """Measure a model on one or several tasks.

    Args:
        model: A local directory in transformers format, or a Hub id.
        options: The options.
        config: A YAML file of these options; the command line has precedence.
        report: With output_dir, write report.html there, a page of the metrics (`molf report`).
    """
    from molf.cli.evaluation import evaluate_checkpoint, score_saved_texts, write_evaluations

    if options.predictions is not None:
        if model is not None:
            warnings.warn(f"Saved texts are scored; {model} is not used.", stacklevel=1)
        evaluations = score_saved_texts(options)
    elif model is not None:
        evaluations = evaluate_checkpoint(model, options)
    else:
        raise InputError("Give a model, or --predictions FILE with saved texts; given: neither.")
    # Before the files: an evaluation may have taken hours, and writing may fail.
    lost = _print(evaluations)
    write_evaluations(options, evaluations)
    if report and options.output_dir is not None:
        from molf.report.build import page_at_end

        if (page := page_at_end(options.output_dir)) is not None and lost is None:
            PlainConsole().lines(f"page     {page}")
    if lost is not None:
        if options.output_dir is None:
            raise lost
        done = f"The evaluation in {options.output_dir} is complete"
        warnings.warn(f"{done}, but standard output cannot be written: {lost}.", stacklevel=1)


def _print(evaluations: Mapping[str, Evaluation]) -> OutputError | None:
    """Print evaluations; if standard output fails, use standard error and return the failure."""
    from molf.cli.summary import print_evaluations

    try:
        print_evaluations(evaluations)
        sys.stdout.flush()
    except OutputError as error:
        stop_output()
        print_evaluations(evaluations, stderr=True)
        return error
    return None
