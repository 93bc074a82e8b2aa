"""The command line; `main` is the console script `molf`."""

from molf.cli.main import main

__all__ = ["main"]
