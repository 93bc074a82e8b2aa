"""Read the runs that W&B, MLflow and trackio have stored on this machine."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER, BLOCK, RECORD = 7, 32_768, 7  # bytes: of the file, of a block, before a piece


@dataclass
class Stored:
    """One run: settings, values by name as (step, value), names of pictures."""

    name: str
    config: dict[str, Any]
    values: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    identity: str = ""


def wandb_pieces(path: Path) -> Iterator[bytes]:
    """Yield the records of an offline file: blocks of pieces, as in LevelDB's log."""
    data, place, record = path.read_bytes(), HEADER, b""
    while place + RECORD <= len(data):
        rest = BLOCK - place % BLOCK
        if rest < RECORD:
            place += rest
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + RECORD])
        record += data[place + RECORD : place + RECORD + size]
        place += RECORD + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_runs(folder: Path) -> list[Stored]:
    """Return the offline runs in a folder, in the order of their beginning."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getctime)
    return [_wandb_run(path, Record) for path in files]


def _wandb_run(path: Path, record: Any) -> Stored:
    run = Stored("", {})
    for piece in wandb_pieces(path):
        entry = record()
        entry.ParseFromString(piece)
        if entry.HasField("run"):
            run.name, run.identity = entry.run.display_name, entry.run.run_id
        for update in (*entry.run.config.update, *entry.config.update):
            run.config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in entry.history.item
        }
        _add(run, row, "train/global_step")
    return run


def mlflow_runs(address: str) -> list[Stored]:
    """Return the runs of a store."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=address)
    places = [one.experiment_id for one in client.search_experiments()]
    return [
        Stored(
            run.info.run_name,
            dict(run.data.params),
            {
                name: [(x.step, x.value) for x in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            },
            [file.path for file in client.list_artifacts(run.info.run_id, "routing")],
            run.info.status,
        )
        for run in client.search_runs(places, order_by=["attributes.start_time ASC"])
    ]


def trackio_runs(project: str = "huggingface") -> list[Stored]:
    """Return the runs of a project on this machine."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for one in trackio.Api().runs(project):
        run = Stored(one.name, dict(one.config or {}), identity=one.id)
        for row in SQLiteStorage.get_logs(project, one.name, run_id=one.id):
            _add(run, row, "train/global_step")
        found.append(run)
    return found


def _add(run: Stored, row: dict[str, Any], step: str) -> None:
    for name, value in row.items():
        if isinstance(value, dict):  # trackio
            run.pictures.append(name)
        elif isinstance(value, str) and name.endswith("/path"):  # W&B
            run.pictures.append(name.removesuffix("/path"))
        elif isinstance(value, (int, float)) and name != step and step in row:
            run.values.setdefault(name, []).append((int(row[step]), float(value)))
