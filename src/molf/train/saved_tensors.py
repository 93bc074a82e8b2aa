"""The numbers of a trained model as they are stored: each tensor in its type, rounded, measured.

Tensors are taken out of the model one by one, so that there is no second copy of it.
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

from molf.core.rounding import round_stochastic, round_stochastic_float16
from molf.train.low_halves import LowHalves, Rounding
from molf.train.model_loading import LoadedModel
from molf.train.saved_update import SavedUpdate
from molf.train.stored import StoredTensor, is_real

_CHUNK = 1 << 22  # numbers that are worked on at once


class UnfitError(ValueError):
    """A trained number cannot be stored."""


@dataclass(frozen=True)
class Storing:
    """How numbers are stored.

    Attributes:
        dtype: Type of the tensors that the checkpoint has in its main type; None for that type.
        rounding: How, where a type holds less than float32.
        keep_low_halves: Keep what bfloat16 cannot hold. Ties are then rounded away from zero.
    """

    dtype: torch.dtype | None = None
    rounding: Rounding = field(default_factory=Rounding)
    keep_low_halves: bool = False


@dataclass
class Stored:
    """What is stored.

    Attributes:
        tensors: The tensors by their names in the checkpoint's files.
        low_halves: int16, by the same names; tensors that lost nothing are left out.
        update: How much of the training they hold; None where that was not asked for.
        unfit: What is wrong where a tensor does not fit its type and so is float32; else None.
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
    """Take the numbers out of a model, which is used up, as they are to be stored.

    Args:
        model: The plain model. Its parameters hold nothing afterwards.
        base: What it was loaded as, with the files: each tensor keeps its type there.
        storing: How they are stored.
        start_dtype: The type that the checkpoint was loaded in before it was trained, to measure
            the update; None to measure nothing. Numbers that training left alone are then stored as
            the checkpoint has them.
        low_halves: What the model's bfloat16 numbers lack of float32 ones.

    Raises:
        UnfitError: A trained number is not finite. (One that is, but does not fit its type, is
            told of by what is returned.)
    """
    state = file_state(model)
    types = Types.of(model, base, storing.dtype)
    _empty(model, types.target)
    made = Stored(update=None if start_dtype is None else SavedUpdate())
    for name in list(state):
        trained = state.pop(name)
        found = counterpart(base, model, name, trained)
        stored = base.stored.tensors[found] if found is not None else None
        dtype = types.of_tensor(name, trained.dtype, stored)
        if not trained.is_floating_point():
            made.tensors[name] = trained.to(dtype)
            continue

        def read(found: str | None = found) -> Tensor | None:
            return None if found is None else base.stored.read(found)

        start = None
        if start_dtype is not None and stored is not None and is_real(stored.dtype or torch.int8):
            start = read()
        has_half = low_halves is not None and name in low_halves.tensors
        halves = low_halves if has_half else None
        _store(made, name, trained, dtype, storing, start, start_dtype, halves)
        try:
            _check_finite(name, made.tensors[name], read)
        except UnfitError as error:
            if dtype == torch.float32 or not bool(trained.isfinite().all()):
                raise
            made.unfit = made.unfit or str(error)
            made.tensors[name] = trained.detach().to(torch.float32)
    return made


def counterpart(base: LoadedModel, model: Any, name: str, tensor: Tensor) -> str | None:
    """The name in the base's files of the tensor that a tensor of the model was loaded from."""
    found = base.stored.find(name, getattr(model, "base_model_prefix", ""))
    same = found is not None and base.stored.tensors[found].shape == tuple(tensor.shape)
    return found if same else None


def is_quantised_model(model: Any) -> bool:
    """Whether a model was loaded with quantised weights, which are not saved as they are."""
    return getattr(model, "hf_quantizer", None) is not None


