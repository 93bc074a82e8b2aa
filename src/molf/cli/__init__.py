"""The command line; `main` is the console script `molf`."""

import sys
from collections.abc import Sequence

try:
    from molf.cli.main import main
except ModuleNotFoundError as error:  # `pip install molf` alone is for the optimizer
    from molf.extras import missing_package

    if (_line := missing_package("The command molf", error)) is None:
        raise

    def main(argv: Sequence[str] | None = None) -> int:
        """Print the package that is missing; return 2."""
        sys.stderr.write(f"molf: error: {_line}\n")
        return 2


__all__ = ["main"]
