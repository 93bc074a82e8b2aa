"""Find, check and load the base model, without running code that comes with it."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from molf.core.model.quantised import drop_from_config, quantisation_of
from molf.errors import InputError
from molf.job.model.carried import UnusedTensors
from molf.job.model.config import (
    check_generation_config,
    check_token_ids,
    not_loaded,
    place_of,
    read_config,
)
from molf.job.model.quantised import check_library, check_stored, prepare_stored
from molf.job.model.stored import StoredCheckpoint
from molf.job.model.tokenizer import load_tokenizer
from molf.job.model.whole import check_whole
from molf.planning.model_class import auto_class, make_skeleton


@dataclass
class LoadedModel:
    """A loaded model with its tokenizer, configurations and files.

    Attributes:
        model: The model, with all weights in the requested type.
        tokenizer: Its tokenizer.
        dtype: The stored type of its weights.
        config: A copy of its configuration, as trainers change the model's own. Without
            quantisation, because saved models are not quantised.
        generation_config: A copy of its generation configuration.
        stored: Its files.
        unused_tensors: Stored tensors that transformers does not load, to be saved with the model.
    """

    model: Any
    tokenizer: Any
    dtype: torch.dtype
    config: Any
    generation_config: Any
    stored: StoredCheckpoint
    unused_tensors: UnusedTensors = field(default_factory=lambda: UnusedTensors({}))

    def copy(self) -> LoadedModel:
        """Return a copy with its own weights and tokenizer, for a training in place."""
        return replace(
            self, model=copy.deepcopy(self.model), tokenizer=copy.deepcopy(self.tokenizer)
        )


def load_skeleton(model: str) -> Any:
    """Create the model on the meta device from its configuration, with names and shapes only.

    Raises:
        InputError: The configuration is missing, or not that of a model that generates text.
    """
    config = read_config(model)
    try:
        with torch.device("meta"):
            return make_skeleton(config)
    except InputError as error:
        raise not_loaded(model, error) from error


def load_model(
    model: str, dtype: torch.dtype = torch.float32, *, without_values: bool = False
) -> LoadedModel:
    """Load a complete model that generates text, and its tokenizer.

    The class is the one named by the checkpoint, so a multimodal model keeps all its towers. Only
    safetensors weights are read, and no code of the checkpoint is run.

    Args:
        model: A directory or a Hub id.
        dtype: The type to load the weights in.
        without_values: Leave the weights on the meta device; the files are checked alike.

    Raises:
        InputError: The model is missing or not supported, lacks weights, or has unknown ones.
    """
    name = place_of(model)
    config = read_config(model)
    try:
        kind = auto_class(config)
        stored_as = quantisation_of(config)
        if stored_as is not None:
            check_library(stored_as, model)
    except InputError as error:
        raise not_loaded(model, error) from error
    # The tokenizer first: it takes a second, and the weights of a large model take minutes.
    tokenizer = load_tokenizer(model)
    check_generation_config(model)
    stored = StoredCheckpoint(name, getattr(config, "transformers_weights", None))
    files = {tensor: part.file for tensor, part in stored.tensors.items()}
    if stored_as is not None:
        check_stored(stored_as, files, model)
    try:
        with _without_tables():
            loaded, loading_info = kind.from_pretrained(
                name,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,  # names of missing, unused and mismatched tensors
                ignore_mismatched_sizes=True,  # reported by name in check_whole
                **({"device_map": "meta"} if without_values else {}),
            )
    # Not wrong input: the model may fit another machine.
    except (torch.OutOfMemoryError, MemoryError):
        raise
    # Model classes raise errors of any type on unexpected values. For a padding token beyond the
    # embeddings, torch raises an AssertionError.
    except Exception as error:
        raise not_loaded(model, error) from error
    unused = check_whole(model, loaded, files, loading_info)
    check_token_ids(model, loaded.generation_config)
    _check_vocabulary(model, loaded, tokenizer)
    own_config = copy.deepcopy(loaded.config)
    for part in own_config.sub_configs:  # loading has set the loaded type in them
        if (inner := getattr(own_config, part, None)) is not None:
            inner.dtype = getattr(getattr(config, part, None), "dtype", None)
    if stored_as is not None:
        prepare_stored(loaded, dtype)
        drop_from_config(own_config)
    return LoadedModel(
        model=loaded,
        tokenizer=tokenizer,
        dtype=config.dtype or stored.main_dtype or loaded.dtype,
        config=own_config,
        generation_config=copy.deepcopy(loaded.generation_config),
        unused_tensors=UnusedTensors(unused),
        stored=stored,
    )


def move(model: Any, device: torch.device) -> None:
    """Move a model to a device."""
    # Quantised models are loaded on their device, and some cannot be moved.
    if model.device.type != device.type:
        model.to(device)


def _check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Reject a tokenizer with tokens that the model has no embeddings for."""
    # An id beyond the embeddings fails in the first batch, on CUDA without its name.
    rows = model.get_input_embeddings().weight.shape[0]
    # Some models have no embeddings for tokens that were added to their tokenizer but never used.
    # A padding token without embedding is replaced by EOS, as padding is looked up, then masked.
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


@contextmanager
def _without_tables() -> Iterator[None]:
    """Suppress transformers' tables of tensor names; molf raises its own errors for them.

    Raises:
        ValueError: Instead of an error that only refers to such a table.
    """
    tables: list[str] = []

    def is_no_table(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return True
        tables.append(text)
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_no_table)
    try:
        yield
    except RuntimeError as error:
        name = re.search(r"on tensors destined for (\S+?)\.?\s", "".join(tables))
        if name is None:
            raise
        raise ValueError(f"the shapes of the tensors stored for {name[1]} differ") from error
    finally:
        logger.removeFilter(is_no_table)
