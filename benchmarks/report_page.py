"""Time and size of the page of a run with many layers and steps.

    python benchmarks/report_page.py [--layers 200] [--steps 20000]

The routing log is written first, with scores drawn at random and winners by them.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from molf.job.record.routing_log import SCHEMA
from molf.report.build import read_runs
from molf.report.page import render
from molf.report.place import write_page

EXPERTS = ("full", "lora0_r16")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS_PER_PART = 250_000


def write_run(run: Path, layers: int, steps: int) -> None:
    """Write the files of a run that its page reads."""
    names = [f"model.layers.{i // len(KINDS)}.mlp.{KINDS[i % len(KINDS)]}" for i in range(layers)]
    run.mkdir()
    config = {
        "task": "custom",
        "model": "/models/large",
        "method": "molf",
        "score": "epd",
        "top_k": 1,
        "ranks": [16],
        "alpha": [8.0],
        "use_rslora": True,
        "learning_rate": 1e-4,
        "lora_learning_rate": 2e-4,
        "run": {"training": {"steps": steps}, "model": {}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text("{}")
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "loss": 1 / step, "learning_rate": 1e-4, "grad_norm": 1.0}
            file.write(json.dumps({**line, "tokens_per_second": 1000.0 + step % 7}) + "\n")
    (run / "routing").mkdir()
    random = np.random.default_rng(0)
    shapes = {b"molf.shapes": json.dumps({name: [4096, 4096] for name in names}).encode()}
    per_part = max(1, ROWS_PER_PART // (layers * len(EXPERTS)))
    for number, start in enumerate(range(0, steps, per_part)):
        count = min(per_part, steps - start)
        scores = random.lognormal(size=(count, layers, len(EXPERTS)))
        won = scores == scores.max(axis=2, keepdims=True)
        table = pa.table(
            {
                "step": np.repeat(np.arange(start, start + count), layers * len(EXPERTS)),
                "layer": np.tile(np.repeat(names, len(EXPERTS)), count),
                "expert": np.tile(EXPERTS, count * layers),
                "score": scores.ravel(),
                "winner": won.ravel(),
            },
            schema=SCHEMA.with_metadata(shapes),
        )
        pq.write_table(table, run / "routing" / f"part-{number:05d}.parquet")


def main() -> None:
    """Write a run, build its page and print time, size and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--output", type=Path, help="keep the page in this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_run(run, given.layers, given.steps)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, cpu = time.perf_counter(), time.process_time()
        runs = read_runs([run])
        read = time.perf_counter() - start
        page = given.output or run / "report.html"
        write_page(render(runs), page)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"{given.layers} layers x {given.steps:,} steps, {len(EXPERTS)} experts")
        print(
            f"page      {page.stat().st_size / 2**20:.2f} MiB in {seconds:.1f} s ({cpu:.1f} s CPU)"
        )
        print(f"reading   {read:.1f} s")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"memory    {peak / 1024:.0f} MiB at most, {before / 1024:.0f} MiB before")


if __name__ == "__main__":
    main()
