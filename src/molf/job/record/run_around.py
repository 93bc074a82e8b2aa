"""Suggest the right path for one that is near a run: inside it, beside it, or above it."""

from __future__ import annotations

from pathlib import Path

from molf.job.record.ownership import ADAPTER, CHECKPOINTS, MODEL, is_run, read_json
from molf.shown import listed

MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

_DEEPEST = 4  # parents to search for a run: RUN/checkpoints/checkpoint-5/FILE
_NAMED = 3  # directories listed in a message


def run_around(path: Path) -> Path | None:
    """Return the run that contains a path, or None; a run does not contain itself."""
    written = path.parents  # returned in the user's spelling if it includes the run
    for depth, parent in enumerate(path.absolute().parents[:_DEEPEST]):
        if is_run(parent):
            return written[depth] if depth < len(written) else parent
    return None


def why_no_run(path: Path) -> str | None:
    """Return a sentence that suggests a run near a path that is no run; None if none is near.

    Args:
        path: The path given for a run's directory.
    """
    run = run_around(path)
    if run is not None:
        kind = "file" if path.is_file() else "part"
        return f"{path} is a {kind} of the run {run}. Give {run}."
    runs = [child for child in _children(path) if is_run(child)]
    if runs:
        return (
            f"{path} is not a run of `molf train`: it holds {listed(runs, _NAMED)}. Give one run."
        )
    return None


def why_no_model(path: Path) -> str | None:
    """Return why a directory is no model, with a suggestion; None if it may be a model.

    Args:
        path: The directory given for a model.
    """
    run = path if is_run(path) else run_around(path)
    # The adapter before the model: PEFT's directory may have a config.json as well.
    if (path / ADAPTER_CONFIG).is_file():
        return f"is a PEFT adapter, not a whole model. {_merged(path, run)}"
    if (path / MODEL_CONFIG).is_file():
        return None
    if run is not None:
        what = "is a run of molf train" if run == path else f"is a part of the run {run}"
        return f"{what}. {model_of(run)}"
    models = [child for child in _children(path) if (child / MODEL_CONFIG).is_file()]
    if models:
        found = listed(models, _NAMED)
        return f"is a directory without a {MODEL_CONFIG}. It holds {found}: give a model."
    runs = [child for child in _children(path) if is_run(child)]
    if runs:
        return f"holds runs of molf train. Give the model of one, such as {runs[0] / MODEL}."
    return f"is a directory without a {MODEL_CONFIG}. Give a checkpoint in transformers format."


def model_of(run: Path) -> str:
    """Return a sentence with the path of a run's model, or of its adapter or checkpoint."""
    if (run / MODEL / MODEL_CONFIG).is_file():
        return f"Give its model: {run / MODEL}."
    reason = f"It has no {MODEL}/: the run has not ended, or failed before saving its model."
    if (run / ADAPTER / ADAPTER_CONFIG).is_file():
        return f"{reason} Its adapter is {run / ADAPTER}. {_how_to_merge(run / ADAPTER)}"
    whole = [
        checkpoint
        for checkpoint in _children(run / CHECKPOINTS)
        if (checkpoint / MODEL_CONFIG).is_file() and not (checkpoint / ADAPTER_CONFIG).is_file()
    ]
    if whole:
        latest = max(whole, key=lambda checkpoint: checkpoint.stat().st_mtime)
        return f"{reason} Its latest checkpoint is {latest}."
    return reason


def _merged(adapter: Path, run: Path | None) -> str:
    if run is not None and (run / MODEL / MODEL_CONFIG).is_file():
        return f"The model of the run, with its adapter merged, is {run / MODEL}: give that."
    return _how_to_merge(adapter)


def _how_to_merge(adapter: Path) -> str:
    config = read_json(adapter / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    on = f" onto its base, {base}," if isinstance(base, str) and base else ""
    return (
        f"Load it{on} with peft.AutoPeftModelForCausalLM.from_pretrained('{adapter}'), then save "
        "model.merge_and_unload(), and give the directory of that."
    )


def _children(path: Path) -> list[Path]:
    try:
        return sorted(child for child in path.iterdir() if child.is_dir())
    except OSError:
        return []
