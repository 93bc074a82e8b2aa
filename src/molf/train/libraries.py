"""Keeping the libraries' own chatter away from the user's screen."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from molf.masking import mask_text

_LIBRARIES = r"(torch|transformers|trl|peft|accelerate|datasets|huggingface_hub)\b"

# They log, as warnings, which kernels of theirs this machine has not, and every cast.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turn off the libraries' progress bars and usage reports, and what they say to each other.

    Their log shows no secrets.

    A deprecation of one library's name that another library uses is nothing a user can act on.
    """
    # TRL reports every training to the Hub unless told not to; read when the library is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from datasets.utils import logging as datasets_bars
    from transformers.utils import logging as transformers_bars

    talking = {name: logging.getLogger(name).level for name in _TALKATIVE}
    for name in talking:
        logging.getLogger(name).setLevel(logging.ERROR)
    shown = [bars for bars in (datasets_bars, transformers_bars) if bars.is_progress_bar_enabled()]
    for bars in shown:
        bars.disable_progress_bar()
    make_record = logging.getLogRecordFactory()

    def make_masked(*given: Any, **options: Any) -> logging.LogRecord:
        record = make_record(*given, **options)
        with suppress(TypeError, ValueError):  # a message that does not fit its arguments
            record.msg, record.args = mask_text(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(make_masked)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
            yield
    finally:
        logging.setLogRecordFactory(make_record)
        for bars in shown:
            bars.enable_progress_bar()
        for name, level in talking.items():
            logging.getLogger(name).setLevel(level)
