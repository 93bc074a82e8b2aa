"""Check the path or Hub id of the base model, without torch and without downloading weights."""

from __future__ import annotations

import re
from pathlib import Path

from molf.errors import InputError, reason_of
from molf.inputs import DIRECTORY, check_installed, special_kind
from molf.job.record.ownership import is_run
from molf.job.record.run_around import model_of, why_no_model
from molf.job.settings.settings import TrainSettings
from molf.paths import check_path, check_unicode, expanded


def check_model(model: str) -> None:
    """Check that a model exists: a directory with a configuration, or a repository of the Hub.

    Raises:
        InputError: It does not exist, or is not a model.
    """
    path = expanded(model)
    check_path(path, "model")
    check_unicode(path, "model")
    if path.is_dir():
        if (reason := why_no_model(path)) is not None:
            raise InputError(f"model {model} {reason}")
        check_entries(path, "model")
    elif path.exists():
        raise InputError(f"model {model} is a file. Give the directory of a checkpoint.")
    elif (run := _run_in(path)) is not None:  # no Hub id, though it may look like one
        raise InputError(f"model {model} does not exist in the run {run}. {model_of(run)}")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise InputError(
            f"model {model} does not exist, and does not have the form of a Hub id (owner/name)."
        )
    else:
        _check_hub(model)


def _run_in(path: Path) -> Path | None:
    """Return the run among the parents in a path, or None."""
    # The working directory does not count: there, `owner/name` is still a Hub id.
    return next((place for place in path.parents if place != Path() and is_run(place)), None)


def check_entries(folder: Path, what: str) -> None:
    """Reject a pipe or a device among a checkpoint's files; reading it would wait for ever.

    Args:
        folder: The checkpoint.
        what: Its name in the message: "model" or "adapter".

    Raises:
        InputError: There is one.
    """
    for entry in sorted(folder.iterdir()):
        kind = special_kind(entry)
        if kind not in (None, DIRECTORY):
            raise InputError(f"{what} {folder}: {entry.name} is {kind}, and no ordinary file.")


def check_quantisation(settings: TrainSettings) -> None:
    """Check that bitsandbytes is installed, if the settings need it.

    Raises:
        InputError: It is not installed; the message names the extra.
    """
    if settings.quantised is not None:
        check_installed("bitsandbytes", settings.quantised)


def _check_hub(model: str) -> None:
    """Check that the Hub has the model's configuration."""
    # One request: transformers would retry for half a minute.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    url = hf_hub_url(model, "config.json")
    try:
        get_hf_file_metadata(url)
    except Exception as error:  # the type depends on the HTTP library of the Hub client
        raise InputError(
            f"model {model} is no local directory, and {url} cannot be reached: "
            f"{reason_of(error).rstrip('.')}. Give the path of a local checkpoint: --model, "
            "or `model` in a recipe or a study."
        ) from error
