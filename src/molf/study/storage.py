"""The database of a study: Optuna's storage in a SQLite file or at an address."""

from __future__ import annotations

import secrets
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from molf.disk.files import write_first
from molf.errors import InputError
from molf.job.record.result import RunError
from molf.shown import counted
from molf.study.definition import Study
from molf.study.outcome import RESULTS, Results

if TYPE_CHECKING:
    from collections.abc import Iterator

STORAGE = "optuna.sqlite"
_ID = ".storage-id"
_ATTEMPTS = 5
_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_LOCKED_SECONDS = 60  # that SQLite waits for another process's transaction


class StorageError(RunError):
    """The storage failed while the study ran; one line."""


def storage_address(study: Study) -> str:
    """Return the address of the study's storage."""
    if study.storage is None:
        return f"sqlite:///{(study.output_dir / STORAGE).absolute()}"
    scheme, separator, rest = study.storage.partition("://")
    # SQLAlchemy's default driver is psycopg2; the extra installs its successor.
    return f"{_DRIVERS.get(scheme, scheme)}{separator}{rest}"


def storage_file(study: Study) -> Path:
    """Return the path of the SQLite file of a study without an address of a storage."""
    return study.output_dir / STORAGE


def stored_name(study: Study) -> str:
    """Return the name of a study in its storage.

    At an address it ends with an identity of the study's directory, which is written there once.
    Studies of one name in other directories have trials of their own there.
    """
    if study.storage is None:
        return study.name
    path = study.output_dir / _ID
    if not path.is_file():
        write_first(path, f"{secrets.token_hex(4)}\n")
    return f"{study.name}-{path.read_text(encoding='utf-8').strip()}"


def gone(study: Study) -> str:
    """Return a sentence about a deleted SQLite file and the remaining files of the study."""
    count = len(Results(study).refresh().by_key)
    if count == 0:
        return (
            f"There is neither the storage {storage_file(study)} nor a finished trial: the study "
            "has not started, or its files were deleted. `molf study run` starts it."
        )
    return (
        f"The storage {storage_file(study)} is gone. {counted(count, 'finished trial')} in "
        f"{study.output_dir / RESULTS} {'is' if count == 1 else 'are'} left. `molf study run` goes "
        "on with them and repeats none."
    )


def open_storage(study: Study) -> Any:
    """Return Optuna's storage of a study, with heart-beats; its tables are made if it has none.

    Raises:
        InputError: optuna or a driver is not installed, or the storage cannot be opened.
    """
    optuna = _optuna()
    address = storage_address(study)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if address.startswith("sqlite"):
        options["connect_args"] = {"timeout": _LOCKED_SECONDS}

    def connect() -> Any:
        with _creating(study):
            return optuna.storages.RDBStorage(
                address,
                engine_kwargs=options,
                heartbeat_interval=study.heartbeat,
                grace_period=3 * study.heartbeat,
            )

    try:
        return _again_if_made_elsewhere(connect)
    except ImportError as error:
        raise InputError(
            f"The storage {_shown(address)} needs a driver that is not installed: {error}. "
            "Run: pip install 'molf[study]'."
        ) from error
    except Exception as error:
        raise InputError(
            f"The storage {_shown(address)} cannot be opened: {_cause(error)}."
        ) from error


def check_opens(study: Study) -> None:
    """Check that a storage that exists already can be opened, before anything is written.

    Raises:
        InputError: It cannot.
    """
    if study.storage is not None or storage_file(study).is_file():
        open_storage(study)


@contextmanager
def _creating(study: Study) -> Iterator[None]:
    """Let one process at a time make the tables of a SQLite file."""
    if study.storage is not None:
        yield
        return
    with FileLock(study.output_dir / f".{STORAGE}.lock", timeout=_LOCKED_SECONDS):
        yield


@contextmanager
def failing(study: Study) -> Iterator[None]:
    """Turn errors of the storage in the block into one line.

    Raises:
        StorageError: The storage failed.
    """
    try:
        yield
    except storage_errors() as error:
        check_present(study)
        raise StorageError(
            f"The storage {_shown(storage_address(study))} failed: {_cause(error)}. Finished "
            "trials are kept; start again when it is reachable."
        ) from error


def storage_errors() -> tuple[type[Exception], ...]:
    """Return the types of the errors that Optuna raises if its storage fails."""
    import optuna
    import sqlalchemy.exc

    return optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError


@contextmanager
def signs_of_life(study: Study, storage: Any, trial: int) -> Iterator[None]:
    """Record a heart-beat of a trial, and further ones while the block runs.

    Args:
        study: The study.
        storage: Optuna's storage of it.
        trial: The trial's number in the storage.
    """
    # At once: a trial whose worker dies before the first one is never stale, and runs for ever.
    storage.record_heartbeat(trial)
    ended = threading.Event()

    def record() -> None:
        while not ended.wait(study.heartbeat):
            # The block's next access raises if the storage still fails.
            with suppress(*storage_errors()):
                storage.record_heartbeat(trial)

    thread = threading.Thread(target=record, daemon=True)  # interrupted before `try`, it never ends
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def check_present(study: Study) -> None:
    """Check that a storage file is still there.

    Raises:
        StorageError: It was deleted.
    """
    if study.storage is None and not storage_file(study).is_file():
        raise StorageError(gone(study))


def _again_if_made_elsewhere(connect: Callable[[], Any]) -> Any:
    """Connect; again after a moment if another worker was making the tables of a new database."""
    import sqlalchemy.exc

    for attempt in range(_ATTEMPTS):
        try:
            return connect()
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(1 + attempt)
    raise AssertionError(attempt)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "Studies need optuna, which is not installed. Run: pip install 'molf[study]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _shown(address: str) -> str:
    """Return an address without its password."""
    from sqlalchemy.engine import make_url

    try:
        return make_url(address).render_as_string(hide_password=True)
    except Exception:  # not an address
        return address.split("@")[-1]


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().split("\n")
    return lines[0].rstrip(".") or type(error).__name__
