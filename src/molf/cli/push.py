"""`molf push`: options, and the list of an upload."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from molf.cli.export import KINDS
from molf.masking import mask_given
from molf.shown import as_line, counted, printable
from molf.streams import result_on_disk

if TYPE_CHECKING:
    from molf.job.push import Upload


def push_run(
    run: Path,
    repo: str,
    /,
    *,
    what: Annotated[str, Parameter(choices=KINDS)] = "model",
    private: Annotated[bool, Parameter(negative=())] = False,
    revision: Annotated[str | None, Parameter(show_default="main")] = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Upload the model of a run, or its adapter, to a repository of the Hugging Face Hub.

    Args:
        run: Directory of a run of `molf train` that has ended.
        repo: OWNER/NAME; made if missing.
        what: The merged model, or the adapter.
        private: Make the repository private; one that is public is refused.
        revision: Branch; made if missing.
        dry_run: Print the files with their bytes, and the card; no token and no network.
    """
    from molf.job.push import hub_token, plan_upload, push
    from molf.job.record.finished_run import read_run

    finished = read_run(run)
    with finished.reading():
        upload = plan_upload(finished, repo, what, private=private, revision=revision)
        if dry_run:
            sys.stdout.write(describe(upload))
            return
        token = hub_token()
        from molf.job.progress import make_reporter

        make_reporter().say(f"Uploading {_total(upload)} to {upload.repo}")
        address = push(upload, token)
    with result_on_disk(f"The push to {address} is complete"):
        sys.stdout.write(f"{as_line(address)}\n")


def describe(upload: Upload) -> str:
    """Return the lines of a dry run: place, files, and the card."""
    from huggingface_hub import constants

    place = f"{constants.ENDPOINT}/{upload.repo}"
    private = " (private)" if upload.is_private else ""
    width = max(len(f"{size:,}") for _, size in upload.files)
    lines = [
        f"{place}{private}, branch {upload.revision}: {_total(upload)} from {upload.folder}",
        *(f"  {size:>{width},}  {name}" for name, size in upload.files),
    ]
    shown = "".join(f"{as_line(mask_given(line))}\n" for line in lines)
    if upload.card is None:
        return f"{shown}No README.md: the repository gets no card.\n"
    return f"{shown}README.md:\n{printable(upload.card).rstrip()}\n"


def _total(upload: Upload) -> str:
    return f"{counted(len(upload.files), 'file')} ({upload.size:,} bytes)"
