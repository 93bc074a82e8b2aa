"""Read a routing log as arrays, part by part, and count the decisions of each layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from molf.core.assignment.assigned import FULL, Evidence
from molf.errors import InputError, reason_of
from molf.job.record.routing_log import SCHEMA, routing_parts

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Decisions(NamedTuple):
    """The decisions of some steps.

    Attributes:
        steps: Number of each step, from 1: [S].
        scores: Score of each expert; NaN for layers without a decision in the step: [S, L, E].
        won: Whether the expert won: [S, L, E].
    """

    steps: Integers
    scores: Floats
    won: Flags

    @property
    def decided(self) -> Flags:
        """Whether the layer had a decision with a score above 0: [S, L]."""
        # At rate 0, the first step of a warm-up, all scores are 0: a tie is no win.
        return np.asarray((np.nan_to_num(self.scores) != 0).any(axis=2))

    def leads(self, experts: list[str]) -> tuple[Floats, Floats] | None:
        """Return scores of `full` and of the best LoRA expert, [S, L] each; None without both."""
        if FULL not in experts or len(experts) == 1:
            return None
        full = experts.index(FULL)
        others = [number for number in range(len(experts)) if number != full]
        return self.scores[:, :, full], self.scores[:, :, others].max(axis=2)


@dataclass(frozen=True)
class RoutingArrays:
    """The parts of a routing log.

    Attributes:
        parts: The readable parts in order.
        damaged: A line for each part that cannot be read.
        layers: Names of all layers, in the order of the log.
        experts: Names of all experts, in the order of the log.
        last_step: The last step of the log, from 1; 0 without steps.
    """

    parts: tuple[Path, ...]
    damaged: tuple[str, ...]
    layers: list[str]
    experts: list[str]
    last_step: int

    def __iter__(self) -> Iterator[Decisions]:
        """Yield the decisions of each part; layers and experts in the order of all parts."""
        layers = {name: number for number, name in enumerate(self.layers)}
        experts = {name: number for number, name in enumerate(self.experts)}
        for part in self.parts:
            yield _decisions(_read(part), layers, experts)


def read_arrays(run: Path, *, skip_damaged: bool = False) -> RoutingArrays:
    """Open the routing log of a run; the parts are read when they are iterated.

    Args:
        run: The directory of a run.
        skip_damaged: Leave out parts that cannot be read, instead of an error.

    Raises:
        InputError: `run` is no run directory, its method does not route, or a part is damaged.
    """
    found, damaged = [], []
    layers: dict[str, None] = {}
    experts: dict[str, None] = {}
    last = 0
    for part in routing_parts(run):
        try:
            table = _read(part)
        except InputError as error:
            if not skip_damaged:
                raise
            damaged.append(str(error))
            continue
        if len(table):
            layers |= dict.fromkeys(_in_order(table["layer"]))
            experts |= dict.fromkeys(_in_order(table["expert"]))
            last = max(last, int(table["step"][-1].as_py()) + 1)
            found.append(part)
    return RoutingArrays(tuple(found), tuple(damaged), [*layers], [*experts], last)


def _read(part: Path) -> pa.Table:
    try:
        # Names as codes: each row has two, and there are few.
        table = pq.ParquetFile(part, read_dictionary=["layer", "expert"]).read(SCHEMA.names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{part} is not a readable Parquet file: {reason_of(error)}") from error
    return table.combine_chunks()


def _in_order(column: pa.ChunkedArray) -> list[str]:
    """Return the names of a column in the order of their first appearance."""
    names: list[str] = column.unique().to_pylist()
    return names


def _decisions(table: pa.Table, layers: dict[str, int], experts: dict[str, int]) -> Decisions:
    steps, step = np.unique(table["step"].to_numpy(), return_inverse=True)
    layer, expert = _codes(table["layer"], layers), _codes(table["expert"], experts)
    shape = (len(steps), len(layers), len(experts))
    scores, won = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    scores[step, layer, expert] = table["score"].to_numpy()
    won[step, layer, expert] = table["winner"].to_numpy()
    return Decisions(steps + 1, scores, won)


def _codes(column: pa.ChunkedArray, numbers: dict[str, int]) -> Integers:
    codes = []
    for chunk in column.chunks:
        known = np.array([numbers[name] for name in chunk.dictionary.to_pylist()], dtype=np.int64)
        codes.append(known[chunk.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(codes)


class Counts:
    """Counts the decisions of each layer, like `LayerHistory`, from arrays.

    Args:
        layers: Names of the layers.
        experts: Names of the experts.

    Attributes:
        changed: After `add`: whether each decision had other winners than that before: [S, L].
    """

    def __init__(self, layers: list[str], experts: list[str]) -> None:
        self._layers, self._experts = layers, experts
        count = len(layers)
        self._wins = np.zeros((count, len(experts)), dtype=np.int64)
        self._decisions = np.zeros(count, dtype=np.int64)
        self._changes = np.zeros(count, dtype=np.int64)
        self._last_change = np.zeros(count, dtype=np.int64)
        self._margins = np.zeros(count)
        self._latest = np.full(count, -1, dtype=np.int64)  # winners as bits; -1: none yet
        self.changed = np.zeros((0, count), dtype=bool)

    def add(self, part: Decisions) -> None:
        """Count the decisions of further steps."""
        decided = part.decided
        self._wins += (part.won & decided[:, :, None]).sum(axis=0)
        self._decisions += decided.sum(axis=0)
        if (margin := margins(part, self._experts)) is not None:
            self._margins += np.where(decided, margin, 0.0).sum(axis=0)
        bits = part.won @ (1 << np.arange(len(self._experts)))
        # Steps without a decision keep the winners before them.
        codes = np.vstack([self._latest, np.where(decided, bits, -1)])
        rows = np.where(codes >= 0, np.arange(len(codes))[:, None], 0)
        codes = np.take_along_axis(codes, np.maximum.accumulate(rows, axis=0), axis=0)
        self.changed = (codes[1:] != codes[:-1]) & (codes[:-1] >= 0)
        self._changes += self.changed.sum(axis=0)
        last = np.where(self.changed, part.steps[:, None], 0).max(axis=0, initial=0)
        self._last_change = np.maximum(self._last_change, last)
        self._latest = codes[-1]

    def evidence(self) -> dict[str, Evidence]:
        """Return the counts by layer."""
        has_margin = FULL in self._experts and len(self._experts) > 1
        return {
            layer: Evidence(
                decisions=(count := int(self._decisions[number])),
                wins=tuple(zip(self._experts, map(int, self._wins[number]), strict=True)),
                changes=int(self._changes[number]),
                last_change=int(self._last_change[number]) or None,
                margin=round(float(self._margins[number]) / count, 6)
                if has_margin and count
                else None,
            )
            for number, layer in enumerate(self._layers)
        }


def margins(part: Decisions, experts: list[str]) -> Floats | None:
    """Return `(full - lora) / (|full| + |lora|)` of each decision, [S, L]; None without both."""
    leads = part.leads(experts)
    if leads is None:
        return None
    full, lora = leads
    size = np.abs(full) + np.abs(lora)
    return np.divide(full - lora, size, out=np.zeros_like(size), where=size > 0)


def read_evidence(run: Path) -> dict[str, Evidence]:
    """Return the counts of the decisions in a run's routing log, by layer.

    Raises:
        InputError: It has no routing log, or a part is damaged.
    """
    arrays = read_arrays(run)
    counts = Counts(arrays.layers, arrays.experts)
    for part in arrays:
        counts.add(part)
    return counts.evidence()


def pooled_rows(layers: Sequence[str], most: int) -> Integers:
    """Return the row of each layer on a map of at most `most` rows, or of one row per kind: [L].

    A row has neighbours of one kind, whose names differ in numbers alone: kinds have different
    winners, which a row of several would hide. Rows are in the order of their first layers.
    """
    kinds = [re.sub(r"\d+", "*", name) for name in layers]
    counts = Counter(kinds)
    size = -(-len(layers) // most)
    while sum(-(-count // size) for count in counts.values()) > max(most, len(counts)):
        size += 1
    seen: Counter[str] = Counter()
    rows: dict[tuple[str, int], int] = {}
    found = []
    for kind in kinds:
        found.append(rows.setdefault((kind, seen[kind] // size), len(rows)))
        seen[kind] += 1
    return np.array(found)
