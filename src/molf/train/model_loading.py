"""The model to start from: found, checked and loaded, without running anything it ships."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from molf.core.quantised import drop_from_config, quantisation_of
from molf.errors import InputError
from molf.train.quantised_base import check_library, prepare_stored


@dataclass
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        model: The model, every weight in the type that it was asked for in.
        tokenizer: Its tokenizer.
        dtype: The type its weights are stored in.
        config: The configuration it came with; trainers change the model's own. A quantisation is
            left out, because what is saved has real weights.
        generation_config: The generation configuration it came with.
    """

    model: Any
    tokenizer: Any
    dtype: torch.dtype
    config: Any
    generation_config: Any


def load_skeleton(model: str) -> Any:
    """Make the model on the meta device, from its configuration alone: names and shapes.

    Raises:
        InputError: The configuration is not there, or not that of a causal language model.
    """
    path = Path(model).expanduser()
    name = str(path) if path.is_dir() else model
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(model, error) from error


def load_model(model: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Only safetensors weights are read and no code that came with the model is run.

    Args:
        model: A directory or a Hub id.
        dtype: The type that its weights get.

    Raises:
        InputError: The model is not there, or is none that can be trained here.
    """
    path = Path(model).expanduser()
    name = str(path) if path.is_dir() else model
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        stored_as = quantisation_of(config)
        if stored_as is not None:
            check_library(stored_as, model)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        loaded = _from_pretrained(name, dtype)
        stored = config.dtype or _from_pretrained(name, "auto").dtype
    # An assertion is how torch refuses a padding token beyond the embeddings.
    except (
        OSError,
        ValueError,
        ImportError,
        RuntimeError,
        AssertionError,
        SafetensorError,
    ) as error:
        raise _not_loaded(model, error) from error
    _check_vocabulary(model, loaded, tokenizer)
    saved = copy.deepcopy(loaded.config)
    if stored_as is not None:
        prepare_stored(loaded, dtype)
        drop_from_config(saved)
    return LoadedModel(
        model=loaded,
        tokenizer=tokenizer,
        dtype=stored,
        config=saved,
        generation_config=copy.deepcopy(loaded.generation_config),
    )


def move(model: Any, device: torch.device) -> None:
    """Bring a model to a device, unless it is there: quantised ones are loaded where they stay."""
    if model.device.type != device.type:
        model.to(device)


def _check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose tokens the model has no embeddings for.

    Some models have fewer embeddings than their tokenizer has added tokens, which do not occur. A
    padding token among these would, though it is always masked: EOS takes its place.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    added = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    needed = {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    ids = [index for index in tokenizer.get_vocab().values() if index not in added]
    highest = max([*ids, *needed], default=0)
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise InputError(
            f"model {name}: its tokenizer has the token {token!r} (id {highest}), and the model "
            f"has {rows} embeddings. The two do not belong together."
        )
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= rows:
        warnings.warn(
            f"model {name}: the padding token {tokenizer.pad_token!r} (id {pad}) is beyond the "
            f"model's {rows} embeddings; {tokenizer.eos_token!r} takes its place.",
            stacklevel=3,
        )
        tokenizer.pad_token = tokenizer.eos_token


def _not_loaded(model: str, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0]
    return InputError(f"model {model} cannot be loaded: {reason}")


def _from_pretrained(name: str, dtype: torch.dtype | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
