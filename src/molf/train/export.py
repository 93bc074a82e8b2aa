"""A run's model or adapter in another type, or in another place."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from molf.core.merge import merge
from molf.core.quantised import quantisation_of
from molf.errors import InputError
from molf.paths import check_inputs_outside, is_within, settled
from molf.train.files import replacing_directory, write_json
from molf.train.finished_run import FinishedRun
from molf.train.model_loading import LoadedModel, load_model
from molf.train.model_saving import SaveError, save_model
from molf.train.ownership import ADAPTER, AN_EXPORT, CHECKPOINTS, EXPORT, MODEL, ROUTING
from molf.train.quantised_base import load_quantised
from molf.train.run_directory import check_output

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_SAMPLE = torch.arange(16)[None]


def export_model(
    run: FinishedRun, dtype: str | None, output_dir: Path | None, *, overwrite: bool
) -> Path:
    """Write the merged model; return where.

    Where a wider type is asked for than the run saved its model in, its adapter is merged into the
    base once more, in float32.

    Args:
        run: A run with a model.
        dtype: Type of the weights; None for that of the run's model.
        output_dir: Where it goes; None for a directory in the run.
        overwrite: Replace an earlier export there.

    Raises:
        InputError: The place is taken or cannot be written, or the base is not there any more.
        SaveError: It could not be written; an earlier export is as it was.
    """
    source = run.path / MODEL
    loaded = load_model(str(source))
    wanted = loaded.dtype if dtype is None else getattr(torch, dtype)
    path = _checked(run, MODEL, wanted, output_dir, overwrite=overwrite)
    if torch.promote_types(wanted, loaded.dtype) != loaded.dtype:
        loaded = _in_full(run, loaded, wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(loaded.model, loaded, wanted, _card(source), path, _marker(run, MODEL, wanted))
    return path


def export_adapter(
    run: FinishedRun, dtype: str | None, output_dir: Path | None, *, overwrite: bool
) -> Path:
    """Write the adapter; return where. The arguments are those of `export_model`.

    Raises:
        InputError: The place is taken or cannot be written.
        SaveError: The numbers do not fit the type; nothing was written.
    """
    source = run.path / ADAPTER
    with safe_open(source / _ADAPTER_WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    stored = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    wanted = stored if dtype is None else getattr(torch, dtype)
    path = _checked(run, ADAPTER, wanted, output_dir, overwrite=overwrite)
    tensors = {n: t.to(wanted) if t.is_floating_point() else t for n, t in tensors.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise SaveError(f"the adapter has numbers that do not fit {wanted}; nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_directory(path) as directory:
        shutil.copytree(source, directory, dirs_exist_ok=True)
        save_file(tensors, directory / _ADAPTER_WEIGHTS, {"format": "pt"})
        _marker(run, ADAPTER, wanted)(directory)
    return path


def _marker(run: FinishedRun, what: str, dtype: torch.dtype) -> Callable[[Path], None]:
    """What writes the file by which `--overwrite` knows an export: where it is from, its files."""

    def write(directory: Path) -> None:
        record = {
            "run": run.path.resolve().name,
            "what": what,
            "dtype": str(dtype).removeprefix("torch."),
            "files": sorted(entry.name for entry in directory.iterdir()),
        }
        write_json(directory / EXPORT, record)

    return write


def _card(source: Path) -> str | None:
    """The model's card; the user may have deleted it."""
    path = source / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _checked(
    run: FinishedRun,
    what: str,
    dtype: torch.dtype,
    output_dir: Path | None,
    *,
    overwrite: bool,
) -> Path:
    """Where the export goes, once that is known to be possible."""
    name = f"{what}-{str(dtype).removeprefix('torch.')}"
    path = run.path / name if output_dir is None else settled(output_dir)
    kept = [run.path / part for part in (MODEL, ADAPTER, ROUTING, CHECKPOINTS)]
    if path.resolve() == run.path.resolve() or any(is_within(path, place) for place in kept):
        raise InputError(
            f"output_dir {path} is the run's own. Give another --output_dir, or none for {name}/."
        )
    check_output(path, overwrite=overwrite, ownership=AN_EXPORT)
    check_inputs_outside(path, {"the run's base": run.config.get("model")})
    return path


def _in_full(run: FinishedRun, loaded: LoadedModel, wanted: torch.dtype) -> LoadedModel:
    """The model before it was rounded to the type that the run saved it in, where it can be had."""
    if not (run.path / ADAPTER).is_dir():
        warnings.warn(
            f"{run.path / MODEL} is stored in {loaded.dtype}, and nothing more exact was kept: "
            f"in {wanted} the numbers are the same.",
            stacklevel=3,
        )
        return loaded
    base = load_model(str(run.config["model"]))
    into = _quantise_as_trained(run, base)
    model = PeftModel.from_pretrained(base.model, run.path / ADAPTER)
    base.model = merge(model, base=into, sample=_SAMPLE)
    # What belongs to the run's model, such as the type in its configuration, is written by it.
    base.config, base.generation_config = loaded.config, loaded.generation_config
    base.tokenizer = loaded.tokenizer
    return base


def _quantise_as_trained(run: FinishedRun, base: LoadedModel) -> str | None:
    """Have the base quantised if the run's model was merged into its dequantised numbers.

    Returns:
        What the adapter is to be merged into: "dequantised", or None for real weights.
    """
    if run.config.get("merge_base") != "dequantised":
        return None
    if quantisation_of(base.model.config) is None:
        option = "load_in_4bit" if run.config.get("load_in_4bit") else "load_in_8bit"
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base.model = load_quantised(str(run.config["model"]), option, device)
    return "dequantised"
