"""Parts of a run that trials and probes of a study share."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molf.console import PlainConsole
from molf.errors import InputError
from molf.job.progress import Reporter
from molf.job.record.ownership import CONFIG, read_yaml
from molf.job.record.result import RunError
from molf.study.definition import Study

LOCKS = ".locks"


class FullDiskError(RunError):
    """The disk of a study is full; one line. All other trials would fail too."""


@contextmanager
def alone(study: Study, *place: str) -> Iterator[None]:
    """Wait for other workers that run this trial or probe, and keep them out of the block.

    A worker that was suspended for long, or that started before the study file changed, may still
    run it. On network file systems only workers of this machine are waited for.

    Args:
        study: The study.
        place: The names of the trial or probe.
    """
    from molf.disk.locks import Lock

    path = study.output_dir.joinpath(LOCKS, *place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with Lock(path, wait=math.inf):
        yield


def clear_leftovers(directory: Path) -> None:
    """Delete the files that a killed worker left of a trial; molf train replaces only whole runs.

    Raises:
        InputError: A process still writes there.
    """
    from molf.disk.locks import in_use

    if not directory.exists():
        return
    if in_use(directory):
        raise InputError(f"{directory} is in use: another process runs this trial.")
    shutil.rmtree(directory)


def parameters_of(directory: Path) -> int:
    """Return the number of parameters of a run's base; 0 if it is not recorded."""
    config = read_yaml(directory / CONFIG) or {}
    return int(((config.get("run") or {}).get("model") or {}).get("parameters") or 0)


def training_flops(parameters: int, trained: int, tokens: int) -> int:
    """Estimate the floating-point operations of a training.

    Per token 2 for each parameter in the forward pass, 2 for the gradients of activations, and 2
    for the gradient of each trained parameter (Kaplan et al. 2020, arXiv 2001.08361, section 2.1,
    split by use). Attention over positions and the optimizer are left out.

    Args:
        parameters: Parameters of the base.
        trained: Parameters with optimizer state. MoLF computes the gradient of each routed weight
            in every step, also if full never wins and the weight never moves; it counts.
        tokens: Tokens trained on.
    """
    return tokens * (4 * parameters + 2 * trained)


class QuietReporter(Reporter):
    """Prints nothing of a run; the worker prints one line per trial."""

    def __init__(self) -> None:
        super().__init__(PlainConsole(stderr=True))

    def say(self, text: str) -> None:
        """Print nothing."""