def file_state(model: Any) -> dict[str, Tensor]:
    """Return a model's tensors by their names in a checkpoint's files, tied ones once.

    They share the model's memory, but for those that the files have in another form.

    Raises:
        RuntimeError: Tensors share memory in a way that no checkpoint can express.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    return dict(revert_weight_conversion(model, state))


@dataclass(frozen=True)
class Types:
    """Which type each tensor of a checkpoint is stored in: the one that it has there.

    Attributes:
        main: The type that most of the checkpoint is in.
        target: What takes its place: the type that was asked for, or that the configuration
            declares where that is a wider one.
        asked: Whether it was asked for. Tensors of another type than `main` are never narrowed by
            that, and widened if it is wider.
        keeps_float32: Whether the model's code keeps a tensor in float32 whatever it is loaded in.
    """

    main: torch.dtype
    target: torch.dtype
    asked: bool
    keeps_float32: Callable[[str], bool]

    @classmethod
    def of(cls, model: Any, base: LoadedModel, asked: torch.dtype | None) -> Types:
        """The types for a model that was loaded as `base`."""
        main = base.stored.main_dtype or base.dtype
        target = asked or default_dtype(base)
        return cls(main, target, asked is not None, float32_names(model))

    def of_tensor(self, name: str, dtype: torch.dtype, stored: StoredTensor | None) -> torch.dtype:
        """Return a tensor's type.

        Args:
            name: Its name in the files.
            dtype: Its type in the model.
            stored: The tensor in the checkpoint; None if there is none of this name and shape.
        """
        known = None if stored is None else stored.dtype
        if not dtype.is_floating_point:
            return dtype if known is None or known.is_floating_point else known
        if known is None or not is_real(known):
            known = self.main
        if known != self.main:
            wider = self.asked and self.target.itemsize > known.itemsize
            return self.target if wider else known
        if known == torch.float32 and self.target.itemsize < 4 and self.keeps_float32(name):
            return known
        return self.target


def default_dtype(base: LoadedModel) -> torch.dtype:
    """The type that a model is saved in where none is asked for.

    It is that of the base's files, or the one that its configuration declares where that is wider.
    """
    main = base.stored.main_dtype
    return base.dtype if main is None or lossless(main, base.dtype) else main


def float32_names(model: Any) -> Callable[[str], bool]:
    """Whether the code of a model keeps a tensor of this name in float32."""
    names = {
        name
        for module in model.modules()
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(module, attribute, None) or ()
    }
    patterns = [re.compile(rf"(^|\.){re.escape(name)}(\.|$)") for name in sorted(names)]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _empty(model: Any, dtype: torch.dtype) -> None:
    """Let go of a model's numbers; shapes stay, and the type is what transformers will write."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
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
    """Store one tensor, part by part."""
    flat = trained.detach().reshape(-1)
    if (
        lossless(trained.dtype, dtype) and low_halves is None and start is None
    ):  # nothing is lost, and nothing is compared
        made.tensors[name] = trained.detach().to(dtype)
        return
    saved = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    keeps = storing.keep_low_halves and dtype == torch.bfloat16
    halves = torch.empty(flat.shape, dtype=torch.int16, device=flat.device) if keeps else None
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
            if not lossless(before.dtype, start_dtype) and lossless(before.dtype, dtype):
                rounded = torch.where(moved, rounded, before.to(dtype))
        saved[part] = rounded
    made.tensors[name] = saved.reshape(trained.shape)
    if halves is not None and bool(halves.any()):
        made.low_halves[name] = halves.reshape(trained.shape)


def lossless(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every number of one type is one of another."""
    return torch.promote_types(source, target) == target


def _rounded(values: Tensor, dtype: torch.dtype, name: str, storing: Storing, first: int) -> Tensor:
    """float32 numbers in another type."""
    if storing.rounding.kind == "stochastic":
        key = storing.rounding.key(name)
        if dtype == torch.bfloat16:
            return round_stochastic(values, key, first)
        if dtype == torch.float16:
            return round_stochastic_float16(values, key, first)
    return values.to(dtype)


def _check_finite(name: str, tensor: Tensor, read: Callable[[], Tensor | None]) -> None:
    """Refuse infinity and NaN, but for those that the checkpoint has in the same place.

    Raises:
        UnfitError: There are others.
    """
    bad = ~tensor.isfinite()
    if not bool(bad.any()):
        return
    stored = read()
    if stored is None or bool((bad & stored.to(bad.device).isfinite()).any()):
        raise UnfitError(f"{name} has numbers that are not finite, or do not fit {tensor.dtype}")
