"""Upload the model or the adapter of a run, with its card, to a repository of the Hub."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from molf.errors import InputError, reason_of
from molf.job.libraries import no_usage_reports
from molf.job.model.path import check_entries
from molf.job.record.finished_run import FinishedRun
from molf.job.record.ownership import ADAPTER, EVALUATION, read_json
from molf.job.record.result import RunError
from molf.masking import learn, mask_given
from molf.masking.shapes import mask_shapes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_MAIN = "main"
_REFUSED = (401, 403, 404)  # HTTP: no valid token, no right to write, hidden from this user
_CLIENT = r"(huggingface_hub|httpx2?)\b"
# Of larger ones only vocabularies are text.
_MOST_TEXT = 2**20
_TEXTS = (".json", ".jinja", ".md", ".txt", ".yaml")


class PushError(RunError):
    """An upload failed on the way; one line with its cause."""


@dataclass(frozen=True)
class Upload:
    """The files of an upload, and where they go.

    Attributes:
        folder: The directory of the files, `model/` or `adapter/` of a run.
        files: Path in the repository and bytes of each file.
        repo: `name` or `owner/name`.
        is_private: Whether the repository must be private.
        revision: The branch, or a reference such as `refs/pr/1`.
        title: Title of the commit.
    """

    folder: Path
    files: tuple[tuple[str, int], ...]
    repo: str
    is_private: bool
    revision: str
    title: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    @property
    def card(self) -> str | None:
        """The text of the model card; None if the user deleted it."""
        path = self.folder / CARD
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def plan_upload(
    run: FinishedRun,
    repo: str,
    what: str = "model",
    *,
    private: bool = False,
    revision: str | None = None,
) -> Upload:
    """Return the upload of a run, after all checks that need neither a token nor the network.

    Args:
        run: The run.
        repo: `name` or `owner/name`.
        what: `model` or `adapter`.
        private: Whether the repository must be private.
        revision: A branch, made if missing; None for `main`.

    Raises:
        InputError: The run is a probe, has not ended or lacks the part; the name of the repository
            is not allowed; or a file holds a secret.
    """
    no_usage_reports()
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import (
        DEFAULT_IGNORE_PATTERNS,
        filter_repo_objects,
        validate_repo_id,
    )

    run.check(what)
    if not (run.path / EVALUATION).is_file():
        raise InputError(
            f"{run.path} has no {EVALUATION}: the run has not ended, so its card has no metrics. "
            f"molf train --resume --output_dir {run.path} ends it."
        )
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"Invalid repo={repo!r}. Must be OWNER/NAME or NAME: {error}") from error
    if revision is not None and not revision.strip():
        raise InputError(f"Invalid revision={revision!r}. Must be the name of a branch.")
    folder = run.path / what
    check_entries(folder, what)
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    # As `upload_folder` does: caches and .git are left out.
    names = list(filter_repo_objects(found, ignore_patterns=list(DEFAULT_IGNORE_PATTERNS)))
    for name in names:
        _check_text(found[name])
    if what == ADAPTER:
        _warn_of_local_base(folder)
    return Upload(
        folder=folder,
        files=tuple((name, found[name].stat().st_size) for name in names),
        repo=repo,
        is_private=private,
        revision=_MAIN if revision is None else revision,
        title=f"Upload {what} of {run.path.resolve().name} by molf {version('molf')}",
    )


def hub_token() -> str:
    """Return the token of the Hub, from the environment or from `hf auth login`.

    Raises:
        InputError: There is none, or the network is turned off.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, and a push needs the Hub. Unset it.")
    token = get_token()
    if not token:
        raise InputError("There is no token of the Hub. Run `hf auth login`, or set HF_TOKEN.")
    learn({"token": token})  # messages of libraries may quote it
    return token


def push(upload: Upload, token: str) -> str:
    """Upload the files in one commit, or several if they are many, and return the address.

    The repository and the branch are made if missing. The client of the Hub retries.

    Args:
        upload: The result of `plan_upload`.
        token: The result of `hub_token`.

    Raises:
        InputError: The token is wrong or has no right to write there, or a public repository exists
            where a private one is wanted. Nothing was uploaded.
        PushError: The Hub cannot be reached, or the upload failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token, library_name="molf", library_version=version("molf"))
    try:
        with _quiet_client():
            return _send(upload, api)
    except InputError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        kind = InputError if status in _REFUSED else PushError
        raise kind(_failed(upload, error)) from error
    except Exception as error:  # its type depends on the HTTP library of the client
        raise PushError(_failed(upload, error)) from error


def _send(upload: Upload, api: HfApi) -> str:
    """Make repository and branch if missing, upload the files, and return the address.

    Raises:
        InputError: A public repository exists where a private one is wanted.
    """
    branch = upload.revision
    url = api.create_repo(upload.repo, private=upload.is_private or None, exist_ok=True)
    # The Hub ignores `private` where the repository exists.
    if upload.is_private and not api.repo_info(url.repo_id).private:
        raise InputError(
            f"{url.repo_id} exists and is public, so private has no effect. Make it private on its "
            "page, give another repository, or leave private out."
        )
    if branch != _MAIN and not branch.startswith("refs/"):
        api.create_branch(url.repo_id, branch=branch, exist_ok=True)
    api.upload_folder(
        repo_id=url.repo_id,
        folder_path=upload.folder,
        commit_message=upload.title,
        revision=None if branch == _MAIN else branch,
    )
    return str(url) if branch == _MAIN else f"{url}/tree/{branch}"


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Turn off the client's bars where there is no terminal, and warnings that it causes."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hides = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=_CLIENT)
            yield
    finally:
        if hides:
            enable_progress_bars()


def _failed(upload: Upload, error: Exception) -> str:
    return f"The push to {upload.repo} failed: {reason_of(error).rstrip('.')}."


def _check_text(path: Path) -> None:
    """Check that a text file has no secret.

    Raises:
        InputError: It has one.
    """
    if path.suffix not in _TEXTS or path.stat().st_size > _MOST_TEXT:
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    if mask_shapes(mask_given(text)) != text:
        raise InputError(
            f"{path} holds a token, a private key or a secret of this process's environment. "
            "Remove it from the file; nothing was uploaded."
        )


def _warn_of_local_base(folder: Path) -> None:
    """Warn that PEFT will not find the base of an adapter whose base is a local directory."""
    config = read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if isinstance(base, str) and Path(base).is_dir():
        warnings.warn(
            f"adapter_config.json names the base by a path of this machine, {base}: others must "
            "load the base themselves.",
            stacklevel=3,
        )
