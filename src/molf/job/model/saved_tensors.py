"""Convert the tensors of a trained model for saving: choose types, round, measure the loss.

Tensors are taken from the model one by one and freed, so that there is no second copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from molf.core.storage.rounding import round_stochastic, round_stochastic_float16
from molf.job.model.loading import LoadedModel
from molf.job.model.low_halves import LowHalves, Rounding
from molf.job.model.saved_update import SavedUpdate
from molf.job.model.stored import StoredTensor, is_real

_CHUNK = 1 << 22  # numbers converted at a time


class UnfitError(ValueError):
    """A trained number cannot be stored."""


@dataclass(frozen=True)
class Storing:
    """Type and rounding of saved numbers.

    Attributes:
        dtype: Type for tensors that the base stores in its main type; None for that type.
        rounding: Rounding to types of 16 bits.
        keep_low_halves: Keep the low halves of float32 numbers saved in bfloat16. Nearest
            rounding then rounds ties away from zero.
    """

    dtype: torch.dtype | None = None
    rounding: Rounding = field(default_factory=Rounding)
    keep_low_halves: bool = False


@dataclass
class Stored:
    """Converted tensors, ready to be saved.

    Attributes:
        tensors: The tensors by their names in the checkpoint's files.
        low_halves: int16, by the same names; tensors stored exactly are left out.
        update: The measured share of the update that they hold; None if not requested.
        unfit: A message if a tensor overflows its type and was left in float32; else None.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    low_halves: dict[str, Tensor] = field(default_factory=dict)
    update: SavedUpdate | None = None
    unfit: str | None = None


def take_tensors(
    model: Any,
    base: LoadedModel,
    storing: Storing,
    *,
    start_dtype: torch.dtype | None = None,
    low_halves: LowHalves | None = None,
) -> Stored:
    """Convert a model's tensors for saving, and free them in the model.

    Args:
        model: The plain model. Its parameters are empty afterwards.
        base: The base that it was trained from; each tensor is saved in its type there.
        storing: Type and rounding of the saved numbers.
        start_dtype: The type that the base was loaded in for training, to measure the update; None
            for no measurement. With it, numbers that training did not change are saved as the base
            stores them.
        low_halves: Low halves of the model's weights, if these are bfloat16 halves of float32.

    Raises:
        UnfitError: A trained number is not finite. A finite number that overflows its type is
            reported in `Stored.unfit`.
    """
    state = file_state(model)
    types = Types.of(model, base, storing.dtype)
    _empty(model, types.target)
    made = Stored(update=None if start_dtype is None else SavedUpdate())
    for name in list(state):
        trained = state.pop(name)
        stored = counterpart(base, model, name, trained)
        dtype = types.of_tensor(name, trained.dtype, stored)
        if not trained.is_floating_point():
            made.tensors[name] = trained.to(dtype)
            continue
        start = None
        if start_dtype is not None and stored is not None and is_real(stored.dtype):
            start = base.stored.read(stored.name)
        has_half = low_halves is not None and name in low_halves.tensors
        halves = low_halves if has_half else None
        _store(made, name, trained, dtype, storing, start, start_dtype, halves)
        try:
            _check_finite(name, made.tensors[name], base, stored)
        except UnfitError as error:
            if dtype == torch.float32 or not bool(trained.isfinite().all()):
                raise
            made.unfit = made.unfit or str(error)
            made.tensors[name] = trained.detach().to(torch.float32)
    return made


def counterpart(base: LoadedModel, model: Any, name: str, tensor: Tensor) -> StoredTensor | None:
    """Return the tensor of the base's files that has this name and shape; None without one."""
    file_name = base.stored.find(name, getattr(model, "base_model_prefix", ""))
    stored = None if file_name is None else base.stored.tensors[file_name]
    return stored if stored is not None and stored.shape == tuple(tensor.shape) else None


def is_quantised_model(model: Any) -> bool:
    """Return whether a model was loaded with quantised weights, which are not saved as such."""
    return getattr(model, "hf_quantizer", None) is not None


