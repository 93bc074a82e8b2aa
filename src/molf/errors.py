"""The error for wrong user input."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: one line with the given value and the allowed ones.

    Raised before anything is downloaded, trained or written. The command line prints the message
    without a traceback and exits with code 2.
    """
