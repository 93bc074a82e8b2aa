"""Read a finished run from its directory: its settings, and whether it has a model or adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from molf.disk.files import clear_unfinished
from molf.disk.locks import InUseError, Lock
from molf.errors import InputError
from molf.inputs import read_text, reading_yaml
from molf.job.record.contents import hash_of_model
from molf.job.record.ownership import ADAPTER, CONFIG, MODEL, is_run, is_run_config
from molf.job.record.run_around import why_no_run
from molf.paths import check_path, expanded


@dataclass(frozen=True)
class FinishedRun:
    """A run's directory and its settings.

    Attributes:
        path: The directory.
        config: Its `config.yaml`.
    """

    path: Path
    config: dict[str, Any]

    @property
    def method(self) -> str:
        """The method that it was trained with."""
        return str(self.config.get("method"))

    @property
    def is_probe(self) -> bool:
        """Whether it is a probe of `molf probe`, which keeps no model."""
        return bool(self.config["run"].get("probe"))

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.config.get("seed") or 0)

    @property
    def base(self) -> str | None:
        """The directory or Hub id of the model that it was trained from; None if not recorded."""
        model = self.config.get("model")
        return model if isinstance(model, str) and model else None

    @property
    def base_has_changed(self) -> bool:
        """Whether its base is a directory whose contents are not those at the start of the run."""
        known = (self.config["run"].get("model") or {}).get("contents")
        return known is not None and known != hash_of_model(str(self.base))

    @property
    def base_dtype(self) -> str | None:
        """The type that its base was stored in; None if it was not recorded."""
        model = self.config["run"].get("model")
        return model.get("stored_dtype") if isinstance(model, dict) else None

    @property
    def routing_meaning(self) -> str:
        """The interpretation of its routing; empty without routing, and before the run ends."""
        routing = self.config["run"].get("routing")
        return str(routing.get("meaning") or "") if isinstance(routing, dict) else ""

    def check(self, what: str) -> None:
        """Check that the run has the model or the adapter.

        Raises:
            InputError: It is missing; the message gives the reason and an alternative.
        """
        if self.is_probe:
            raise InputError(
                f"{self.path} is a probe, which keeps no model. Train with its assignment: molf "
                f"train --method hybrid --assignment {self.path}"
            )
        has_adapter = (self.path / ADAPTER / "adapter_config.json").is_file()
        if what == ADAPTER and has_adapter:
            return
        if not (self.path / MODEL / "config.json").is_file():
            raise InputError(
                f"{self.path} has no {MODEL}/: the run has not ended, or failed before saving it."
                + (f" It has its adapter: {self.path / ADAPTER}." if has_adapter else "")
            )
        if what == ADAPTER:
            raise InputError(
                f"{self.path} has no adapter: {self._why_no_adapter()}. Take the whole model "
                "(--what model), extract one adapter (molf export --what adapter --rank R), or "
                "train with --method molf-e or lora."
            )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Lock the run during the block, so that it is not replaced.

        Leftovers of killed processes are deleted first.

        Raises:
            InputError: The run is not finished.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(Lock(self.path, shared=True))
                clear_unfinished(self.path)
            except InUseError as error:
                raise InputError(
                    f"{self.path} is in use: its run has not ended. Wait for its end."
                ) from error
            except OSError:
                pass  # the directory is not readable, but its files may be
            yield

    def _why_no_adapter(self) -> str:
        if self.method == "fft":
            return "method=fft trains the weights themselves"
        if self.method == "molf" and not self.config.get("lora_dropout"):
            return "method=molf folds its experts into the weights, which it trains as well"
        return f"method={self.method} also trained weights outside of the adapter"


def read_run(path: Path) -> FinishedRun:
    """Read the settings of a run.

    Raises:
        InputError: The directory is no run of `molf train`.
    """
    path = expanded(path)
    check_run(path)
    # `lexists`: a broken link gets the message of `read_input`, which names it.
    if not os.path.lexists(path / CONFIG):
        raise InputError(f"{path} is not a run of `molf train`: it has no {CONFIG}.")
    text = read_text(path / CONFIG, str(path / CONFIG))
    try:
        with reading_yaml():
            config = yaml.safe_load(text)
    except ValueError as error:
        raise InputError(f"{path / CONFIG} cannot be read: {error}") from error
    if not is_run_config(config):
        raise InputError(f"{path / CONFIG} is not that of a run of `molf train`.")
    return FinishedRun(path, config)


def run_of(model: str) -> FinishedRun | None:
    """Return the run that a model is the result of; None for another model."""
    path = expanded(model).resolve()
    if path.name != MODEL or not (path.parent / CONFIG).is_file():
        return None
    try:
        return read_run(path.parent)
    except InputError:  # config.yaml is not that of a run
        return None


def check_run(path: Path) -> None:
    """Reject a path inside or beside a run instead of the run itself.

    Raises:
        InputError: It is no directory, or the message names the path that was probably meant.
    """
    check_path(path, "run")
    if not is_run(path) and (reason := why_no_run(path)) is not None:
        raise InputError(reason)
    if not path.is_dir():
        raise InputError(f"{path} is not a directory. Give the directory of a run of `molf train`.")
