"""Export the model or adapter of a run in another type or place."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from molf.core.model.merge import merge
from molf.core.model.quantised import quantisation_of
from molf.disk.files import write_json
from molf.job.model.export_place import check_unchanged_base
from molf.job.model.loading import LoadedModel, load_model
from molf.job.model.low_halves import Rounding, read_low_halves
from molf.job.model.quantised import load_quantised
from molf.job.model.saved_tensors import Storing, default_dtype, dtype_name
from molf.job.model.saving import SaveError, save_model, saving
from molf.job.record.finished_run import FinishedRun
from molf.job.record.ownership import ADAPTER, EXPORT, LOW_HALVES, MODEL

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_SAMPLE = torch.arange(16)[None]


def export_model(
    run: FinishedRun, dtype: str | None, path: Path, *, rounding: str | None = None
) -> None:
    """Write the merged model.

    For a wider type than that of the saved model, the low halves that the run kept are used. If it
    kept none, its adapter is merged into the base again, in float32.

    Args:
        run: A run with a model.
        dtype: Type of the weights; None for that of the run's model.
        path: The directory, checked by `export_place`; an earlier export there is replaced.
        rounding: Rounding to a narrower type; None for that of the run.

    Raises:
        InputError: The base no longer exists.
        SaveError: It could not be written; an earlier export is unchanged.
    """
    source = run.path / MODEL
    loaded = load_model(str(source))
    main = default_dtype(loaded)
    wanted = main if dtype is None else getattr(torch, dtype)
    halves = None
    if rounding is not None and torch.promote_types(wanted, main) == wanted:
        warnings.warn(
            f"Without effect: save_rounding={rounding}. The model is stored in {main}, and "
            f"{wanted} holds its numbers exactly.",
            stacklevel=2,
        )
    # A narrower type needs no more bits than the saved model has.
    if torch.promote_types(wanted, main) != main:
        if (run.path / LOW_HALVES).is_file():
            halves = read_low_halves(run.path / LOW_HALVES)
        else:
            loaded = _unrounded(run, loaded, wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    base_dtype = None if run.base_dtype is None else getattr(torch, run.base_dtype)
    storing = Storing(
        dtype=None if dtype is None else wanted,
        rounding=Rounding.chosen(
            rounding or run.config.get("save_rounding"), run.seed, base_dtype, wanted
        ),
    )
    finish = marker(run, MODEL, wanted)
    save_model(loaded.model, loaded, storing, _card(source), path, finish, low_halves=halves)


def export_adapter(run: FinishedRun, dtype: str | None, path: Path) -> None:
    """Write the adapter; the arguments are those of `export_model`.

    Raises:
        SaveError: A number overflows the type, or the files could not be written; an earlier export
            is unchanged.
    """
    source = run.path / ADAPTER
    tensors = load_file(source / _ADAPTER_WEIGHTS)
    stored = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    wanted = stored if dtype is None else getattr(torch, dtype)
    tensors = {n: t.to(wanted) if t.is_floating_point() else t for n, t in tensors.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise SaveError(f"the adapter has numbers that do not fit {wanted}; nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with saving(path, size) as directory:
        shutil.copytree(source, directory, dirs_exist_ok=True)
        save_file(tensors, directory / _ADAPTER_WEIGHTS, {"format": "pt"})
        marker(run, ADAPTER, wanted)(directory)


def marker(run: FinishedRun, what: str, dtype: torch.dtype) -> Callable[[Path], None]:
    """Return a function that writes the record of an export into its directory."""

    # --overwrite deletes only directories with this record.
    def write(directory: Path) -> None:
        record = {
            "run": run.path.resolve().name,
            "what": what,
            "dtype": dtype_name(dtype),
            "files": sorted(entry.name for entry in directory.iterdir()),
        }
        write_json(directory / EXPORT, record)

    return write


def _card(source: Path) -> str | None:
    """Return the text of the model card, or None if the user deleted it."""
    path = source / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _unrounded(run: FinishedRun, loaded: LoadedModel, wanted: torch.dtype) -> LoadedModel:
    """Return the model before rounding, if the run has an adapter to merge; else warn."""
    if not (run.path / ADAPTER).is_dir():
        warnings.warn(
            f"{run.path / MODEL} is stored in {loaded.stored.main_dtype}, and nothing more exact "
            f"was kept: in {wanted} the numbers are the same. (molf train --keep_low_halves keeps "
            "it.)",
            stacklevel=3,
        )
        return loaded
    check_unchanged_base(run)
    base = load_model(str(run.config["model"]))
    into = _quantise_as_trained(run, base)
    model = PeftModel.from_pretrained(base.model, run.path / ADAPTER)
    return replace(loaded, model=merge(model, base=into, sample=_SAMPLE))


def _quantise_as_trained(run: FinishedRun, base: LoadedModel) -> str | None:
    """Quantise the base if the run merged its adapter into the dequantised weights.

    Returns:
        "dequantised", or None to merge into the unquantised weights.
    """
    if run.config.get("merge_base") != "dequantised":
        return None
    if quantisation_of(base.model.config) is None:
        # A base that is stored quantised was loaded as such, so only molf's own option remains.
        option = "load_in_4bit" if run.config.get("load_in_4bit") else "load_in_8bit"
        # bitsandbytes quantises on the device that the model is loaded on.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base.model = load_quantised(str(run.config["model"]), option, device)
    return "dequantised"
