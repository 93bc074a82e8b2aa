"""Turn off progress bars, usage reports and irrelevant warnings of libraries."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from molf.masking import mask_text
from molf.ranks import launched_rank

_LIBRARIES = (
    r"(torch|transformers|trl|peft|accelerate|datasets|huggingface_hub|"
    r"wandb|mlflow|sqlalchemy|trackio)\b"
)

# They log each missing kernel and each cast as a warning.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")
_NO_REPORTS = "HF_HUB_DISABLE_TELEMETRY"
# Of trackers; W&B reports its errors also in offline mode.
_NO_REPORTS_OF_TRACKERS = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
_REPEATED = ("transformers", "datasets", "accelerate", "trl", "peft")


def no_usage_reports() -> None:
    """Turn off usage reports of Hugging Face's libraries and of trackers in this process.

    TRL reports each trainer to the Hub. Values of the variables that are set already stay.
    """
    for name, off in _NO_REPORTS_OF_TRACKERS.items():
        os.environ.setdefault(name, off)
    value = os.environ.setdefault(_NO_REPORTS, "1")
    from huggingface_hub import constants

    # The client reads the variable when it is imported, which may have been before.
    if value.upper() in ("1", "ON", "YES", "TRUE"):
        constants.HF_HUB_DISABLE_TELEMETRY = True


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turn off libraries' progress bars, usage reports and deprecation warnings in the block.

    Secrets in their log messages are masked.
    """
    no_usage_reports()
    from datasets.utils import logging as datasets_bars
    from transformers.utils import logging as transformers_bars

    # Of several processes, rank 0 shows the warnings of all.
    quiet = (*_TALKATIVE, *(_REPEATED if launched_rank() else ()))
    talking = {name: logging.getLogger(name).level for name in quiet}
    for name in talking:
        logging.getLogger(name).setLevel(logging.ERROR)
    shown = [bars for bars in (datasets_bars, transformers_bars) if bars.is_progress_bar_enabled()]
    for bars in shown:
        bars.disable_progress_bar()
    make_record = logging.getLogRecordFactory()

    def make_masked(*given: Any, **options: Any) -> logging.LogRecord:
        record = make_record(*given, **options)
        with suppress(TypeError, ValueError):  # the format does not match the arguments
            record.msg, record.args = mask_text(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(make_masked)
    try:
        with warnings.catch_warnings():
            # They concern calls from one library to another, which a user cannot change.
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
            yield
    finally:
        logging.setLogRecordFactory(make_record)
        for bars in shown:
            bars.enable_progress_bar()
        for name, level in talking.items():
            logging.getLogger(name).setLevel(level)
