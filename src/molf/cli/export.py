"""`molf export`: options and checks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from molf.errors import InputError
from molf.job.record.directory import locking_runs
from molf.job.serving import warn_of_vllm
from molf.job.settings.settings import DTYPES, SAVE_ROUNDINGS
from molf.shown import as_line
from molf.streams import ignoring_print_errors, result_on_disk

if TYPE_CHECKING:
    from molf.job.record.finished_run import FinishedRun

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
    rank: Annotated[int | None, Parameter(show_default="the run's own adapter")] = None,
    modules_to_save: Annotated[bool, Parameter(negative=())] = False,
    evaluate: Annotated[bool, Parameter(negative=())] = False,
    output_dir: Annotated[Path | None, Parameter(show_default="RUN/WHAT-DTYPE")] = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write the model of a run, or its adapter, in another type or to another place.

    Args:
        run: Directory of a run of `molf train`.
        what: The merged model, which transformers loads, or the adapter, which PEFT loads.
        dtype: Type of the weights; tensors that the run's model keeps in float32 stay so.
        save_rounding: How a model's weights are rounded to a narrower type of 16 bits.
        rank: With an adapter, of any run: extract one of this rank from the change of the weights.
        modules_to_save: With rank, also keep changed norms, embeddings and biases in it.
        evaluate: With rank, measure the model, and the base with parts of the change, on its task.
        output_dir: Where it goes.
        overwrite: Replace an earlier export there.
    """
    from molf.job.model.export_place import export_place
    from molf.job.record.finished_run import read_run

    if save_rounding is not None and what != "model":
        raise InputError(
            f"Invalid save_rounding={save_rounding} with what={what}: an adapter is rounded to the "
            "nearest numbers. Leave it out."
        )
    check_extraction(what, rank, modules_to_save=modules_to_save, evaluate=evaluate)
    finished = read_run(run)
    if rank is not None:
        _extract(
            finished,
            rank,
            dtype or "float32",
            output_dir,
            overwrite=overwrite,
            keeps_modules=modules_to_save,
            evaluates=evaluate,
        )
        return
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
                warn_of_vllm(path)
    with result_on_disk(f"The export to {path} is complete"):
        sys.stdout.write(f"{as_line(str(path))}\n")


def check_extraction(what: str, rank: int | None, *, modules_to_save: bool, evaluate: bool) -> None:
    """Check the options of an extraction beside each other.

    Raises:
        InputError: One is not allowed, or needs another.
    """
    if rank is None:
        for name, given in (("modules_to_save", modules_to_save), ("evaluate", evaluate)):
            if given:
                raise InputError(
                    f"Invalid {name} without rank: it is for an adapter that is extracted from the "
                    "change of the weights. Give --rank R."
                )
        return
    if what != "adapter":
        raise InputError(f"Invalid rank={rank} with what={what}. Give --what adapter.")
    if rank < 1:
        raise InputError(f"Invalid rank={rank}. Must be at least 1.")


def _extract(
    run: FinishedRun,
    rank: int,
    dtype: str,
    output_dir: Path | None,
    *,
    overwrite: bool,
    keeps_modules: bool,
    evaluates: bool,
) -> None:
    """Write an adapter that is extracted from the change of the weights."""
    from molf.job.model.export_place import extraction_place

    with run.reading(), ignoring_print_errors():
        path = extraction_place(run, rank, dtype, output_dir, overwrite=overwrite)
        from molf.job.libraries import quiet_libraries
        from molf.job.progress import make_reporter

        with quiet_libraries(), locking_runs([run.base]):
            from molf.job.extract.extract import extract

            made = extract(
                run,
                rank,
                dtype,
                path,
                keeps_modules=keeps_modules,
                evaluates=evaluates,
                reporter=make_reporter(),
            )
        warn_of_vllm(path)
    from molf.cli.advice.extraction import print_extraction

    with result_on_disk(f"The export to {path} is complete"):
        print_extraction(made)
        sys.stdout.write(f"{as_line(str(path))}\n")
