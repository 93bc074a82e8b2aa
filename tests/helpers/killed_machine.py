"""`molf` as `torchrun` starts it; a process and its agent are killed, as if their machine failed.

Before the forward pass KILLED_AT of the training; without it, nothing is killed.
"""

from __future__ import annotations

import os
import signal
import sys

from molf.cli import main
from process_faults import at_step


def fail() -> None:
    """Kill the agent and this process."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if "KILLED_AT" in os.environ:
        at_step(int(os.environ["KILLED_AT"]), fail)
    sys.exit(main(sys.argv[1:]))
