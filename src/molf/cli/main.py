"""Run a command and return its exit code: 0 done, 2 wrong input, 1 failed, 3 stopped and saved.

SIGTERM (job schedulers) and SIGHUP (closed terminals) end a command like Ctrl-C.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from cyclopts import CycloptsError, MissingArgumentError, UnknownOptionError, UnusedCliTokensError

from molf.cli.app import app, join_booleans, join_stdin
from molf.cli.helping import EXAMPLES, HELP_ALL, without_help_all
from molf.cli.lines import one_line, say
from molf.errors import InputError
from molf.extras import missing_package
from molf.masking import learn
from molf.ranks import launched_count, lost_process
from molf.streams import OutputError, standard_streams

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 3
_BY_SIGNAL = 128  # shells report a command ended by signal N as 128 + N
_AGAIN_SECONDS = 0.05  # until a signal whose exception was dropped is sent again


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived. A KeyboardInterrupt, so that clean-up code handles both alike.

    Python drops exceptions of weakref callbacks and of `__del__`, and a bare `except:` of a library
    drops all. An exception that is deleted before the command ends was dropped: the signal is sent
    again.

    Args:
        number: The signal.
        ended: Whether the command has ended.
    """

    def __init__(self, number: int, ended: threading.Event) -> None:
        super().__init__()
        self.number = number
        self._ended = ended

    def __del__(self) -> None:
        if not self._ended.is_set():
            # By a thread, and later: an exception raised here would be dropped as well.
            _thread.start_new_thread(_send_again, (self.number, self._ended))


def _send_again(number: int, ended: threading.Event) -> None:
    if not ended.wait(_AGAIN_SECONDS):
        os.kill(os.getpid(), number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `molf` with these arguments (those of the process if None); return the exit code."""
    # OpenMP reads this when torch is loaded. With the default, waiting threads spin, which makes a
    # small model ten times slower on a CPU that other processes use as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Before the first request, which checks that a model or data set exists.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if launched_count() > 1:  # each process would warn that DDP looks for unused parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    given = sys.argv[1:] if argv is None else argv
    arguments = without_help_all(join_stdin(join_booleans(given)))
    # Before anything is printed, because a message may quote an argument with a token.
    learn(arguments)
    with standard_streams(), warnings.catch_warnings():
        warnings.showwarning = _WarningLines()
        try:
            with _signals_as_interrupts():
                code = app(arguments, exit_on_error=False, print_error=False) or DONE
                # A full disk or closed terminal may show only when the buffer is flushed.
                sys.stdout.flush()
                return code
        except CycloptsError as error:
            return _fail(WRONG_INPUT, _explain(error))
        except InputError as error:
            return _fail(WRONG_INPUT, str(error))
        except _TerminatedError as error:
            return _BY_SIGNAL + error.number
        except KeyboardInterrupt:
            return _BY_SIGNAL + signal.SIGINT
        except ModuleNotFoundError as error:
            if line := missing_package(f"molf {' '.join(arguments[:1])}".strip(), error):
                return _fail(WRONG_INPUT, line)
            return _failed(error)
        except BrokenPipeError:  # the reader of the pipe has ended
            return DONE
        except OutputError as error:
            return _fail(FAILED, f"standard output cannot be written: {error}.")
        except SystemExit as exiting:
            if not isinstance(exiting.__context__, BrokenPipeError):
                raise
            return DONE  # rich turns a broken pipe into SystemExit
        except Exception as error:
            return _failed(error)


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Raise an exception on SIGTERM and SIGHUP, unless they are ignored or handled already."""
    ended = threading.Event()

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _TerminatedError(number, ended)

    names = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python allows handlers in the main thread only
    replaced = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        ended.set()
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _fail(code: int, message: str) -> int:
    say("error", message)
    return code


def _explain(error: CycloptsError) -> str:
    """Return the parser's message; add a reference to `--help` if it suggests no option."""
    message = str(error)
    if isinstance(error, UnusedCliTokensError):
        message = f"Unexpected {' '.join(error.unused_tokens or ())!r}."
    elif isinstance(error, UnknownOptionError) and (longer := _longer(error)):
        return f"{message.split(' Did you mean ')[0]} Did you mean {' or '.join(longer)}?"
    elif not isinstance(error, (UnknownOptionError, MissingArgumentError)):
        return message
    if "Did you mean" in message:
        return message
    chain = error.command_chain or ()
    option = HELP_ALL if chain and chain[0] in EXAMPLES else "--help"
    return f"{message} `{' '.join(('molf', *chain, option))}` lists the options."


def _longer(error: UnknownOptionError) -> list[str]:
    """Return the options that end in an unknown one: --num_train_epochs for --epochs.

    The parser proposes the nearest by letters, which is --report.
    """
    end = "_" + (error.token.keyword or error.token.value).lstrip("-").replace("-", "_")
    names = [name for one in error.argument_collection if one.parse for name in one.names]
    return [name for name in names if name.endswith(end)]


def _failed(error: Exception) -> int:
    """Print the error with the path of its traceback; return the exit code."""
    from molf.job.record.result import RunError, StoppedError
    from molf.job.record.tracebacks import write_traceback

    if isinstance(error, StoppedError):
        say("stopped", str(error))
        return STOPPED
    if isinstance(error, RunError):
        return _fail(FAILED, str(error))
    if (lost := lost_process(error)) is not None:
        return _fail(FAILED, lost)
    return _fail(FAILED, f"{type(error).__name__}: {error} {write_traceback()}")


class _WarningLines:
    """Prints each warning once, as one line without its place in the code."""

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
        # Libraries repeat warnings, once per layer or per step.
        text = one_line(str(message))
        if text not in self._shown:
            self._shown.add(text)
            say("warning", text, file)
