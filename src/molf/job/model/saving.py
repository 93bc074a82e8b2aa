"""Save trained models and adapters as checkpoints that transformers and PEFT load without molf."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from molf.amounts import decimal_size
from molf.core.model.quantised import quantisation_of
from molf.disk.files import replacing_directory, scratch_directory, write_text
from molf.disk.room import directory_bytes, free_bytes, is_disk_full, require_room
from molf.errors import InputError, reason_of
from molf.job.model.card import adapter_card
from molf.job.model.elsewhere import check_written, places, save_elsewhere
from molf.job.model.loading import LoadedModel
from molf.job.model.low_halves import LowHalves
from molf.job.model.saved_tensors import (
    Stored,
    Storing,
    UnfitError,
    file_state,
    is_quantised_model,
    take_tensors,
)
from molf.job.model.stored import GENERATION_CONFIG
from molf.job.record.ownership import ADAPTER, CHECKPOINTS, CONFIG, ENVIRONMENT, LOW_HALVES, MODEL
from molf.job.record.result import RunError
from molf.job.settings.resolved import ResolvedSettings

_ADAPTER_CONFIG = "adapter_config.json"


class SaveError(RunError):
    """A checkpoint could not be written; its path holds no incomplete files."""


@dataclass(frozen=True)
class Fallback:
    """Saves trained weights in another directory when saving to the run fails.

    Attributes:
        run: The run's directory.
        base: The base model, as given by the user.
        chosen: The user's fallback directory; None for the first place with enough space.
    """

    run: Path
    base: str
    chosen: Path | None = None

    @classmethod
    def of(cls, settings: ResolvedSettings, run: Path) -> Fallback:
        """Return the fallback for a run with these settings in this directory."""
        return cls(run, settings.model, settings.fallback_dir)

    def model(self, write: Callable[[Path], None], size: int) -> str:
        """Save a whole model elsewhere; return a sentence with its place."""
        # The adapter is written before the merged model, exact, and much smaller.
        if (self.run / ADAPTER / _ADAPTER_CONFIG).is_file():
            return f"The adapter, which holds the whole training, is saved: {self._loads()}"
        directory = self._save(write, size)
        if directory is None:
            return f"The trained model is lost: {self._no_place()}"
        return (
            f"The trained model was saved in {directory / MODEL} instead, and verified: load it "
            f"from there with transformers, or move it to {self.run / MODEL}."
        )

    def adapter(self, write: Callable[[Path], None], size: int) -> str:
        """Save an adapter elsewhere; return a sentence with its place."""
        directory = self._save(write, size)
        if directory is None:
            return f"The trained adapter is lost: {self._no_place()}"
        return f"The trained adapter was saved elsewhere, and verified: {self._loads(directory)}"

    def _loads(self, place: Path | None = None) -> str:
        path = (place or self.run) / ADAPTER
        return f"peft.PeftModel.from_pretrained(base, '{path}') adds it to the base {self.base}."

    def _save(self, write: Callable[[Path], None], size: int) -> Path | None:
        def write_all(directory: Path) -> None:
            write(directory)
            # The settings explain the weights if the run's directory is lost.
            for name in (CONFIG, ENVIRONMENT):
                with suppress(OSError):
                    shutil.copy(self.run / name, directory)

        return save_elsewhere(write_all, f"molf-{self.run.name}", size, self._given)

    @property
    def _given(self) -> tuple[Path, ...]:
        beside = self.run.parent  # works if the error was not a full disk
        return (beside,) if self.chosen is None else (self.chosen, beside)

    def _no_place(self) -> str:
        tried = ", ".join(map(str, places(self._given)))
        checkpoints = (self.run / CHECKPOINTS).glob("checkpoint-*")
        latest = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
        advice = f" The latest checkpoint is {latest}." if latest else ""
        return f"it could not be saved in any other directory ({tried}).{advice}"


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
    fallback: Fallback | None = None,
) -> Stored:
    """Write `model` with the tokenizer and configurations of `base`, atomically.

    The model is consumed: its tensors are freed one by one, so that no second copy is held.

    Args:
        model: The trained plain model.
        base: The base that it was trained from. Each tensor is saved in its type there. Its
            configurations are saved, as the trainer changes the model's (caching, padding token).
        storing: Type and rounding of the saved numbers.
        card: Text of the model card; None for none.
        path: The checkpoint's directory.
        finish: Called with the temporary directory when it is complete, before the rename.
        start_dtype: The type that `base` was loaded in for training, to measure the saved share
            of the update; None for no measurement.
        low_halves: Low halves of the model's weights, if these are bfloat16 halves of float32.
        halves_path: File for the low halves that `storing` keeps.
        fallback: Saves the weights elsewhere if they cannot be written; None for none.

    Returns:
        The measurements and low halves, without the tensors.

    Raises:
        SaveError: A weight overflows its type, or the disk is full or cannot be written; the
            message names the place of the weights. An earlier checkpoint is unchanged.
    """
    try:
        stored = take_tensors(model, base, storing, start_dtype=start_dtype, low_halves=low_halves)
    except UnfitError as error:
        raise SaveError(str(error)) from error
    # The trainer has changed the model's own configuration (caching, padding token).
    model.config = base.config
    tensors, stored.tensors = stored.tensors, {}
    halves = LowHalves(stored.low_halves, storing.rounding)
    size = sum(tensor.nbytes for tensor in (*tensors.values(), *stored.low_halves.values()))
    size += base.unused_tensors.nbytes

    def write(directory: Path, halves_path: Path | None) -> None:
        _write(model, base, tensors, directory)
        if card is not None:
            write_text(directory / "README.md", card)
        if halves_path is not None and halves.tensors:
            halves.write(halves_path)

    def write_elsewhere(directory: Path) -> None:
        (directory / MODEL).mkdir()
        try:
            write(directory / MODEL, directory / LOW_HALVES)
        except Exception:  # such as a tokenizer that cannot be written: save the weights alone
            alone = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(alone, directory / MODEL / SAFE_WEIGHTS_NAME, {"format": "pt"})
            for part in (base.config, base.tokenizer):
                with suppress(Exception):
                    part.save_pretrained(directory / MODEL)
        check_written(directory / MODEL, tensors)

    def save_to_fallback() -> str:
        return "" if fallback is None else fallback.model(write_elsewhere, size)

    with saving(path, size, save_to_fallback) as directory:
        if stored.unfit is not None:
            raise UnfitError(stored.unfit)
        write(directory, halves_path)
        if finish is not None:
            finish(directory)
    return stored


@contextmanager
def saving(path: Path, size: int, on_failure: Callable[[], str] = str) -> Iterator[Path]:
    """Yield a temporary directory that replaces `path` when the block succeeds.

    Args:
        path: The checkpoint's directory.
        size: The estimated bytes.
        on_failure: Saves the weights elsewhere; returns a sentence with the place.

    Raises:
        SaveError: The disk is full or cannot be written, or the block failed in another way.
    """
    try:
        # Before the write, so that no other program meets a full disk.
        require_room(path, size)
        with replacing_directory(path) as directory:
            yield directory
    except Exception as error:  # of any type: the trained weights must not be lost
        why = str(error) if isinstance(error, UnfitError) else _why_not_saved(path, size, error)
        saved = on_failure()
        raise SaveError(f"{why}. {saved}" if saved else why) from error


def _write(model: Any, base: LoadedModel, tensors: dict[str, Any], directory: Path) -> None:
    """Write a checkpoint; the tensors have the names of its files already."""
    with base_generation_config(model, base, directory), _saving_all_tensors(model):
        model.save_pretrained(
            directory,
            state_dict={**base.unused_tensors.tensors(), **tensors},
            save_original_format=False,
        )
    base.tokenizer.save_pretrained(directory)


@contextmanager
def _saving_all_tensors(model: Any) -> Iterator[None]:
    """Make a model save all tensors of `state_dict`, also names that its class ignores."""
    # `file_state` has removed the ignored ones already; unused tensors may have such names.
    model._keys_to_ignore_on_save = None
    try:
        yield
    finally:
        del model._keys_to_ignore_on_save


@contextmanager
def base_generation_config(model: Any, base: LoadedModel, directory: Path) -> Iterator[None]:
    """Save the base's generation configuration with the model that the block saves.

    Args:
        model: The model that is saved.
        base: The base that it was trained from.
        directory: The directory of the save.
    """
    # The trainer changes the model's (padding token), and transformers rejects the save of some. An
    # empty one is used for the save, then replaced by the base's file, unchanged.
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
    """Save all files of a model except its weights to a temporary directory, as a test.

    Args:
        base: The model that will be trained.
        name: The model, as given by the user.

    Returns:
        The bytes of the files.

    Raises:
        InputError: It cannot be saved, so saving would also fail after the training.
    """
    try:
        with scratch_directory("save") as directory:
            if not is_quantised_model(base.model):
                file_state(base.model)  # raises an error for shared tensors that cannot be saved
            # Each library checks its values again when it saves them.
            base.config.save_pretrained(directory)
            base.tokenizer.save_pretrained(directory)
            _write_generation_config(base, directory / GENERATION_CONFIG)
            return directory_bytes(directory)
    except Exception as error:  # of any type: it would end the run after the training
        reason = reason_of(error)
        if isinstance(error, OSError) or is_disk_full(error):
            raise InputError(
                f"The temporary folder cannot be written: {reason}. Make room there, or name "
                "another folder: TMPDIR=FOLDER molf train ..."
            ) from error
        raise InputError(f"model {name} could not be saved after a training: {reason}") from error


def save_adapter(
    save: Callable[[Any, Path], None], model: Any, settings: ResolvedSettings, path: Path
) -> None:
    """Write a trained adapter atomically, in the type that it was trained in.

    Args:
        save: Writes the adapter of a model into a directory.
        model: The model with the adapter.
        settings: The run's settings, for the card.
        path: The adapter's directory.

    Raises:
        SaveError: The disk is full or cannot be written; the message names the adapter's place.
    """
    size = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)

    def write(directory: Path) -> None:
        save(model, directory)
        card = adapter_card(settings, quantisation_of(model.config))
        write_text(directory / "README.md", card)

    def write_elsewhere(directory: Path) -> None:
        (directory / ADAPTER).mkdir()
        write(directory / ADAPTER)
        # No tensors to compare: PEFT renames them. All files are read back.
        check_written(directory / ADAPTER, {})

    with saving(
        path, size, lambda: Fallback.of(settings, path.parent).adapter(write_elsewhere, size)
    ) as directory:
        write(directory)


def _why_not_saved(path: Path, size: int, error: Exception) -> str:
    if not is_disk_full(error):
        reason = reason_of(error).rstrip(".")
        return f"the {path.name} could not be saved to {path}: {reason}"
    free = free_bytes(path)
    if free is None or free >= size:  # a quota, or other files were deleted meanwhile
        return (
            f"the disk is full: the {path.name} ({decimal_size(size)}) could not be saved to {path}"
            f"{'' if free is None else f', though {decimal_size(free)} are free now'}"
        )
    return (
        f"the disk is full: saving the {path.name} to {path} needs about {decimal_size(size)}, "
        f"{decimal_size(free)} are free"
    )
