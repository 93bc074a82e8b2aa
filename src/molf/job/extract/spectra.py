"""Spectra of the change W - W0 of a finished run's linear layers, by randomised SVD."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molf.core.model.linear_places import is_conv1d
from molf.disk.files import write_json
from molf.job.extract.change import adapted_places
from molf.job.model.loading import load_skeleton
from molf.job.model.stored import StoredCheckpoint
from molf.job.record.finished_run import FinishedRun, read_run
from molf.job.record.ownership import MODEL, SPECTRA

DIRECTIONS = 64
"""Directions of each randomised SVD."""

LEADING, SIMILAR = 10, 0.5
"""An intruder is one of the 10 leading left singular vectors of W whose cosine with each leading
left singular vector of W0 is below 0.5 (arXiv 2410.21228)."""

SHARE_OF_TRAINING = 0.03
"""Share of the training's time that the spectra may take."""

_HELD = 0.9  # of the squared change, for `directions_90`
_ROUNDS = 2  # power iterations


@dataclass(frozen=True)
class Spectrum:
    """The change of one layer.

    Attributes:
        name: The layer's name.
        shape: (out, in).
        base_norm: Frobenius norm of W0.
        change_norm: Frobenius norm of W - W0.
        held: Share of the squared change in the leading `DIRECTIONS` directions.
        directions_90: Directions that hold 90% of the squared change; None if `DIRECTIONS` do not.
        effective_rank: exp of the entropy of the normalised singular values (Roy & Vetterli 2007),
            of the leading directions.
        intruders: Number of intruder dimensions.
    """

    name: str
    shape: tuple[int, int]
    base_norm: float
    change_norm: float
    held: float
    directions_90: int | None
    effective_rank: float
    intruders: int


def spectrum(name: str, old: Tensor, new: Tensor) -> Spectrum:
    """Return the spectrum of a layer's change.

    Args:
        name: The layer's name.
        old: W0, float32 [out, in].
        new: W, float32 [out, in].
    """
    change = new - old
    size = change.double().norm().item()
    held, rank, count, intruders = 1.0, 0.0, 0, 0
    if size:
        values = _leading(change)[1].double()
        shares = (values.square().cumsum(0) / size**2).clamp(max=1.0)
        held = float(shares[-1])
        count = int((shares < _HELD).sum()) + 1
        weights = values / values.sum()
        rank = float(torch.special.entr(weights).sum().exp())
        similar = (_leading(old)[0].T @ _leading(new)[0][:, :LEADING]).abs().amax(dim=0)
        intruders = int((similar < SIMILAR).sum())
    return Spectrum(
        name=name,
        shape=(old.shape[0], old.shape[1]),
        base_norm=old.double().norm().item(),
        change_norm=size,
        held=held,
        directions_90=count if held >= _HELD else None,
        effective_rank=rank,
        intruders=intruders,
    )


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors [out, k] and the singular values [k]."""
    count = min(DIRECTIONS, *matrix.shape)
    # The sketch is wider than the result, which makes the last directions accurate as well.
    left, values, _ = torch.svd_lowrank(matrix, q=min(count + 8, *matrix.shape), niter=_ROUNDS)
    return left[:, :count], values[:count]


def write_spectra(
    run: FinishedRun, limit: float, clock: Callable[[], float] = time.perf_counter
) -> bool:
    """Measure the linear layers of a run's saved model, and write `spectra.json`.

    Layers are taken from all depths in turn, so that those measured before the limit are spread
    over the model. After a short training, the time may suffice for none.

    Args:
        run: A run with a model, whose base can be read.
        limit: Seconds that it may take.
        clock: Returns seconds.

    Returns:
        Whether the file was written. It is not with a base that was quantised, whose weights in
        files are not those that were trained.

    Raises:
        InputError: The base or the model cannot be read.
    """
    if run.config["run"].get("model", {}).get("quantised"):
        return False
    start, longest = clock(), 0.0
    layers = list(_layers(run))
    measured: dict[str, Spectrum] = {}
    # The random sketches are the run's own, and no other random numbers change.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(run.seed)  # on all devices
        for number in _spread(len(layers)):
            before = clock()
            if before + longest - start > limit:
                break
            name, read = layers[number]
            measured[name] = spectrum(name, *read())
            longest = max(longest, clock() - before)
    write_json(
        run.path / SPECTRA,
        {
            "directions": DIRECTIONS,
            "seconds": round(clock() - start, 3),
            "limit_seconds": round(limit, 3),
            "layers": [asdict(measured[name]) for name, _ in layers if name in measured],
            "not_measured": [name for name, _ in layers if name not in measured],
        },
    )
    return True


def spectra_at_end(directory: Path, training_seconds: float) -> None:
    """Write the spectra of a run that has just ended, in a share of its training's time.

    Warns:
        UserWarning: They were not measured: the run is complete without them.
    """
    try:
        write_spectra(read_run(directory), SHARE_OF_TRAINING * training_seconds)
    except Exception as error:
        reason = str(error) or type(error).__name__
        warnings.warn(f"{SPECTRA} was not written: {reason}", stacklevel=2)


def _layers(run: FinishedRun) -> Iterator[tuple[str, Callable[[], tuple[Tensor, Tensor]]]]:
    """Yield the linear layers that both checkpoints have, with a function that reads W0 and W."""
    model = load_skeleton(str(run.path / MODEL))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prefix = str(getattr(model, "base_model_prefix", ""))
    checkpoints = StoredCheckpoint(str(run.base)), StoredCheckpoint(str(run.path / MODEL))
    for name, place in adapted_places(model).items():
        found = [one.find(place.parameter_names[0], prefix) for one in checkpoints]
        stored = [
            one.tensors[at].shape if at else None
            for one, at in zip(checkpoints, found, strict=True)
        ]
        if stored[0] is None or stored[0] != stored[1] or len(stored[0]) != 2:
            continue
        transposed = is_conv1d(place.module)

        def read(
            found: Sequence[Any] = found, transposed: bool = transposed
        ) -> tuple[Tensor, Tensor]:
            old, new = (
                one.read(at).to(device, torch.float32)
                for one, at in zip(checkpoints, found, strict=True)
            )
            return (old.T, new.T) if transposed else (old, new)

        yield name, read


def _spread(count: int) -> Iterator[int]:
    """Yield 0 to count - 1 in an order whose every beginning is spread over the whole."""
    bits = max(1, (count - 1).bit_length())
    for number in range(2**bits):
        place = int(f"{number:0{bits}b}"[::-1], 2)
        if place < count:
            yield place
