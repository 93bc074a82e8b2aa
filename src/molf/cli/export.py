"""`molf export`: options and checks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from molf.job.settings.settings import DTYPES, SAVE_ROUNDINGS
from molf.shown import as_line
from molf.streams import ignoring_print_errors, result_on_disk

KINDS = ("model", "adapter")


def export_run(
    run: Path,
    /,
    *,
    what: Annotated[str, Parameter(choices=KINDS)] = "model",
    dtype: Annotated[str | None, Parameter(choices=DTYPES, show_default="as it is")] = None,
    save_rounding: Annotated[
        str | None, Parameter(choices=SAVE_ROUNDINGS, show_default="the run's")
    ] = None,
    output_dir: Annotated[Path | None, Parameter(show_default="RUN/WHAT-DTYPE")] = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write the model of a run, or its adapter, in another type or to another place.

    Args:
        run: Directory of a run of `molf train`.
        what: The merged model, which transformers loads, or the adapter, which PEFT loads.
        dtype: Type of the weights; tensors that the run's model keeps in float32 stay so.
        save_rounding: How a model's weights are rounded to a type of 16 bits.
        output_dir: Where it goes.
        overwrite: Replace an earlier export there.
    """
    from molf.job.model.export_place import export_place
    from molf.job.record.finished_run import read_run

    finished = read_run(run)
    with finished.reading(), ignoring_print_errors():
        finished.check(what)
        # Before torch is imported, so that a wrong place is reported at once.
        path = export_place(finished, what, dtype, output_dir, overwrite=overwrite)
        from molf.job.libraries import quiet_libraries

        with quiet_libraries():
            from molf.job.model.export import export_adapter, export_model

            if what == "model":
                export_model(finished, dtype, path, rounding=save_rounding)
            else:
                export_adapter(finished, dtype, path)
    with result_on_disk(f"The export to {path} is complete"):
        sys.stdout.write(f"{as_line(str(path))}\n")
