"""Write tracebacks to files, so that a failed command prints one line with the path."""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path

from molf.disk.files import replacing_file
from molf.job.record.directory import RunDirectory
from molf.job.record.ownership import ERROR_LOG
from molf.masking import mask_text
from molf.shown import printable


def write_traceback(directory: RunDirectory | None = None) -> str:
    """Write the current traceback to a file.

    Args:
        directory: The run that failed; None without one.

    Returns:
        Its path in brackets, for a message: in the run's directory, else in the system's temporary
        folder. If both fail, the reason.
    """
    # A traceback quotes arguments, which may hold tokens.
    text = printable(mask_text(traceback.format_exc()))
    try:
        if directory is not None:
            return f"(traceback: {_write(directory / ERROR_LOG, text)})"
    except OSError:
        pass  # such as a full disk; the temporary folder may be on another
    try:
        descriptor, name = tempfile.mkstemp(prefix="molf-error-", suffix=".log")
        os.close(descriptor)
        return f"(traceback: {_write(Path(name), text)})"
    except OSError as error:
        return f"(its traceback could not be written: {error.strerror})"


def _write(path: Path, text: str) -> Path:
    with replacing_file(path) as temporary:  # atomic: no partial file on a full disk
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path
