"""What can be said about the base model without importing torch or downloading anything."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from molf.errors import InputError
from molf.inputs import DIRECTORY, special_kind
from molf.paths import check_path, check_unicode, expanded
from molf.train.run_around import why_no_model
from molf.train.settings import TrainSettings


def check_model(model: str) -> None:
    """Check that a model is there: a directory with a configuration, or a repository of the Hub.

    Raises:
        InputError: It is not; the message says what was looked for.
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
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise InputError(
            f"model {model} does not exist, and does not have the form of a Hub id (owner/name)."
        )
    else:
        _check_hub(model)


def check_entries(folder: Path, what: str) -> None:
    """Refuse a pipe or a device among a checkpoint's files: transformers would wait for it.

    Args:
        folder: The checkpoint.
        what: How a message names it: "model" or "adapter".

    Raises:
        InputError: There is one.
    """
    for entry in sorted(folder.iterdir()):
        kind = special_kind(entry)
        if kind not in (None, DIRECTORY):
            raise InputError(f"{what} {folder}: {entry.name} is {kind}, and no ordinary file.")


def check_quantisation(settings: TrainSettings) -> None:
    """Make sure that the library that quantises is installed, if the settings need it.

    Raises:
        InputError: It is not; the message names the extra.
    """
    if settings.quantised is not None and find_spec("bitsandbytes") is None:
        raise InputError(
            f"{settings.quantised} needs bitsandbytes, which is not installed: "
            "pip install 'molf[bitsandbytes]'."
        )


def _check_hub(model: str) -> None:
    """Ask for the configuration once; transformers would ask again and again for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    url = hf_hub_url(model, "config.json")
    try:
        get_hf_file_metadata(url)
    except Exception as error:  # of whichever HTTP library this version of the Hub client uses
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(
            f"model {model} is no local directory, and {url} cannot be reached: {reason}. Give the "
            "path of a local checkpoint with --model."
        ) from error
