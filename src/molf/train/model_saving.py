"""The trained model on disk: checkpoints of transformers and PEFT that need nothing of molf."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from molf.core.quantised import quantisation_of
from molf.train.files import replacing_directory
from molf.train.model_card import adapter_card
from molf.train.model_loading import LoadedModel
from molf.train.resolved import ResolvedSettings


class SaveError(RuntimeError):
    """A checkpoint could not be written; nothing half-written bears its name."""


def save_model(
    model: Any,
    base: LoadedModel,
    dtype: torch.dtype,
    card: str | None,
    path: Path,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write `model` with the tokenizer and configurations of `base`, whole or not at all.

    The model is cast in place, so that tied weights stay tied and no second copy is held.

    Args:
        model: The trained plain model.
        base: What it was trained from. Its configurations are saved, as the trainer changes those
            of the model (caching off, padding token).
        dtype: Type of the saved weights.
        card: Text of the model card; None for none.
        path: The checkpoint's directory.
        finish: Called with the directory once everything is in it, before it gets its name.

    Raises:
        SaveError: A weight does not fit the type, or the disk is full or cannot be written. An
            earlier checkpoint is as it was.
    """
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise SaveError(f"{name} has numbers that are not finite, or do not fit {dtype}")
    model.config = base.config
    model.generation_config = base.generation_config
    try:
        with replacing_directory(path) as directory:
            model.save_pretrained(directory)
            base.carried.add_to(directory)
            base.tokenizer.save_pretrained(directory)
            if card is not None:
                (directory / "README.md").write_text(card, encoding="utf-8")
            if finish is not None:
                finish(directory)
    except (OSError, SafetensorError) as error:
        raise SaveError(_why_not_saved(path, model.parameters(), error)) from error


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
            (directory / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        raise SaveError(_why_not_saved(path, trained, error)) from error


def _why_not_saved(path: Path, saved: Iterable[torch.Tensor], error: Exception) -> str:
    size = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if not full:
        return f"the {path.name} could not be saved to {path}: {error}"
    free = shutil.disk_usage(path.parent).free
    return (
        f"the disk is full: saving the {path.name} to {path} needs about {size / 1e6:,.0f} MB, "
        f"{free / 1e6:,.0f} MB are free"
    )
