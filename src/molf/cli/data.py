"""`molf data`: show the records of a training without training."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from molf.errors import InputError
from molf.job.settings.settings import DATA, OUTPUT, TrainSettings
from molf.masking import mask_text
from molf.shown import as_line, json_text, printable

if TYPE_CHECKING:
    from molf.tasks.base import DataRecords
    from molf.tasks.preview import PreviewedRecord


def preview_data(
    settings: TrainSettings = TrainSettings(),  # noqa: B008 (frozen)
    *,
    config: Annotated[Path | None, Parameter(group=DATA)] = None,
    jsonl: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False,
    examples: Annotated[int, Parameter(group=OUTPUT)] = 3,
    page: Annotated[Path | None, Parameter(group=OUTPUT, show_default="none")] = None,
) -> None:
    """Show the records of --data as a training would use them: counts, lengths, text with loss.

    The tokenizer and the configuration of the model are read, its weights are not.

    Args:
        settings: The options of `molf train`; those that do not concern the data have no effect.
        config: A YAML file of these options, or a recipe by name; the command line has precedence.
        jsonl: Print every readable record in the file's order as a line of JSON: `index`, `tokens`,
            `loss_tokens`, `segments` ([text, carries loss] pairs); if they apply, `held_out`,
            `validation`, `left_out`, `times` (by weight), `faults`.
        examples: Number of the first examples that are printed.
        page: Also write counts, lengths and up to 200 records, text with loss marked, as a page.
    """
    if examples < 0:
        raise InputError(f"Invalid examples={examples}. Must be at least 0.")
    from molf.job.model.path import check_model
    from molf.job.settings.during import eval_strategy_of
    from molf.job.settings.resolved import resolve
    from molf.report.samples import MOST
    from molf.tasks import load_task
    from molf.tasks.validation import records_with_validation

    place = None
    if page is not None:
        if jsonl:
            raise InputError("page and jsonl are two forms of the records. Give one of them.")
        from molf.report.place import file_of_page

        place = file_of_page(page, overwrite=settings.overwrite, option="page")
    # The output directory is not used, so any time will do.
    resolved = resolve(settings, datetime.now().astimezone())
    check_model(resolved.model)
    # Before torch is imported, so that wrong data is reported at once.
    options = replace(resolved.task_options, preview=True)
    task = load_task(options)
    is_validated = eval_strategy_of(resolved) != "no"
    data = (
        records_with_validation(task, options, load_task) if is_validated else task.data_records()
    )

    from molf.job.libraries import quiet_libraries

    with quiet_libraries():
        from molf.job.model.tokenizer import load_tokenizer_and_limit
        from molf.tasks.preview import preview

        tokenizer, limit = load_tokenizer_and_limit(resolved.model, resolved.max_length)
        if resolved.split_special_tokens:
            tokenizer.split_special_tokens = True
        if jsonl:
            _print_lines(preview(tokenizer, data, limit))
            return
        title = mask_text(f"{resolved.task}: {resolved.data or 'the data of the task'}")
        # To decode the text of every record takes longer than to encode it.
        found = list(preview(tokenizer, data, limit, texts=MOST if place is not None else 0))
        counts = _counts(data, found, limit if resolved.packing else None)
        sys.stdout.write("".join(f"{as_line(line)}\n" for line in (title, *counts)))
        _print_examples(list(preview(tokenizer, _first(data, found, examples), limit)))
        if place is not None:
            from molf.report.data_page import render_data
            from molf.report.place import write_page

            write_page(render_data(title, counts, found), place)
            sys.stdout.write(f"\npage       {as_line(mask_text(str(place)))}\n")


def _print_lines(records: Iterable[PreviewedRecord]) -> None:
    """Print each record as a line of JSON, then warn of texts that differ from the file."""
    faults: Counter[str] = Counter()
    count = 0
    for record in records:
        sys.stdout.write(json_text(record.record()) + "\n")
        # As in a training: the faults of records that are left out do not matter.
        if record.left_out is None:
            faults.update(record.faults)
            count += 1
    sys.stdout.flush()
    for fault, number in faults.items():
        warnings.warn(f"{number} of {count} examples: {fault}.", stacklevel=3)


def _first(data: DataRecords, records: list[PreviewedRecord], count: int) -> DataRecords:
    """Return the data with only its first `count` training records, without those left out."""
    used = {record.index for record in records if record.is_trained_on}
    every = list(dict.fromkeys(data.trained_on))
    indices = [index for index in every if index in used] or every  # all are too long
    return replace(data, samples={index: data.samples[index] for index in indices[:count]})


def _counts(data: DataRecords, records: list[PreviewedRecord], row_length: int | None) -> list[str]:
    """Return the lines of counts; packed into rows of `row_length` tokens, unless it is None."""
    used = [record for record in records if record.is_trained_on]
    fitting = [record for record in records if record.left_out is None]
    held_out = sum(record.held_out for record in fitting)
    validated = sum(record.is_validated for record in fitting)
    left_out = Counter(data.left_out)
    left_out.update(record.left_out for record in records if record.left_out is not None)
    total, again = len(used), sum(record.times - 1 for record in used)
    lines = [
        *([f"format     {', '.join(data.formats)}"] if data.formats else []),
        f"records    {data.count} read: {total} to train on, "
        + (f"{validated} for validation in the training, " if validated else "")
        + f"{held_out} held out to evaluate, {left_out.total()} left out",
        *([f"weights    {total + again} examples in an epoch"] if data.is_weighted else []),
        *(f"left out   {count}: {reason}" for reason, count in left_out.most_common()),
    ]
    if used:
        lengths = sorted(record.tokens for record in used for _ in range(record.times))
        # `quantiles` needs two values; with one, all percentiles are that length.
        cuts = quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else lengths * 19
        tokens, with_loss = sum(lengths), sum(record.loss_tokens * record.times for record in used)
        lines += [
            f"tokens     {tokens:,} to train on; per example at least {lengths[0]}, median "
            f"{cuts[9]:.0f}, 95th percentile {cuts[18]:.0f}, at most {lengths[-1]}",
            f"loss       on {with_loss:,} of {tokens:,} tokens ({with_loss / tokens:.1%})",
        ]
    if used and row_length is not None:
        from molf.data.packing import pack  # imports TRL

        rows = len(pack(lengths, row_length))
        lines.append(
            f"packed     {len(lengths):,} examples into {rows:,} rows of at most {row_length:,} "
            f"tokens ({tokens / (rows * row_length):.0%} filled)"
        )
    faults = Counter(fault for record in fitting for fault in record.faults)
    lines += [f"doubtful   {count} of {len(fitting)}: {fault}" for fault, count in faults.items()]
    return lines


def _print_examples(records: list[PreviewedRecord]) -> None:
    for record in records:
        parts = (f"[[{part}]]" if loss else part for part, loss in record.segments)
        # Line breaks stay, so that a chat reads as the model sees it.
        text = printable("".join(parts))
        state = f", {record.state}" if record.state else ""
        sys.stdout.write(
            f"\nrecord {record.index}, {record.tokens} tokens{state}; [[text]] carries loss:\n"
            f"{text}\n"
        )
