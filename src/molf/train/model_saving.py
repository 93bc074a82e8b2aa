"""The trained model on disk: checkpoints of transformers and PEFT that need nothing of molf."""

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

from molf.core.quantised import quantisation_of
from molf.errors import InputError
from molf.train.elsewhere import check_written, keep_elsewhere, places
from molf.train.files import replacing_directory, scratch_directory, write_text
from molf.train.low_halves import LowHalves
from molf.train.model_card import adapter_card
from molf.train.model_loading import LoadedModel
from molf.train.ownership import ADAPTER, CHECKPOINTS, CONFIG, ENVIRONMENT, LOW_HALVES, MODEL
from molf.train.resolved import ResolvedSettings
from molf.train.result import RunError
from molf.train.room import directory_bytes, free_bytes, is_no_room, megabytes, require_room
from molf.train.saved_tensors import (
    Stored,
    Storing,
    UnfitError,
    file_state,
    is_quantised_model,
    take_tensors,
)
from molf.train.stored import GENERATION_CONFIG

_ADAPTER_CONFIG = "adapter_config.json"


class SaveError(RunError):
    """A checkpoint could not be written; nothing half-written bears its name."""


@dataclass(frozen=True)
class Keep:
    """Keeps trained weights elsewhere when their place does not take them.

    Attributes:
        run: The run's directory.
        base: The model that was trained, as the user calls it.
        chosen: Where the user wants them; None for the first place that has room.
    """

    run: Path
    base: str
    chosen: Path | None = None

    @classmethod
    def of(cls, settings: ResolvedSettings, run: Path) -> Keep:
        """For a run with these settings in this directory."""
        return cls(run, settings.model, settings.fallback_dir)

    def model(self, write: Callable[[Path], None], size: int) -> str:
        """Keep a whole model; return a sentence on where it is."""
        if (self.run / ADAPTER / _ADAPTER_CONFIG).is_file():  # exact, and smaller
            return f"The trained adapter is whole, and has all that was trained: {self._loads()}"
        kept = self._keep(write, size)
        if kept is None:
            return f"The trained model is lost: {self._no_place()}"
        return (
            f"The trained model is kept, and was read back, in {kept / MODEL}: load it from there "
            f"with transformers, or move it to {self.run / MODEL}."
        )

    def adapter(self, write: Callable[[Path], None], size: int) -> str:
        """Keep an adapter; return a sentence on where it is."""
        kept = self._keep(write, size)
        if kept is None:
            return f"The trained adapter is lost: {self._no_place()}"
        return f"The trained adapter is kept, and was read back: {self._loads(kept)}"

    def _loads(self, place: Path | None = None) -> str:
        path = (place or self.run) / ADAPTER
        return f"peft.PeftModel.from_pretrained(base, '{path}') puts it onto the base {self.base}."

    def _keep(self, write: Callable[[Path], None], size: int) -> Path | None:
        def write_all(directory: Path) -> None:
            write(directory)
            for name in (CONFIG, ENVIRONMENT):
                with suppress(OSError):
                    shutil.copy(self.run / name, directory)

        return keep_elsewhere(write_all, f"molf-{self.run.name}", size, self._given)

    @property
    def _given(self) -> tuple[Path, ...]:
        beside = self.run.parent  # of another error than a full disk it may be free
        return (beside,) if self.chosen is None else (self.chosen, beside)

    def _no_place(self) -> str:
        tried = ", ".join(map(str, places(self._given)))
        found = sorted(
            (self.run / CHECKPOINTS).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime
        )
        latest = f" The latest checkpoint is {found[-1]}." if found else ""
        return f"no other place took it ({tried}).{latest}"


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
    keep: Keep | None = None,
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
        keep: Where the weights go if they cannot be written; None to give them up.

    Returns:
        What was stored, without the tensors.

    Raises:
        SaveError: A weight does not fit its type, or the disk is full or cannot be written; the
            message says where the weights are. An earlier checkpoint is as it was.
    """
    try:
        stored = take_tensors(model, base, storing, start_dtype=start_dtype, low_halves=low_halves)
    except UnfitError as error:
        raise SaveError(str(error)) from error
    model.config = base.config
    tensors, stored.tensors = stored.tensors, {}
    halves = LowHalves(stored.low_halves, storing.rounding)
    size = sum(tensor.nbytes for tensor in (*tensors.values(), *stored.low_halves.values()))
    size += base.carried.nbytes

    def write(directory: Path, halves_path: Path | None) -> None:
        _write(model, base, tensors, directory)
        if card is not None:
            write_text(directory / "README.md", card)
        if halves_path is not None and halves.tensors:
            halves.write(halves_path)

    def write_kept(directory: Path) -> None:
        (directory / MODEL).mkdir()
        try:
            write(directory / MODEL, directory / LOW_HALVES)
        except Exception:  # such as a tokenizer that cannot be written: the weights alone
            alone = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(alone, directory / MODEL / SAFE_WEIGHTS_NAME, {"format": "pt"})
            for part in (base.config, base.tokenizer):
                with suppress(Exception):
                    part.save_pretrained(directory / MODEL)
        check_written(directory / MODEL, tensors)

    def kept() -> str:
        return "" if keep is None else keep.model(write_kept, size)

    with saving(path, size, kept) as directory:
        if stored.unfit is not None:
            raise UnfitError(stored.unfit)
        write(directory, halves_path)
        if finish is not None:
            finish(directory)
    return stored


@contextmanager
def saving(path: Path, size: int, keep: Callable[[], str] = str) -> Iterator[Path]:
    """Yield a directory that takes the place of `path` once the block has succeeded.

    Args:
        path: The checkpoint's directory.
        size: About how many bytes are written.
        keep: Called where that fails: keeps the weights elsewhere, and returns a sentence on it.

    Raises:
        SaveError: The disk is full or cannot be written, or the block failed in another way.
    """
    try:
        require_room(path, size)
        with replacing_directory(path) as directory:
            yield directory
    except Exception as error:  # whatever it is, the weights are worth more
        why = str(error) if isinstance(error, UnfitError) else _why_not_saved(path, size, error)
        kept = keep()
        raise SaveError(f"{why}. {kept}" if kept else why) from error


def _write(model: Any, base: LoadedModel, tensors: dict[str, Any], directory: Path) -> None:
    """Write a checkpoint whose tensors have the names of its files already."""
    with base_generation_config(model, base, directory), _everything_saved(model):
        model.save_pretrained(
            directory,
            state_dict={**base.carried.tensors(), **tensors},
            save_original_format=False,
        )
    base.tokenizer.save_pretrained(directory)


@contextmanager
def _everything_saved(model: Any) -> Iterator[None]:
    """Have a model save the tensors that it is given, those included that its class leaves out.

    Its own ones have been left out already, see `file_state`; what is carried may have such a name.
    """
    model._keys_to_ignore_on_save = None
    try:
        yield
    finally:
        del model._keys_to_ignore_on_save


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
    try:
        with scratch_directory("save") as directory:
            if not is_quantised_model(base.model):
                file_state(base.model)  # of shared tensors, some cannot be saved
            base.config.save_pretrained(directory)
            base.tokenizer.save_pretrained(directory)
            _write_generation_config(base, directory / GENERATION_CONFIG)
            return directory_bytes(directory)
    except Exception as error:  # whatever would end the run after the training
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, OSError) or is_no_room(error):
            raise InputError(
                f"The temporary folder cannot be written: {reason}. Make room there, or name "
                "another folder: TMPDIR=FOLDER molf train ..."
            ) from error
        raise InputError(f"model {name} could not be saved after a training: {reason}") from error


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
        SaveError: The disk is full or cannot be written; the message says where the adapter is.
    """
    size = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)

    def write(directory: Path) -> None:
        save(model, directory)
        card = adapter_card(settings, quantisation_of(model.config))
        write_text(directory / "README.md", card)

    def write_kept(directory: Path) -> None:
        (directory / ADAPTER).mkdir()
        write(directory / ADAPTER)
        check_written(directory / ADAPTER, {})

    with saving(
        path, size, lambda: Keep.of(settings, path.parent).adapter(write_kept, size)
    ) as directory:
        write(directory)


def _why_not_saved(path: Path, size: int, error: Exception) -> str:
    if not is_no_room(error):
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        return f"the {path.name} could not be saved to {path}: {reason}"
    free = free_bytes(path)
    if free is None or free >= size:  # a quota, or files that others have deleted since
        return (
            f"the disk is full: the {path.name} ({megabytes(size)}) could not be saved to {path}"
            f"{'' if free is None else f', though {megabytes(free)} are free now'}"
        )
    return (
        f"the disk is full: saving the {path.name} to {path} needs about {megabytes(size)}, "
        f"{megabytes(free)} are free"
    )
