"""`molf` as `torchrun` starts it; rank 1 is killed before a forward pass of its first start.

torchrun --nproc_per_node 2 --max-restarts 1 killed_once.py NUMBER ARGUMENTS...
"""

from __future__ import annotations

import os
import sys

from killed_run import interrupt
from molf.cli import main

if __name__ == "__main__":
    number, *arguments = sys.argv[1:]
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        interrupt("step", int(number))
    sys.exit(main(arguments))
