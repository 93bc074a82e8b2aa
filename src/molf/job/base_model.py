"""Find and read the base of a fine-tuned model, before the latter is loaded."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from molf.errors import InputError
from molf.job.model.path import check_model
from molf.job.record.finished_run import run_of
from molf.measure import EvaluationSettings, Progress
from molf.tasks import Task

if TYPE_CHECKING:
    import torch

    from molf.job.model.loading import LoadedModel
    from molf.measure.divergence import BaseLogits, Logits

T = TypeVar("T")


class NoBaseError(Exception):
    """The base of a model is not known or not usable; the argument is the reason."""


def find_base(model: str, given: str | None) -> str:
    """Return the base of a model: the given one, or that of the run that trained the model.

    Raises:
        InputError: The given base does not exist, or is not a model.
        NoBaseError: None is given, and no run recorded one, or it does not exist any more.
    """
    if given is not None:
        try:
            check_model(given)
        except InputError as error:
            raise InputError(f"Invalid base={given}: {error}") from error
        return given
    run = run_of(model)
    if run is None or run.base is None:
        raise NoBaseError(f"no run recorded the base of {model}; give it with --base")
    try:
        check_model(run.base)
    except InputError as error:
        raise NoBaseError(f"the base of {run.path} cannot be read: {error}") from error
    if run.base_has_changed:
        raise NoBaseError(f"the base {run.base} has changed since {run.path} was trained from it")
    return run.base


def read_base_model(
    base: str,
    model: str,
    measured: Mapping[str, tuple[Task, str]],
    settings: EvaluationSettings,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, BaseLogits]:
    """Load a base model, compute its logits on each task, and free it.

    Args:
        base: A directory or a Hub id.
        model: The tuned model, whose tokenizer is used.
        measured: Tasks with their neutral texts, by name.
        settings: Batch size and length limit.
        device: The device to compute on.
        progress: Called after each batch.

    Returns:
        The logits by the names of `measured`.

    Raises:
        InputError: The base cannot be loaded, its tokenizer has other tokens, or its tokens attend
            to later ones.
    """
    from molf.job.model.loading import load_model, move
    from molf.job.model.tokenizer import load_tokenizer
    from molf.measure.causality import check_causal
    from molf.measure.divergence import read_base
    from molf.measure.generate import padding_id
    from molf.measure.tokens import other_token

    tokenizer = load_tokenizer(model)

    def read(loaded: LoadedModel) -> dict[str, BaseLogits]:
        if (difference := other_token(loaded.tokenizer, tokenizer)) is not None:
            raise InputError(
                f"Invalid base={base}: its tokenizer is not that of {model} ({difference}), so "
                "their predictions cannot be compared."
            )
        move(loaded.model, device)
        check_causal(base, loaded.model, padding_id(tokenizer))
        found: dict[str, BaseLogits] = {}
        neutral: dict[str, Logits] = {}  # by text, as tasks may share one
        for name, (task, text) in measured.items():
            found[name] = read_base(
                loaded.model, tokenizer, task, text, settings, progress, neutral=neutral.get(text)
            )
            neutral[text] = found[name].neutral
        return found

    return read_and_free(lambda: load_model(base), read)


def read_and_free(load: Callable[[], LoadedModel], read: Callable[[LoadedModel], T]) -> T:
    """Load a base model again, compute a result with it, and free it.

    Args:
        load: Loads the model.
        read: Returns the result, which holds no part of the model.
    """
    with warnings.catch_warnings():
        # Given for the tuned model, or when the base was loaded first: on padding, on batches.
        warnings.simplefilter("ignore")
        loaded = load()
        model = weakref.ref(loaded.model)
        result = read(loaded)
    del loaded
    if model() is not None:  # some models hold references to themselves; a collection takes 0.1 s
        gc.collect()
    return result
