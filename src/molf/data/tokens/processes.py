"""Examples encoded by several processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any

from molf.data.encoding import PART, EncodedSamples, Show, encode_part, joined
from molf.data.samples import Sample
from molf.errors import InputError, reason_of

# macOS has forks, but some of its libraries do not work after one.
_START = "fork" if sys.platform == "linux" else "spawn"
_PAUSE = 0.2  # seconds
_PARALLEL = "TOKENIZERS_PARALLELISM"  # read by the tokenizers library


def encode_in_processes(
    tokenizer: Any, samples: Sequence[Sample], max_length: int, processes: int, show: Show
) -> EncodedSamples:
    """Encode samples as `molf.data.encoding.encode_samples` does, with the same result.

    Args:
        tokenizer: A fast tokenizer with an EOS token.
        samples: The samples.
        max_length: Longest sample in tokens.
        processes: Number of processes, at most one for every `PART` samples.
        show: Called with the number of samples that are done, and that of all.

    Raises:
        InputError: As in `encode_samples`, or a process cannot be started or was killed.
    """
    starts = range(0, len(samples), PART)
    context = get_context(_START)
    ended = context.Event()
    with _serial_tokenizers(), warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. The processes use no lock of another thread.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        pool = ProcessPoolExecutor(
            min(processes, len(starts)),
            context,
            initializer=_begin,
            initargs=(tokenizer, samples, max_length, ended),
        )
        try:
            return joined(_shown(pool.map(_encode, starts), len(samples), show), max_length)
        except BrokenProcessPool as error:
            raise InputError(
                "A process that tokenizes was killed; a common reason is too little memory. Give a "
                "smaller --dataset_num_proc."
            ) from error
        except BaseException as error:  # an interrupt does not wait for the parts in work
            ended.set()
            if isinstance(error, OSError):  # of a fork: too little memory, or a limit
                raise InputError(
                    f"The processes that tokenize cannot be started: {reason_of(error)}. Give a "
                    "smaller --dataset_num_proc."
                ) from error
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _shown(parts: Iterator[EncodedSamples], total: int, show: Show) -> Iterator[EncodedSamples]:
    done = 0
    for part in parts:
        show(done, total)
        done += len(part.kept) + part.left_out
        yield part


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Keep the tokenizers library from starting threads in each process."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = before


# Of a process that encodes.
_given: tuple[Any, Sequence[Sample], int] | None = None


def _begin(tokenizer: Any, samples: Sequence[Sample], max_length: int, ended: Any) -> None:
    global _given
    _given = tokenizer, samples, max_length
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to the parent as well, which ends this one
    threading.Thread(target=_end_with_parent, args=(ended,), daemon=True).start()


def _end_with_parent(ended: Any) -> None:
    """End this process if the parent has an error, or is killed and cannot end it."""
    parent = parent_process()
    assert parent is not None
    while not ended.is_set() and not connection.wait([parent.sentinel], _PAUSE):
        pass
    os._exit(1)


def _encode(start: int) -> EncodedSamples:
    assert _given is not None
    tokenizer, samples, max_length = _given
    return encode_part(tokenizer, samples[start : start + PART], max_length)
