"""Running a command, and ending as the shell expects: 0 done, 2 wrong input, 1 failed."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

from cyclopts import CycloptsError

from molf.cli.app import app, join_booleans
from molf.errors import InputError

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `molf` with these arguments (those of the process if None); return the exit code."""
    arguments = join_booleans(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return app(arguments, exit_on_error=False, print_error=False) or DONE
        except (CycloptsError, InputError) as error:
            return _fail(WRONG_INPUT, str(error))
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            # The reader has gone. Python would fail once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        except Exception as error:
            return _fail(FAILED, _describe(error))


def _fail(code: int, message: str) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"molf: error: {line}\n")
    return code


def _describe(error: Exception) -> str:
    """Return the error in a line, with where its traceback is."""
    from molf.train.result import RunError

    if isinstance(error, RunError):
        return str(error)
    with tempfile.NamedTemporaryFile(
        "w", prefix="molf-error-", suffix=".log", delete=False, encoding="utf-8"
    ) as log:
        traceback.print_exc(file=log)
    return f"{type(error).__name__}: {error} (traceback: {log.name})"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as one line: where in the code it arose does not help a user."""
    (file or sys.stderr).write(f"molf: warning: {message}\n")
