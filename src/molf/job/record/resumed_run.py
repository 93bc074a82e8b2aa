"""The options of a run that is resumed, and their comparison with those given now.

Importing this file imports no torch, so that a difference is reported at once.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molf.errors import InputError
from molf.job.record.contents import ASSIGNED, hash_of_assignment
from molf.job.record.finished_run import read_run
from molf.job.record.ownership import ASSIGNMENT, CHECKPOINTS, CONFIG, EVALUATION
from molf.job.record.provenance import contents
from molf.job.settings.resolved import ResolvedSettings
from molf.job.settings.sharding import fitting
from molf.masking import mask
from molf.ranks import launched_count
from molf.shown import listed, option_text

ASKED = "asked"
"""Key in the record of a run: options as given, where the opened model changed their value."""

UNMASKED = "give_again"
"""Key in the record of a run: options whose value is stored without a secret."""

PROCESSES = "processes"
"""Key in the record of a run: the number of processes, if several."""

STAGES = "stages.json"
"""File in `checkpoints/` with the completed stages of a run that has not ended."""

# They change neither the data nor the mathematics of a training.
_FREE = frozenset(
    {
        "output_dir",
        "overwrite",
        "resume",
        "dry_run",
        "fallback_dir",
        "dataset_num_proc",
        "max_time",
        "save_steps",
        "save_minutes",
        "save_total_limit",
        "async_save",
        "on_save_error",
        "logging_steps",
        "report_to",
        # How the devices compute the same.
        "fsdp",
        "fsdp_cpu_offload",
        "kernels",
        "state_offload",
        "gradient_checkpointing",
        "attn_implementation",
    }
)
_FREE_ARGUMENTS = (
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_p", "logging_"),
    *("torch_compile", "use_liger_kernel", "liger_kernel_config", "activation_offloading"),
)
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_MOST_SHOWN = 4


def is_started(path: Path) -> bool:
    """Return whether a directory holds the record of a run, finished or not."""
    return os.path.lexists(path / CONFIG)


def is_finished(path: Path) -> bool:
    """Return whether a run is complete: evaluated, with all stages behind it."""
    return (path / EVALUATION).is_file() and not (path / CHECKPOINTS / STAGES).exists()


def stored_options(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the options of a run as it was started with them.

    Returns:
        The options by name, with all defaults, and the names of those that are stored without a
        secret, such as the query of a signed address.

    Raises:
        InputError: The directory is no run, or its record cannot be read.
    """
    config = dict(read_run(path).config)
    run = config.pop("run")
    config |= run.get(ASKED) or {}
    return config, tuple(run.get(UNMASKED) or ())


def stored_processes(path: Path) -> int:
    """Return the number of processes of a run."""
    return int(read_run(path).config["run"].get(PROCESSES, 1))


def split_again(
    options: dict[str, Any], before: int, now: int, *, keeps_size: bool = False
) -> None:
    """Change the split of a run's steps, and its shards, for another number of processes, in place.

    An optimizer step keeps its examples. The forward passes change, and their size only if the
    passes do not divide by the processes. If the examples do not either, no split is changed.

    Args:
        options: Those of the run.
        before: Number of processes of the run.
        now: Number of processes.
        keeps_size: Do not change the size, because it is given.
    """
    size, passes = (int(options[name]) for name in _BATCH)
    share, rest = divmod(size * passes * before, now)
    if passes * before % now and not keeps_size:
        size = max(one for one in range(1, size + 1) if share % one == 0)
    if not rest and share % size == 0:
        options |= dict(zip(_BATCH, (size, share // size), strict=True))
    options["fsdp"] = fitting(options.get("fsdp"), now)
    if options["fsdp"] is None:
        options["fsdp_cpu_offload"] = False


def masked_options(options: Mapping[str, Any]) -> list[str]:
    """Return the names of the options that a record stores without their secrets."""
    return [name for name, value in options.items() if mask(value) != value]


def check_same_options(settings: ResolvedSettings) -> None:
    """Compare the options of a resumed run with those that it was started with.

    Raises:
        InputError: An option that changes the training differs; the message has both values.
    """
    stored, _ = stored_options(settings.output_dir)
    given = mask(settings.as_options())
    free = {*_FREE, *_BATCH, "training_args"}
    if stored.get("token_cache") is not None:
        # The run has the hash of all tokens, which are the same from any folder. A run without a
        # folder may have the hash of some, which a run with one does not compute.
        free.add("token_cache")
    names = [name for name in given if name not in free]
    differing = [
        (name, stored[name], given[name])
        for name in names
        if name in stored and not _equal(stored[name], given[name])
    ]
    before, now = stored_processes(settings.output_dir), launched_count()
    if _global_batch(stored) * before != _global_batch(given) * now:
        differing += [(name, stored[name], given[name]) for name in _BATCH]
        if before != now:
            differing.append((PROCESSES, before, now))
    arguments = stored.get("training_args") or {}, given["training_args"]
    for name in sorted(set().union(*arguments)):
        values = [one.get(name) for one in arguments]
        if not name.startswith(_FREE_ARGUMENTS) and str(values[0]) != str(values[1]):
            differing.append((f"training_args.{name}", values[0], values[1]))
    if differing:
        raise InputError(_difference(settings.output_dir, differing))


def check_same_contents(settings: ResolvedSettings, files: Mapping[str, Any]) -> None:
    """Compare data files, a base directory and an assignment with those at the start of a run.

    Args:
        settings: The options of the resumed run.
        files: Records of the data files by option, as they are now.

    Raises:
        InputError: They have changed.
    """
    if not is_started(settings.output_dir):
        return
    run = read_run(settings.output_dir)
    before = (run.config["run"].get("data") or {}).get("files") or {}
    changed = [name for name in before if contents(before[name]) != contents(files.get(name, ()))]
    assigned = (run.config["run"].get("model") or {}).get(ASSIGNED)
    found = settings.reached_assignment
    if assigned is not None and found is not None and hash_of_assignment(found) != assigned:
        changed.append(f"its {ASSIGNMENT}")
    if changed := changed + ["model"] * run.base_has_changed:
        raise InputError(
            f"The run {settings.output_dir} cannot be resumed: the content of "
            f"{' and '.join(changed)} has changed since it was started. Restore it, or give "
            "another --output_dir."
        )


def command_to_resume(path: Path) -> str:
    """Return a sentence with the command that continues a run."""
    try:
        _, masked = stored_options(path)
    except InputError:  # its record is not written, or was deleted
        masked = ()
    again = "".join(f" --{name} ADDRESS" for name in masked)
    return f"Continue with: molf train --output_dir {shlex.quote(str(path))} --resume{again}"


def _difference(path: Path, differing: list[tuple[str, Any, Any]]) -> str:
    changes = [
        f"{name}={option_text(now)} (the run has {option_text(before)})"
        for name, before, now in differing
    ]
    return (
        f"Invalid resume of {path} with {listed(changes, _MOST_SHOWN)}: this would be another "
        f"training. Leave {'it' if len(differing) == 1 else 'them'} out, or give another "
        "--output_dir."
    )


def _equal(one: Any, other: Any) -> bool:
    # YAML reads 1.0 as a float and 1 as an integer.
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _global_batch(options: Mapping[str, Any]) -> int:
    """Return the examples that each process takes in an optimizer step."""
    size = 1
    for name in _BATCH:
        size *= int(options[name])
    return size
