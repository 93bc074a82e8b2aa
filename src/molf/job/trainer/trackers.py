"""The runs of W&B, MLflow, trackio and TensorBoard that belong to one training.

transformers' callbacks send them the figures of the steps. They open a tracker's run when the steps
begin and close it after the last one, always as a new one. These classes open it before, so that it
has the metrics before and after the training, its options and the picture of the routing, and so
that a resumed training continues it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainingArguments

from molf.job.trainer.routing_image import Pixels
from molf.shown import option_text

STEP = "train/global_step"
"""transformers' name of the step in W&B and trackio."""

OPTIONS = "molf"
"""Name of a training's options beside transformers' own arguments."""

_PICTURE_SUFFIX = ".png"


class Tracker(Protocol):
    """One run of a tracker. All methods are called in rank 0 alone."""

    def open(self, stored: str | None) -> str:
        """Open a run, or the stored one again; return what opens it again."""

    def attach(self, callbacks: list[Any]) -> None:
        """Make transformers' callback use this run; a no-op where it does so by itself."""

    def add_options(self, options: Mapping[str, Any]) -> None:
        """Add the options of the training; called once, after transformers' callback began."""

    def add_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add numbers by name."""

    def add_image(self, name: str, pixels: Pixels, caption: str, step: int) -> None:
        """Add a picture, uint8 [height, width, 3]."""

    def close(self, *, failed: bool) -> None:
        """Close the run, if this class has opened it."""


class Wandb(Tracker):
    """A run of W&B; one that the program has open is used and stays open."""

    def __init__(self, arguments: TrainingArguments, _: Path) -> None:
        self._wandb: Any = import_module("wandb")
        self._arguments = arguments
        self._owned = False

    def open(self, stored: str | None) -> str:
        """Open it by the id, which offline runs keep as well."""
        if self._wandb.run is None:
            again = {"id": stored, "resume": "allow"} if stored else {}
            project = os.getenv("WANDB_PROJECT", "huggingface")  # transformers' default
            self._wandb.init(project=project, name=self._arguments.run_name, **again)
            self._owned = True
        return str(self._wandb.run.id)

    def add_options(self, options: Mapping[str, Any]) -> None:
        """Add them to the configuration."""
        self._wandb.config.update({OPTIONS: dict(options)}, allow_val_change=True)

    def add_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a row."""
        self._wandb.log({**metrics, STEP: step})

    def add_image(self, name: str, pixels: Pixels, caption: str, step: int) -> None:
        """Add a row with the picture."""
        self._wandb.log({name: self._wandb.Image(pixels, caption=caption), STEP: step})

    def close(self, *, failed: bool) -> None:
        """Finish the run, so that another training of this process has its own."""
        if self._owned:
            self._wandb.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow; one that the program has open is used and stays open."""

    def __init__(self, arguments: TrainingArguments, _: Path) -> None:
        self._mlflow: Any = import_module("mlflow")
        self._arguments = arguments
        self._owned = False
        self._continued = False

    def open(self, stored: str | None) -> str:
        """Open it by the id."""
        given = os.getenv("MLFLOW_RUN_ID")  # transformers' callback opens that one itself
        active = self._mlflow.active_run()
        self._continued = stored is not None
        if active is None and not given:
            if experiment := os.getenv("MLFLOW_EXPERIMENT_NAME"):
                self._mlflow.set_experiment(experiment)
            active = self._mlflow.start_run(run_id=stored, run_name=self._arguments.run_name)
            self._owned = True
        self._id = str(given or active.info.run_id)
        return self._id

    def attach(self, callbacks: list[Any]) -> None:
        """Let a resumed training add no parameters: MLflow refuses another value of one."""
        if self._continued:
            for callback in callbacks:
                if hasattr(callback, "_ml_flow"):
                    callback.setup = _without_parameters(callback.setup)

    def add_options(self, options: Mapping[str, Any]) -> None:
        """Add them as parameters."""
        if self._continued:
            return
        limits = self._mlflow.utils.validation
        params = [
            self._mlflow.entities.Param(
                f"{OPTIONS}.{name}", option_text(value)[: limits.MAX_PARAM_VAL_LENGTH]
            )
            for name, value in options.items()
        ]
        most = limits.MAX_PARAMS_TAGS_PER_BATCH
        for first in range(0, len(params), most):
            self._client.log_batch(self._id, params=params[first : first + most])

    def add_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add metrics."""
        now = time.time_ns() // 1_000_000
        metric = self._mlflow.entities.Metric
        entries = [metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=entries)

    def add_image(self, name: str, pixels: Pixels, caption: str, step: int) -> None:
        """Add a file to the artifacts."""
        self._client.log_image(self._id, pixels, artifact_file=name + _PICTURE_SUFFIX)

    def close(self, *, failed: bool) -> None:
        """End the run."""
        if self._owned and self._mlflow.active_run() is not None:
            self._mlflow.end_run("FAILED" if failed else "FINISHED")

    @property
    def _client(self) -> Any:
        return self._mlflow.MlflowClient()


