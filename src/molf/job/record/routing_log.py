"""Write and read the routing log of a run: step, layer, scores and winners, as Parquet."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from molf.disk.files import replacing_file
from molf.errors import InputError, reason_of, system_reason
from molf.job.record.finished_run import check_run
from molf.job.record.ownership import CONFIG, ROUTING
from molf.paths import check_path

if TYPE_CHECKING:
    from molf.core.step.decision import Decision

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("layer", pa.string()),
        ("expert", pa.string()),
        ("score", pa.float64()),
        ("winner", pa.bool_()),
    ]
)

_SHAPES = b"molf.shapes"  # key of a part's metadata


class RoutingWriter:
    """Writes `part-00000.parquet`, `part-00001.parquet`, ... into a directory.

    Each part is written atomically and contains whole steps. The end of the `with` block writes the
    pending rows, also when training fails. A failed write is retried with the next part.

    Args:
        directory: The directory, or a function that returns it; created with the first part.
        rows_per_part: Write a part when this many rows are pending ...
        seconds_per_part: ... or when the oldest row has been pending this long.
        shapes: Shape (out, in) of each layer, for the parts' metadata.

    Warns:
        UserWarning: A part cannot be written; once, and again if it still fails at the end.
    """

    def __init__(
        self,
        directory: Path | Callable[[], Path],
        *,
        rows_per_part: int = 250_000,
        seconds_per_part: float = 60.0,
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self._directory = directory
        metadata = {_SHAPES: json.dumps(shapes)} if shapes else None
        self._schema = SCHEMA.with_metadata(metadata)
        self.rows_per_part = rows_per_part
        self.seconds_per_part = seconds_per_part
        self._parts = 0
        self._pending: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self._waiting_since = 0.0
        self._fails = False

    @property
    def directory(self) -> Path:
        """The directory of the next part."""
        return self._directory() if callable(self._directory) else self._directory

    def __enter__(self) -> RoutingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._written() and self._fails:
            first, last = self._pending["step"][0] + 1, self._pending["step"][-1] + 1
            warnings.warn(
                f"The routing of steps {first} to {last} was not written to {self.directory}.",
                stacklevel=2,
            )

    def add(self, step: int, routing: Mapping[str, Decision]) -> None:
        """Add one step's decisions, layers in the optimizer's order."""
        pending = self._pending
        if not pending["step"]:
            self._waiting_since = time.monotonic()
        for layer, decision in routing.items():
            for expert, score in decision.scores.items():
                pending["step"].append(step)
                pending["layer"].append(layer)
                pending["expert"].append(expert)
                pending["score"].append(score)
                pending["winner"].append(expert in decision.winners)
        waited = time.monotonic() - self._waiting_since
        # After a failure only the time counts: a retry in each step would slow the training.
        is_large = len(pending["step"]) >= self.rows_per_part and not self._fails
        if is_large or waited >= self.seconds_per_part:
            self._written()

    def state_dict(self) -> dict[str, int]:
        """Write the pending rows; return the number of parts.

        Raises:
            OSError: They cannot be written, and stay pending.
        """
        try:
            self.flush()
        except pa.ArrowException as error:
            raise OSError(str(error)) from error
        return {"parts": self._parts}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Delete the parts that were written after a state, and continue behind it.

        Raises:
            OSError: They cannot be deleted.

        Warns:
            UserWarning: Parts before it are missing or cannot be read.
        """
        self._parts = state["parts"]
        names = [self._name(number) for number in range(self._parts)]
        found = sorted(self.directory.glob("part-*.parquet"))
        for path in found:
            if path.name not in names:
                path.unlink()
        kept = [path for path in found if path.name in names]
        damaged = [path for path in kept if not _is_readable(path)]
        for count, what in ((len(names) - len(kept), "missing"), (len(damaged), "damaged")):
            if count:
                first = f", the first is {damaged[0].name}" if what == "damaged" else ""
                warnings.warn(
                    f"{count} of {len(names)} parts of the routing are {what} in "
                    f"{self.directory}{first}: their steps are lost, and the run continues.",
                    stacklevel=2,
                )

    def cut(self, step: int) -> None:
        """Delete the rows of a step and of later ones, and continue behind the others.

        Raises:
            InputError: A part is damaged.
            OSError: A part cannot be written or deleted.
        """
        self._parts = 0
        for path in sorted(self.directory.glob("part-*.parquet")):
            table = _read(path)
            kept = table.filter(pc.less(table["step"], step))
            stays = path.name == self._name(self._parts) and len(kept) > 0
            if stays and len(kept) == len(table):
                self._parts += 1
                continue
            if len(kept):
                self._write(kept.replace_schema_metadata(self._schema.metadata))
            if not stays:
                path.unlink()

    @staticmethod
    def _name(number: int) -> str:
        return f"part-{number:05d}.parquet"

    def _written(self) -> bool:
        """Try to write the pending rows as one part; return whether none are pending."""
        try:
            self.flush()
        except (OSError, pa.ArrowException) as error:
            self._waiting_since = time.monotonic()
            if not self._fails:
                warnings.warn(
                    f"The routing cannot be written to {self.directory}: "
                    f"{system_reason(error)}. Training continues, and molf tries again.",
                    stacklevel=3,
                )
            self._fails = True
            return False
        self._fails = False
        return True

    def flush(self) -> None:
        """Write the pending rows as one part.

        Raises:
            OSError: They cannot be written, and stay pending.
        """
        if not self._pending["step"]:
            return
        self._write(pa.table(self._pending, schema=self._schema))
        for values in self._pending.values():
            values.clear()

    def _write(self, table: pa.Table) -> None:
        directory = self.directory
        directory.mkdir(exist_ok=True)
        # A reader never sees a part without its Parquet footer.
        with replacing_file(directory / self._name(self._parts)) as path:
            pq.write_table(table, path)
        self._parts += 1


