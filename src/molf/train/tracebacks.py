"""Tracebacks in files: a failed command says one line, and where the rest is."""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path

from molf.masking import mask_text
from molf.shown import printable
from molf.train.files import replacing_file
from molf.train.ownership import ERROR_LOG
from molf.train.run_directory import RunDirectory


def write_traceback(directory: RunDirectory | None = None) -> str:
    """Write the current traceback to a file.

    Args:
        directory: The run that failed; None without one.

    Returns:
        Where it is, in brackets, as a part of a message: in the run's directory, or else in the
        system's place for temporary files. Where that is full as well, why there is none.
    """
    text = printable(mask_text(traceback.format_exc()))
    try:
        if directory is not None:
            return f"(traceback: {_write(directory / ERROR_LOG, text)})"
    except OSError:
        pass  # such as a full disk; the system's may be another
    try:
        descriptor, name = tempfile.mkstemp(prefix="molf-error-", suffix=".log")
        os.close(descriptor)
        return f"(traceback: {_write(Path(name), text)})"
    except OSError as error:
        return f"(its traceback could not be written: {error.strerror})"


def _write(path: Path, text: str) -> Path:
    with replacing_file(path) as temporary:  # not a part of it, on a full disk
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path
