"""Choose and check the directory of an export, before anything, even torch, is loaded."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from molf.disk.room import check_file_size, check_room, directory_bytes
from molf.errors import InputError
from molf.job.model.path import check_entries, check_model
from molf.job.record.directory import check_output
from molf.job.record.finished_run import FinishedRun
from molf.job.record.ownership import (
    ADAPTER,
    AN_EXPORT,
    CHECKPOINTS,
    LOW_HALVES,
    MODEL,
    ROUTING,
    read_json,
)
from molf.paths import check_inputs_outside, is_within, settled

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def export_place(
    run: FinishedRun, what: str, dtype: str | None, output_dir: Path | None, *, overwrite: bool
) -> Path:
    """Return the directory for an export, after checking that it can be written there.

    Args:
        run: A run that has the model or the adapter.
        what: `model` or `adapter`.
        dtype: Type of the weights; None for the stored one.
        output_dir: The directory; None for one in the run, named after the type.
        overwrite: Replace an earlier export there.

    Raises:
        InputError: The directory holds other files, cannot be written, or has too little space.
    """
    # A pipe among the files would block the reading of the headers.
    check_entries(run.path / what, what)
    stored = _read_headers(run.path / what)
    path = _place(run, f"{what}-{dtype or stored.dtype}", output_dir, overwrite=overwrite)
    weights = stored.bytes_in(dtype)
    check_room(
        path.parent,
        {f"the {what} in {dtype or stored.dtype}": weights + stored.other_bytes},
        option=f"output_dir {path}: the export",
        advice="Make room, or give another --output_dir.",
    )
    check_file_size(path, weights)
    return path


def extraction_place(
    run: FinishedRun, rank: int, dtype: str, output_dir: Path | None, *, overwrite: bool
) -> Path:
    """Return the directory for an extracted adapter, after checking that it can be written there.

    Args:
        run: A run that has the model.
        rank: Rank of the adapter.
        dtype: Type of its weights.
        output_dir: The directory; None for one in the run, named after rank and type.
        overwrite: Replace an earlier export there.

    Raises:
        InputError: The run has no model, its base is missing, or was quantised; the directory holds
            other files, or cannot be written.
    """
    run.check(MODEL)
    _check_base(run)
    check_entries(run.path / MODEL, MODEL)
    return _place(run, f"{ADAPTER}-r{rank}-{dtype}", output_dir, overwrite=overwrite)


def _place(run: FinishedRun, name: str, output_dir: Path | None, *, overwrite: bool) -> Path:
    """Return the directory, by default that of the name in the run, after its checks."""
    path = run.path / name if output_dir is None else settled(output_dir)
    _check_replaceable(path, run, name)
    check_output(path, overwrite=overwrite, ownership=AN_EXPORT, renames=True)
    check_inputs_outside(path, {"the run's base": run.base})
    return path


def _check_base(run: FinishedRun) -> None:
    """Check that the base of a run can be compared with its model."""
    if run.base is None:
        raise InputError(f"{run.path} has no record of its base, from which its model changed.")
    quantised = (run.config["run"].get("model") or {}).get("quantised")
    if quantised:
        raise InputError(
            f"{run.path} was trained beside a quantised base ({quantised}), so the change of its "
            "model holds the error of the quantisation. Export its own adapter: leave rank out."
        )
    try:
        check_model(run.base)
    except InputError as error:
        raise InputError(f"The base of {run.path} cannot be read: {error}") from error
    check_unchanged_base(run)


def check_unchanged_base(run: FinishedRun) -> None:
    """Check that the base of a run is still that which its model was trained from.

    Raises:
        InputError: Its directory has other contents.
    """
    if run.base_has_changed:
        raise InputError(
            f"The base {run.base} has changed since {run.path} was trained from it. Restore its "
            "files."
        )


def _check_replaceable(path: Path, run: FinishedRun, name: str) -> None:
    """Reject directories that an export must not replace, even if empty."""
    # An export is written to a temporary directory and renamed, which deletes the one at `path`.
    kept = [run.path / part for part in (MODEL, ADAPTER, ROUTING, CHECKPOINTS, LOW_HALVES)]
    if path.resolve() == run.path.resolve() or any(is_within(path, place) for place in kept):
        raise InputError(
            f"output_dir {path} is the run's own. Give another --output_dir, or none for {name}/."
        )
    home = os.path.expanduser("~")
    for place, holds in (
        (run.path, "the run"),
        (Path.cwd(), "the current directory"),
        (Path(home), "your home directory"),
    ):
        if is_within(place, path):
            what = "is" if os.path.realpath(place) == os.path.realpath(path) else "holds"
            raise InputError(
                f"output_dir {path} {what} {holds}, which an export would replace. Give a "
                f"directory of its own, such as {path / name}."
            )
    # A mount point cannot be renamed, which replacing a directory does.
    if os.path.ismount(path):
        raise InputError(
            f"output_dir {path} is where a disk is mounted, which an export would replace. Give a "
            f"directory in it, such as {path / name}."
        )


@dataclass(frozen=True)
class _Stored:
    """Weights on disk, from the headers of their files.

    Attributes:
        dtype: The declared type if it is wider than `main`, else `main`.
        main: The type of most numbers.
        numbers: The count of numbers of each floating-point type.
        other_bytes: Bytes of everything else in the directory.
    """

    dtype: str
    main: str
    numbers: Counter[str]
    other_bytes: int

    def bytes_in(self, dtype: str | None) -> int:
        """Return the bytes of the floating-point numbers in another type."""
        # Only numbers of the main type are narrowed.
        wanted = _BYTES[dtype or self.dtype]
        return sum(
            count * (wanted if name == self.main else max(wanted, _BYTES[name]))
            for name, count in self.numbers.items()
        )


def _read_headers(path: Path) -> _Stored:
    """Read the types of the tensors in a directory from the headers.

    Raises:
        InputError: There are no tensors, or a file is damaged.
    """
    numbers: Counter[str] = Counter()
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "np") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    part = opened.get_slice(name)
                    if part.get_dtype() in _TYPES:
                        numbers[_TYPES[part.get_dtype()]] += prod(part.get_shape())
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{file} cannot be read as safetensors (cut short, or of another format): {error}"
            ) from error
    if not numbers:
        raise InputError(f"{path} has no weights: it has no file that ends in .safetensors.")
    # As `StoredCheckpoint.main_dtype`, which needs torch.
    main = max(numbers, key=lambda dtype: numbers[dtype])
    tensors = sum(count * _BYTES[dtype] for dtype, count in numbers.items())
    other = max(directory_bytes(path) - tensors, 0)
    return _Stored(_declared(path, main), main, numbers, other)


def _declared(path: Path, main: str) -> str:
    """Return the type that the configuration declares if it is wider than `main`, else `main`."""
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        return main
    declared = config.get("dtype", config.get("torch_dtype"))  # the name before transformers 5
    return str(declared) if _BYTES.get(str(declared), 0) > _BYTES[main] else main