def file_state(model: Any) -> dict[str, Tensor]:
    """Return a model's tensors by their names in a checkpoint's files, tied ones once.

    They share the model's memory, except tensors that the files store in another form.

    Raises:
        RuntimeError: Tensors share memory in a way that a checkpoint cannot express.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    # safetensors rejects tensors that share memory.
    state = remove_tied_weights_from_state_dict(state, model)
    return dict(revert_weight_conversion(model, state))


@dataclass(frozen=True)
class Types:
    """The saved type of each tensor, by default its type in the base's files.

    Attributes:
        main: The type of most stored numbers.
        target: The type that replaces `main`: the requested one, or the configuration's if wider.
        is_requested: Whether it was requested. Then it also replaces other types that are narrower.
        keeps_float32: Whether the model's code keeps a tensor of this name in float32.
    """

    main: torch.dtype
    target: torch.dtype
    is_requested: bool
    keeps_float32: Callable[[str], bool]

    @classmethod
    def of(cls, model: Any, base: LoadedModel, requested: torch.dtype | None) -> Types:
        """Return the types for a model that was loaded as `base`."""
        main = base.stored.main_dtype or base.dtype
        target = requested or default_dtype(base)
        return cls(main, target, requested is not None, float32_names(model))

    def of_tensor(self, name: str, dtype: torch.dtype, stored: StoredTensor | None) -> torch.dtype:
        """Return a tensor's type.

        Args:
            name: Its name in the files.
            dtype: Its type in the model.
            stored: The tensor in the base's files; None if none has this name and shape.
        """
        known = None if stored is None else stored.dtype
        if not dtype.is_floating_point:
            return dtype if known is None or known.is_floating_point else known
        if known is None or not is_real(known):
            known = self.main
        if known != self.main:
            wider = self.is_requested and self.target.itemsize > known.itemsize
            return self.target if wider else known
        if known == torch.float32 and self.target.itemsize < 4 and self.keeps_float32(name):
            return known
        return self.target


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type as options have it, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def default_dtype(base: LoadedModel) -> torch.dtype:
    """Return the default type of a saved model.

    It is that of the base's files, or the type that its configuration declares if wider.
    """
    main = base.stored.main_dtype
    return base.dtype if main is None or lossless(main, base.dtype) else main


def float32_names(model: Any) -> Callable[[str], bool]:
    """Return a function of a tensor's name: whether the model's code keeps it in float32."""
    names = {
        name
        for module in model.modules()
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(module, attribute, None) or ()
    }
    patterns = [re.compile(rf"(^|\.){re.escape(name)}(\.|$)") for name in sorted(names)]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _empty(model: Any, dtype: torch.dtype) -> None:
    """Free a model's numbers; shapes stay, and the type is the one transformers records."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                # One element in memory, expanded: shape and type stay readable.
                parameter.data = torch.zeros((), dtype=dtype).expand(parameter.shape)


def _store(
    made: Stored,
    name: str,
    trained: Tensor,
    dtype: torch.dtype,
    storing: Storing,
    start: Tensor | None,
    start_dtype: torch.dtype | None,
    low_halves: LowHalves | None,
) -> None:
    """Convert one tensor in chunks, and measure its update."""
    flat = trained.detach().reshape(-1)
    # Nothing is rounded, joined or compared: convert at once.
    if lossless(trained.dtype, dtype) and low_halves is None and start is None:
        made.tensors[name] = trained.detach().to(dtype)
        return
    saved = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    keeps = storing.keep_low_halves and dtype == torch.bfloat16
    halves = torch.empty(flat.shape, dtype=torch.int16, device=flat.device) if keeps else None
    # In chunks: float32 copies of a whole embedding would take gigabytes.
    for begin in range(0, flat.numel(), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        values = flat[part]
        if low_halves is not None:
            low = low_halves.tensors[name].reshape(-1)[part].to(flat.device)
            high = values.to(torch.bfloat16)
            values = low_halves.rounding.join(high, low, name, begin)
        values = values.to(torch.float32)
        rounded = _rounded(values, dtype, name, storing, begin)
        if halves is not None:
            rounded, halves[part] = storing.rounding.split(values, name, begin)
        if start is not None and start_dtype is not None:
            before = start.reshape(-1)[part].to(flat.device)
            loaded = before.to(start_dtype).to(torch.float32)
            moved = (values != loaded) & (values != before.to(torch.float32))
            if made.update is not None:
                made.update.add(loaded, values, rounded, moved)
            # Loading has rounded the base: numbers that training left unchanged are saved exactly.
            if not lossless(before.dtype, start_dtype) and lossless(before.dtype, dtype):
                rounded = torch.where(moved, rounded, before.to(dtype))
        saved[part] = rounded
    made.tensors[name] = saved.reshape(trained.shape)
    if halves is not None and bool(halves.any()):
        made.low_halves[name] = halves.reshape(trained.shape)


def lossless(source: torch.dtype, target: torch.dtype) -> bool:
    """Return whether the target type holds every number of the source type."""
    return torch.promote_types(source, target) == target


def _rounded(values: Tensor, dtype: torch.dtype, name: str, storing: Storing, first: int) -> Tensor:
    """Return float32 numbers rounded to another type."""
    if storing.rounding.kind == "stochastic":
        key = storing.rounding.key(name)
        if dtype == torch.bfloat16:
            return round_stochastic(values, key, first)
        if dtype == torch.float16:
            return round_stochastic_float16(values, key, first)
    return values.to(dtype)


def _check_finite(
    name: str, tensor: Tensor, base: LoadedModel, stored: StoredTensor | None
) -> None:
    """Reject infinity and NaN, except those that the base stores in the same place.

    Raises:
        UnfitError: There are others.
    """
    bad = ~tensor.isfinite()
    if not bool(bad.any()):
        return
    # Models may store infinity on purpose, such as in an attention mask.
    if stored is None or bool(
        (bad & base.stored.read(stored.name).to(bad.device).isfinite()).any()
    ):
        raise UnfitError(f"{name} has numbers that are not finite, or do not fit {tensor.dtype}")
