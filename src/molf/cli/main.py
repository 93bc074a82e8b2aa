"""Running a command, and ending as the shell expects: 0 done, 2 wrong input, 1 failed."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

from cyclopts import CycloptsError, MissingArgumentError, UnknownOptionError, UnusedCliTokensError

from molf.cli.app import app, join_booleans
from molf.errors import InputError

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `molf` with these arguments (those of the process if None); return the exit code."""
    # Read when torch is loaded. Threads that spin while they wait for one another make a small
    # model ten times slower on a CPU that has anything else to do.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = join_booleans(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _WarningLines()
        try:
            return app(arguments, exit_on_error=False, print_error=False) or DONE
        except CycloptsError as error:
            return _fail(WRONG_INPUT, _explain(error))
        except InputError as error:
            return _fail(WRONG_INPUT, str(error))
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            # The reader has gone. Python would fail once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        except SystemExit as exiting:
            if not isinstance(exiting.__context__, BrokenPipeError):
                raise
            return DONE  # the same, met by rich
        except Exception as error:
            return _fail(FAILED, _describe(error))


def _fail(code: int, message: str) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"molf: error: {line}\n")
    return code


def _explain(error: CycloptsError) -> str:
    """Return the parser's message, with where to find what is allowed if it does not say."""
    message = str(error)
    if isinstance(error, UnusedCliTokensError):
        message = f"Unexpected {' '.join(error.unused_tokens or ())!r}."
    elif not isinstance(error, (UnknownOptionError, MissingArgumentError)):
        return message
    if "Did you mean" in message:
        return message
    command = " ".join(("molf", *(error.command_chain or ())))
    return f"{message} What is allowed is listed by `{command} --help`."


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


class _WarningLines:
    """Shows each warning once, as one line: where in the code it arose does not help a user."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if text not in self._shown:
            self._shown.add(text)
            (file or sys.stderr).write(f"molf: warning: {text}\n")
