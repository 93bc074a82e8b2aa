"""Measure all limits ("bars") of speed and memory on a CPU; print pass, fail or undecided for each.

The benchmarks run one after the other in separate processes and write their records to
benchmarks/results/. It takes about twenty minutes on two cores; run nothing else on them. The exit
code is 1 if a bar fails. The bar of growth.py is measured by `make bench-growth`.

    python benchmarks/bars.py [--results DIR] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RUNS = {  # name of the record: script and arguments
    "optimizer_step": ["optimizer_step.py"],
    "step_time": ["step_time.py", "--tokens", "2048", "--fresh", "--rounds", "16"],
    "step_time_8192": ["step_time.py", "--tokens", "8192"],
    "molfe_step": ["molfe_step.py", "--memory_runs", "2"],
    "memory": ["memory.py"],
    "probe": ["probe.py", "--rounds", "6", "--threads", "1"],
    "score_cost": ["score_cost.py", "--rounds", "16", "--threads", "1"],
    "hybrid": ["hybrid.py", "--keep_memory", "--rounds", "16", "--threads", "1"],
}


def main() -> int:
    """Run the benchmarks and print all bars."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    options = parser.parse_args()
    start = time.monotonic()
    bars = []
    for name in options.only:
        script, *arguments = RUNS[name]
        record = options.results / f"{name}_cpu.json"
        print(f"\n== {' '.join([script, *arguments])}", flush=True)
        command = [sys.executable, str(HERE / script), *arguments, "--json", str(record)]
        subprocess.run(command, check=True)
        bars += json.loads(record.read_text())["bars"]

    from common import show_bar

    print(f"\n== All bars, after {time.monotonic() - start:.0f} s")
    for bar in bars:
        print(show_bar(**bar))
    return 1 if any(bar["verdict"] == "fail" for bar in bars) else 0


if __name__ == "__main__":
    sys.exit(main())
