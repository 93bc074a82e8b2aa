"""Measure every bar of speed and memory on a CPU, and say of each: pass, fail or undecided.

Runs the benchmarks one after the other, each in a process of its own, and leaves their records in
benchmarks/results/. Under ten minutes on two cores; nothing else should run on them. Exits with 1
if a bar fails.

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
RUNS = {  # the record's name, and the command
    "optimizer_step": ["optimizer_step.py"],
    "step_time": ["step_time.py", "--tokens", "2048", "--fresh", "--rounds", "16"],
    "step_time_8192": ["step_time.py", "--tokens", "8192"],
    "molfe_step": ["molfe_step.py", "--memory_runs", "2"],
    "memory": ["memory.py"],
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
