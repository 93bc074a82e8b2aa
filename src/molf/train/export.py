"""A run's model or adapter in another type, or in another place."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from molf.core.merge import merge
from molf.errors import InputError
from molf.train.files import replacing_directory
from molf.train.finished_run import FinishedRun
from molf.train.model_loading import LoadedModel, load_model
from molf.train.model_saving import SaveError, save_model
from molf.train.run_directory import ADAPTER, MODEL, check_output

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
    path = _checked(run, MODEL, wanted, output_dir, overwrite=overwrite, marker="config.json")
    if torch.promote_types(wanted, loaded.dtype) != loaded.dtype:
        loaded = _in_full(run, loaded, wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    card = source / "README.md"
    save_model(loaded.model, loaded, wanted, card.read_text(encoding="utf-8"), path)
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
    path = _checked(
        run, ADAPTER, wanted, output_dir, overwrite=overwrite, marker="adapter_config.json"
    )
    tensors = {n: t.to(wanted) if t.is_floating_point() else t for n, t in tensors.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise SaveError(f"the adapter has numbers that do not fit {wanted}; nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_directory(path) as directory:
        shutil.copytree(source, directory, dirs_exist_ok=True)
        save_file(tensors, directory / _ADAPTER_WEIGHTS, {"format": "pt"})
    return path


def _checked(
    run: FinishedRun,
    what: str,
    dtype: torch.dtype,
    output_dir: Path | None,
    *,
    overwrite: bool,
    marker: str,
) -> Path:
    """Where the export goes, once that is known to be possible."""
    name = f"{what}-{str(dtype).removeprefix('torch.')}"
    path = run.path / name if output_dir is None else output_dir.expanduser()
    kept = [run.path, run.path / MODEL, run.path / ADAPTER]
    if any(path.resolve() == place.resolve() for place in kept):
        raise InputError(
            f"output_dir {path} is the run's own. Give another --output_dir, or none for {name}/."
        )
    check_output(path, overwrite=overwrite, marker=marker)
    return path


def _in_full(run: FinishedRun, loaded: LoadedModel, wanted: torch.dtype) -> LoadedModel:
    """The model before it was rounded to the type that the run saved it in, where it can be had."""
    beside_quantised = any(run.config.get(name) for name in ("load_in_4bit", "load_in_8bit"))
    dequantised = beside_quantised and run.config.get("merge_base") != "original"
    if dequantised or not (run.path / ADAPTER).is_dir():
        warnings.warn(
            f"{run.path / MODEL} is stored in {loaded.dtype}, and nothing more exact was kept: "
            f"in {wanted} the numbers are the same.",
            stacklevel=3,
        )
        return loaded
    base = load_model(str(run.config["model"]))
    model = PeftModel.from_pretrained(base.model, run.path / ADAPTER)
    base.model = merge(model, sample=_SAMPLE)
    # What belongs to the run's model, such as the type in its configuration, is written by it.
    base.config, base.generation_config = loaded.config, loaded.generation_config
    base.tokenizer = loaded.tokenizer
    return base
