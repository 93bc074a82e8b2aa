"""The model to start from: found, checked and loaded, without running anything it ships."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from molf.errors import InputError


@dataclass
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        model: The model, every weight in the type that it was asked for in.
        tokenizer: Its tokenizer.
        dtype: The type its weights are stored in.
        config: The configuration it came with; trainers change the model's own.
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
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        loaded = _from_pretrained(name, dtype)
        stored = config.dtype or _from_pretrained(name, "auto").dtype
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(model, error) from error
    return LoadedModel(
        model=loaded,
        tokenizer=tokenizer,
        dtype=stored,
        config=copy.deepcopy(loaded.config),
        generation_config=copy.deepcopy(loaded.generation_config),
    )


def _not_loaded(model: str, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0]
    return InputError(f"model {model} cannot be loaded: {reason}")


def _from_pretrained(name: str, dtype: torch.dtype | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
