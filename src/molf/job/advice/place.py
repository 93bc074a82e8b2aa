"""Check where an assignment and its figures go, before torch is imported, and write it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from molf.disk.files import write_text
from molf.disk.room import check_writable, nearest_existing
from molf.errors import InputError, system_reason
from molf.inputs import check_installed, special_kind
from molf.job.record.finished_run import FinishedRun
from molf.job.record.ownership import ASSIGNMENT
from molf.paths import check_path, check_unicode, settled

if TYPE_CHECKING:
    from molf.core.assignment.assignment import Assignment


def advice_place(run: FinishedRun, output: Path | None, *, overwrite: bool) -> Path:
    """Return the file for an assignment, after checking that it can be written.

    Args:
        run: The run that is read.
        output: The file; None for `assignment.yaml` in the run, which may exist.
        overwrite: Replace an earlier file.

    Raises:
        InputError: `output` exists, is no ordinary file, or cannot be written.
    """
    path = run.path / ASSIGNMENT if output is None else settled(output)
    if output is not None or overwrite or not path.is_file():
        check_file(path, overwrite=overwrite)
    return path


def check_file(path: Path, *, overwrite: bool, option: str = "output") -> None:
    """Check that the file of an option can be written.

    Args:
        path: The file.
        overwrite: Replace an earlier file.
        option: The option.

    Raises:
        InputError: The file exists, is no ordinary one, or cannot be written.
    """
    check_path(path, option)
    if (kind := special_kind(path)) is not None:
        raise InputError(f"{option} {path} is {kind}. Give a file.")
    if path.exists() and not overwrite:
        raise InputError(
            f"{option} {path} exists. Give --overwrite to replace it, or another --{option}."
        )
    if not path.parent.is_dir():
        raise InputError(f"{option} {path} cannot be written: there is no directory {path.parent}.")
    check_writable(path.parent, f"{option} {path}")


def check_figures(folder: Path) -> None:
    """Check that figures can be drawn and written.

    Raises:
        InputError: matplotlib is not installed, or the folder is none or cannot be written.
    """
    check_installed("matplotlib", "figures")
    folder = settled(folder)
    check_path(folder, "figures")
    check_unicode(folder, "figures")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"figures {folder} is a file. Give a folder.")
    check_writable(nearest_existing(folder.absolute()), f"figures {folder}")


def check_distinct(**places: Path | None) -> None:
    """Check that no two options have one path.

    Args:
        **places: The path of each option; None for none.

    Raises:
        InputError: Two have.
    """
    seen: dict[Path, str] = {}
    for option, path in places.items():
        other = option if path is None else seen.setdefault(settled(path).absolute(), option)
        if other != option:
            raise InputError(f"{option} and {other} are one file, {path}. Give two.")


def kept_assignment(assignment: Assignment, path: Path) -> str:
    """Return a line about a file that is kept: whether it has this assignment."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if text == assignment.to_yaml():
        return f"kept      {path}, which is this assignment"
    return f"kept      {path}, which differs: --overwrite replaces it"


def write_assignment(assignment: Assignment, path: Path) -> None:
    """Write the file.

    Raises:
        InputError: It cannot be written.
    """
    try:
        write_text(path, assignment.to_yaml())
    except OSError as error:
        raise InputError(f"output {path} cannot be written: {system_reason(error)}.") from error
