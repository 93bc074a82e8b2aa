"""The error for wrong user input, and the reasons of other errors for messages."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: one line with the given value and the allowed ones.

    Raised before anything is downloaded, trained or written. The command line prints the message
    without a traceback and exits with code 2.
    """


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def system_reason(error: BaseException) -> str:
    """Return the system's reason of an `OSError`, without path and number; else `reason_of`."""
    return getattr(error, "strerror", None) or reason_of(error)
