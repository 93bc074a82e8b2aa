"""Train methods on the demo tasks and print the metrics as Markdown, a table for each task.

    python scripts/demo_table.py [--tasks demo-fact demo-sql] [--methods fft lora molf] [--runs DIR]

Runs that exist in `--runs` are only read; each takes a minute or less. Intervals are the 95%
intervals of `eval.json`: over questions, not over seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "demo-fact": ("es", "ps", "ns", "s"),
    "demo-sql": ("execution_accuracy", "exact_match", "valid_sql"),
    "demo-forms": ("execution_accuracy", "exact_match", "valid_sql"),
    "demo-med": ("accuracy",),
}
BASELINE = "nearest_training_answer"
# Further rows: variants of methods, with their options.
VARIANTS = {
    "molf-dropout": ("--method", "molf", "--lora_dropout", "0.05"),
    "molf-e-4bit": ("--method", "molf-e", "--load_in_4bit"),
    # The alpha of `lora` divided by r instead of its root: a quarter of the scaling.
    "lora-no-rslora": ("--method", "lora", "--no-use_rslora", "--alpha", "8"),
    "molf-random": ("--method", "molf", "--score", "random"),
    "molf-full": ("--method", "molf", "--score", "full"),
    "molf-lora": ("--method", "molf", "--score", "lora"),
    # One LoRA with as many parameters as molf-e.
    "lora-sum": ("--method", "lora", "--ranks", "4,16"),
}


def main() -> None:
    """Train missing runs and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--methods", nargs="+", default=["fft", "lora", "molf"])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-table"))
    options = parser.parse_args()
    for task in options.tasks:
        for method in options.methods:
            train(task, method, options.runs)
        print("\n".join(table(task, options.methods, options.runs)), end="\n\n", flush=True)


def train(task: str, method: str, runs: Path) -> None:
    """Train one method on one task, unless its run exists."""
    run = runs / f"{task}-{method}"
    if (run / "eval.json").exists():
        return
    chosen = VARIANTS.get(method, ("--method", method))
    command = [sys.executable, "-m", "molf", "train", "--task", task, *chosen]
    subprocess.run([*command, "--output_dir", str(run)], check=True, stdout=subprocess.DEVNULL)


def table(task: str, methods: list[str], runs: Path) -> list[str]:
    """Return the lines of a task's table: base, nearest training answer, and each method."""
    evaluations = {
        method: json.loads((runs / f"{task}-{method}" / "eval.json").read_text())
        for method in methods
    }
    with (runs / "results.csv").open(newline="") as file:
        costs = {Path(row["run"]).name: row for row in csv.DictReader(file)}
    columns = COLUMNS[task]
    before = evaluations[methods[0]]["before"]
    rows = [row("before", before, columns)]
    if "baselines" in before:
        rows.append(row("nearest training answer", before["baselines"][BASELINE], columns))
    for method in methods:
        cost = costs[f"{task}-{method}"]
        cells = (
            f"{int(cost['trained_parameters']):,}",
            f"{float(cost['training_seconds']):.0f}",
            f"{float(cost['peak_memory_bytes']) / 2**20:.0f}",
        )
        rows.append(row(method, evaluations[method]["after"], columns, *cells))
    names = (task, *columns, "forgetting", "trained parameters", "training s", "peak MiB")
    count = before[columns[0]]["count"]
    return [
        f"{task}, n = {count}",
        "",
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
        *rows,
    ]


def row(name: str, metrics: dict[str, Any], columns: tuple[str, ...], *cells: str) -> str:
    """Format one row: metrics with their intervals, then other cells."""
    shown = [cell(metrics.get(column)) for column in columns]
    forgetting = metrics.get("forgetting_loss")
    shown.append(f"{forgetting['value']:.3f}" if forgetting else "")
    return "| " + " | ".join([name, *shown, *(cells or ("", "", ""))]) + " |"


def cell(metric: dict[str, float] | None) -> str:
    """Format a metric with its interval."""
    if metric is None:
        return ""
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


if __name__ == "__main__":
    main()