class NoRoutingLog(RoutingWriter):
    """Writes nothing: of several processes, rank 0 writes the log."""

    def __init__(self) -> None:
        super().__init__(Path())

    def add(self, step: int, routing: Mapping[str, Decision]) -> None:
        """Leave the decisions to rank 0, which has the same."""

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Leave the files to rank 0."""


def routing_parts(run: Path) -> list[Path]:
    """Return the routing parts of a run in order.

    Raises:
        InputError: `run` is no run directory, or its method does not route.
    """
    check_path(run, "run")
    parts = sorted((run / ROUTING).glob("part-*.parquet"))
    if not parts:
        check_run(run)
        if (run / CONFIG).is_file():
            raise InputError(
                f"{run} has no routing: only molf and molf-e route updates, and an unfinished run "
                "has none before its first part is written."
            )
        raise InputError(
            f"{run} is not a run of `molf train`: it has no {CONFIG} and no {ROUTING}/."
        )
    return parts


def read_routing(run: Path) -> pa.Table:
    """Return the whole routing of a run: columns step, layer, expert, score, winner.

    Raises:
        InputError: `run` is no run directory, its method does not route, or a part is damaged.
    """
    return pa.concat_tables(_read(part) for part in routing_parts(run))


def routing_shapes(part: Path) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of each routed layer; empty if the part does not have them.

    Raises:
        InputError: The part is damaged.
    """
    try:
        metadata = pq.read_schema(part).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise _damaged(part, error) from error
    shapes = json.loads(metadata.get(_SHAPES, b"{}"))
    return {layer: (rows, columns) for layer, (rows, columns) in shapes.items()}


def iter_steps(run: Path) -> Iterator[dict[str, Any]]:
    """Yield `{"step": i, "selections": {layer: {"winners": [...], "scores": {...}}}}` per step."""
    for part in routing_parts(run):
        # Parts contain whole steps, so only one part is in memory at a time.
        for step, rows in itertools.groupby(_read(part).to_pylist(), itemgetter("step")):
            selections: dict[str, Any] = {}
            for row in rows:
                selection = selections.setdefault(row["layer"], {"winners": [], "scores": {}})
                selection["scores"][row["expert"]] = row["score"]
                if row["winner"]:
                    selection["winners"].append(row["expert"])
            yield {"step": step, "selections": selections}


def _read(part: Path) -> pa.Table:
    try:
        return pq.read_table(part, schema=SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(part, error) from error


def _is_readable(part: Path) -> bool:
    """Return whether the end of a part is there, which a truncated file lacks."""
    try:
        pq.read_schema(part)
    except (pa.ArrowException, OSError):
        return False
    return True


def _damaged(part: Path, error: Exception) -> InputError:
    return InputError(f"{part} is not a readable Parquet file: {reason_of(error)}")
