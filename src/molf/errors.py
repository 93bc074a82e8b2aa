"""The one error that means: the user's input is wrong."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: one line with what was given and what is allowed.

    The command line prints it without a traceback and exits with code 2. It is raised before
    anything is downloaded, trained or written.
    """