def _without_parameters(setup: Any) -> Any:
    """Return the callback's `setup` with its own limit of parameters at 0."""

    def limited(*given: Any, **named: Any) -> None:
        name = "MLFLOW_MAX_LOG_PARAMS"
        before = os.environ.get(name)
        os.environ[name] = "0"
        try:
            setup(*given, **named)
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before

    return limited


class Trackio(Tracker):
    """A run of trackio, which transformers' callback opens by its name and finishes."""

    def __init__(self, arguments: TrainingArguments, _: Path) -> None:
        self._trackio: Any = import_module("trackio")
        self._arguments = arguments
        self._config: dict[str, Any] = {}

    def open(self, stored: str | None) -> str:
        """Make a run of this name, or choose the stored name."""
        if stored is None:
            self._init("never")
            # A run exists from its first entry on. transformers' callback then continues the
            # newest of the name, and not an earlier training in a directory of the same name.
            self._trackio.log({STEP: 0})
        else:
            self._arguments.run_name = stored
        return str(self._arguments.run_name)

    def add_options(self, options: Mapping[str, Any]) -> None:
        """Add them to the configuration."""
        config = self._trackio.config
        config[OPTIONS] = dict(options)
        # Each opening of a run stores its configuration again.
        self._config = {name: config[name] for name in config if not name.startswith("_")}

    def add_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a row."""
        self._log({**metrics, STEP: step})

    def add_image(self, name: str, pixels: Pixels, caption: str, step: int) -> None:
        """Add a row with the picture."""
        self._log({name: self._trackio.Image(pixels, caption=caption), STEP: step})

    def close(self, *, failed: bool) -> None:
        """Finish the run."""
        if self._is_open():
            self._trackio.finish()

    def _log(self, entry: Mapping[str, Any]) -> None:
        if not self._is_open():
            self._init("allow")
        self._trackio.log(dict(entry))

    def _is_open(self) -> bool:
        return self._trackio.context_vars.current_run.get() is not None

    def _init(self, resume: str) -> None:
        arguments: Any = self._arguments
        places = {
            "space_id": "trackio_space_id",
            "private": "hub_private_repo",
            "bucket_id": "trackio_bucket_id",
        }
        given = {name: getattr(arguments, field, None) for name, field in places.items()}
        self._trackio.init(
            project=arguments.project,
            name=arguments.run_name,
            resume=resume,
            config=self._config,
            **{name: value for name, value in given.items() if value is not None},
        )


class TensorBoard:
    """A folder of event files; a resumed training adds one."""

    def __init__(self, _: TrainingArguments, folder: Path) -> None:
        package = "torch.utils.tensorboard" if find_spec("tensorboard") else "tensorboardX"
        self._make: Any = import_module(package).SummaryWriter
        self._writer: Any = None
        self._folder = os.path.expanduser(os.getenv("TENSORBOARD_LOGGING_DIR") or str(folder))

    def open(self, stored: str | None) -> str:
        """Return the folder, which is the same for all parts of a training."""
        return self._folder

    def attach(self, callbacks: list[Any]) -> None:
        """Give the callback the folder; its own name has the time in it."""
        for callback in callbacks:
            if hasattr(callback, "tb_writer"):
                callback.logging_dir = self._folder

    def add_options(self, options: Mapping[str, Any]) -> None:
        """Add them as a table."""
        rows = [f"| {name} | {option_text(value)} |" for name, value in options.items()]
        self._write("add_text", f"{OPTIONS}/options", "\n".join(["| | |", "|-|-|", *rows]))

    def add_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add scalars."""
        for name, value in metrics.items():
            self._write("add_scalar", name, value, step)

    def add_image(self, name: str, pixels: Pixels, caption: str, step: int) -> None:
        """Add a picture."""
        self._write("add_image", name, pixels, step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, kind: str, *given: Any, **named: Any) -> None:
        if self._writer is None:
            self._writer = self._make(log_dir=self._folder, filename_suffix=f".{OPTIONS}")
        getattr(self._writer, kind)(*given, **named)


KINDS: dict[str, Callable[[TrainingArguments, Path], Tracker]] = {
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
    "tensorboard": TensorBoard,
}
