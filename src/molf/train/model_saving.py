"""The trained model on disk: checkpoints of transformers and PEFT that need nothing of molf."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from molf.core.quantised import quantisation_of
from molf.errors import InputError
from molf.train.files import replacing_directory, scratch_directory, write_text
from molf.train.low_halves import LowHalves
from molf.train.model_card import adapter_card
from molf.train.model_loading import LoadedModel
from molf.train.resolved import ResolvedSettings
from molf.train.saved_tensors import (
    Stored,
    Storing,
    UnfitError,
    file_state,
    is_quantised_model,
    take_tensors,
)
from molf.train.stored import GENERATION_CONFIG


class SaveError(RuntimeError):
    """A checkpoint could not be written; nothing half-written bears its name."""


def save_model(
    model: Any,
    base: LoadedModel,
    storing: Storing,
    card: str | None,
    path: Path,
    finish: Callable[[Path], None] | None = None,
    *,
    start_dtype: torch.dtype | None = None,
    low_halves: LowHalves | None = None,
    halves_path: Path | None = None,
) -> Stored:
    """Write `model` with the tokenizer and configurations of `base`, whole or not at all.

    The model is used up: its numbers are taken out of it one tensor after the other, so that no
    second copy is held.

    Args:
        model: The trained plain model.
        base: What it was trained from. Each tensor keeps the type that it has there, and its
            configurations are saved, as the trainer changes those of the model (caching off,
            padding token).
        storing: How the numbers are stored.
        card: Text of the model card; None for none.
        path: The checkpoint's directory.
        finish: Called with the directory once everything is in it, before it gets its name.
        start_dtype: The type in which `base` was loaded for the training, to measure how much of
            the training is stored; None for no measurement.
        low_halves: What the model's bfloat16 numbers lack of float32 ones.
        halves_path: Where the lower halves go that `storing` has kept.

    Returns:
        What was stored, without the tensors.

    Raises:
        SaveError: A weight does not fit its type, or the disk is full or cannot be written. An
            earlier checkpoint is as it was.
    """
    try:
        stored = take_tensors(model, base, storing, start_dtype=start_dtype, low_halves=low_halves)
    except UnfitError as error:
        raise SaveError(str(error)) from error
    model.config = base.config
    tensors, stored.tensors = stored.tensors, {}
    size = sum(tensor.nbytes for tensor in (*tensors.values(), *stored.low_halves.values()))
    try:
        with replacing_directory(path) as directory:
            _write(model, base, tensors, directory)
            if card is not None:
                write_text(directory / "README.md", card)
            if finish is not None:
                finish(directory)
            if halves_path is not None and stored.low_halves:
                LowHalves(stored.low_halves, storing.rounding).write(halves_path)
    except (OSError, SafetensorError) as error:
        raise SaveError(_why_not_saved(path, size, error)) from error
    return stored


def _write(model: Any, base: LoadedModel, tensors: dict[str, Any], directory: Path) -> None:
    """Write a checkpoint whose tensors have the names of its files already."""
    with base_generation_config(model, base, directory):
        model.save_pretrained(directory, state_dict=tensors, save_original_format=False)
    base.carried.add_to(directory)
    base.tokenizer.save_pretrained(directory)


@contextmanager
def base_generation_config(model: Any, base: LoadedModel, directory: Path) -> Iterator[None]:
    """Have what is saved within the block carry the base's generation configuration.

    transformers refuses to save one that it finds fault with, and the trainer changes it (padding
    token). So a harmless one stands in while the model is saved, and the base's takes its place:
    its very file if there is one.

    Args:
        model: The model that is saved.
        base: What it was trained from.
        directory: Where it is saved to.
    """
    if getattr(model, "generation_config", None) is None or base.generation_config is None:
        yield
        return
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
    path = directory / GENERATION_CONFIG
    if path.exists():  # PEFT saves none
        _write_generation_config(base, path)


def _write_generation_config(base: LoadedModel, path: Path) -> None:
    if (given := base.stored.generation_config) is not None:
        path.write_bytes(given)
    elif base.generation_config is not None:
        base.generation_config.to_json_file(path)


def rehearse_saving(base: LoadedModel, name: str) -> int:
    """Save all of a model but its weights, to a place that is thrown away.

    Args:
        base: The model that will be trained.
        name: What the user calls it.

    Returns:
        How many bytes there are beside the weights.

    Raises:
        InputError: It cannot be saved: after the training it could not be either.
    """
    with scratch_directory("save") as directory:
        try:
            if not is_quantised_model(base.model):
                file_state(base.model)  # of shared tensors, some cannot be saved
            base.config.save_pretrained(directory)
            base.tokenizer.save_pretrained(directory)
            _write_generation_config(base, directory / GENERATION_CONFIG)
        except Exception as error:  # whatever would end the run after the training
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise InputError(
                f"model {name} could not be saved after a training: {reason}"
            ) from error
        return sum(entry.stat().st_size for entry in directory.rglob("*") if entry.is_file())


def save_adapter(
    save: Callable[[Any, Path], None], model: Any, settings: ResolvedSettings, path: Path
) -> None:
    """Write a trained adapter, in the type that it was trained in, whole or not at all.

    Args:
        save: Writes it into a directory.
        model: The model that carries it.
        settings: The run's settings, for the card.
        path: The adapter's directory.

    Raises:
        SaveError: The disk is full or cannot be written.
    """
    try:
        with replacing_directory(path) as directory:
            save(model, directory)
            card = adapter_card(settings, quantisation_of(model.config))
            write_text(directory / "README.md", card)
    except (OSError, SafetensorError) as error:
        size = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        raise SaveError(_why_not_saved(path, size, error)) from error


def _why_not_saved(path: Path, size: int, error: Exception) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if not full:
        return f"the {path.name} could not be saved to {path}: {error}"
    free = shutil.disk_usage(path.parent).free
    return (
        f"the disk is full: saving the {path.name} to {path} needs about {size / 1e6:,.0f} MB, "
        f"{free / 1e6:,.0f} MB are free"
    )
