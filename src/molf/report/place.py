"""Check where a page goes, and write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from molf.disk.files import replacing_file
from molf.errors import InputError, system_reason
from molf.job.advice.place import check_file
from molf.job.record.ownership import REPORT
from molf.masking import mask_given
from molf.paths import settled

_MARK = b'<meta name="generator" content="molf '
_HEAD = 2000  # bytes of a page that have the mark


def page_place(runs: Sequence[Path], output: Path | None, *, overwrite: bool) -> Path:
    """Return the file of the page, after checking that it can be written.

    Args:
        runs: The directories of the runs.
        output: The file; None for `report.html` in the directory of a single run.
        overwrite: Replace a file that is no page of molf.

    Raises:
        InputError: The file is no page of molf, is no ordinary file, or cannot be written; or there
            are several runs and no file is given.
    """
    if output is None and len(runs) != 1:
        raise InputError(f"{len(runs)} runs on one page need --output FILE.")
    return file_of_page(runs[0] / REPORT if output is None else output, overwrite=overwrite)


def file_of_page(given: Path, *, overwrite: bool, option: str = "output") -> Path:
    """Return the file of a page, after checking that it can be written.

    Args:
        given: The file.
        overwrite: Replace a file that is no page of molf.
        option: The option that gave it.

    Raises:
        InputError: The file is no page of molf, is no ordinary file, or cannot be written.
    """
    path = settled(given)
    check_file(path, overwrite=overwrite or is_page(path), option=option)
    return path


def is_page(path: Path) -> bool:
    """Return whether a file is a page that molf wrote."""
    try:
        with path.open("rb") as file:
            return _MARK in file.read(_HEAD)
    except (OSError, ValueError):
        return False


def write_page(html: str, path: Path) -> None:
    """Write a page atomically, with secrets of this process masked.

    Raises:
        InputError: It cannot be written.
    """
    try:
        with replacing_file(path) as temporary:
            # Not all masking: the page has scripts, and texts of the files are masked already.
            temporary.write_text(mask_given(html), encoding="utf-8")
    except OSError as error:
        raise InputError(f"output {path} cannot be written: {system_reason(error)}.") from error
