"""Check that a loaded model has all tensors of its checkpoint, and no others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from molf.errors import InputError
from molf.shown import listed

# Buffers that transformers computes now, but stored in files of earlier versions.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
_SHOWN = 3


def check_whole(
    name: str, model: Any, stored: Mapping[str, Path], loading_info: Mapping[str, Any]
) -> dict[str, Path]:
    """Compare the tensors of a checkpoint with those of the model loaded from it.

    Args:
        name: The checkpoint, for messages.
        model: The model.
        stored: The file of each stored tensor, by its name.
        loading_info: The `output_loading_info` of `from_pretrained`.

    Returns:
        The files of unused tensors to copy into the saved model: heads that predict further tokens,
        and tensors that transformers is known to ignore.

    Raises:
        InputError: A weight of the model is not stored or has another shape, or a stored tensor is
            unused for an unknown reason.

    Warns:
        UserWarning: A buffer of the model is not stored, so it has its initial value.
    """
    _check_shapes(name, loading_info["mismatched_keys"])
    buffers = {buffer for buffer, _ in model.named_buffers()}
    absent = sorted(loading_info["missing_keys"])
    weights = [key for key in absent if key not in buffers]
    kind = type(model).__name__
    if weights:
        raise InputError(
            f"model {name}: its files lack weights of {kind}, as config.json describes it, which "
            f"would be random: {listed(weights, _SHOWN)}. Give files and a config.json that belong "
            "together."
        )
    if absent:
        warnings.warn(
            f"model {name}: its files lack buffers of {kind}, which have their initial values: "
            f"{listed(absent, _SHOWN)}.",
            stacklevel=3,
        )
    unused = _unused(model, stored)
    known = [*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]
    ignored, unknown = {}, []
    for tensor, renamed in unused.items():
        matches = (re.search(pattern, text) for pattern in known for text in (tensor, renamed))
        if any(matches) or _predicts_further(tensor, model.config):
            ignored[tensor] = stored[tensor]
        else:
            unknown.append(tensor)
    if unknown:
        raise InputError(
            f"model {name}: its files have tensors without a place in {kind}, as config.json "
            f"describes it, which would be lost: {listed(unknown, _SHOWN)}. Give the config.json "
            "that belongs to these files, or files without these tensors."
        )
    return ignored


def _check_shapes(name: str, mismatched: Collection[tuple[str, Any, Any]]) -> None:
    if not mismatched:
        return
    key, stored, wanted = min(mismatched, key=lambda item: item[0])
    more = f", and {len(mismatched) - 1} more differ" if len(mismatched) > 1 else ""
    raise InputError(
        f"model {name}: {key} is {list(stored)} in its files and {list(wanted)} by config.json"
        f"{more}. Give the files and the config.json that belong together."
    )


def _unused(model: Any, stored: Mapping[str, Path]) -> dict[str, str]:
    """Return the stored tensors that loading did not use, with their renamed form."""
    expected = model.state_dict()
    conversions = get_model_conversion_mapping(model, None, getattr(model, "hf_quantizer", None))
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

    def place_of(tensor: str) -> str:
        # The same two attempts as in `from_pretrained`.
        prefix = model.base_model_prefix
        place, _ = rename_source_key(tensor, renamings, converters, prefix, expected)
        if place not in expected and tensor in expected:
            place, _ = rename_source_key(tensor, [], [], prefix, expected)
        return str(place)

    places = {tensor: place_of(tensor) for tensor in stored}
    return {tensor: place for tensor, place in places.items() if place not in expected}


def _predicts_further(tensor: str, config: Any) -> bool:
    """Return whether a tensor belongs to a head that predicts further tokens, for serving only."""
    parts = tensor.split(".")
    if any(part.startswith("mtp") for part in parts):
        return True
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    further = getattr(text, "num_nextn_predict_layers", None)
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", tensor)
    if found is None or not isinstance(layers, int) or not isinstance(further, int):
        return False
    return layers <= int(found[1]) < layers + further
