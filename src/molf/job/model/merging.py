"""Merge the trained adapter into the plain model that is saved, and report the error."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel

from molf.core.model.merge import MergeReport, merge
from molf.core.model.quantised import is_quantised
from molf.job.methods import TrainingData
from molf.job.model.loading import load_model
from molf.job.progress import Reporter
from molf.job.settings.resolved import ResolvedSettings

_SAMPLE_TOKENS = 512


def merge_trained(
    model: Any, settings: ResolvedSettings, data: TrainingData, reporter: Reporter
) -> tuple[Any, dict[str, Any]]:
    """Merge the adapter in float32, and report the change of a training example's logits.

    Returns:
        The plain model, and the record of the merge. A model without an adapter is returned
        unchanged, with an empty record.
    """
    base = settings.merge_base  # None without a quantised base
    # Merging in bfloat16 would lose small changes.
    if base is None and isinstance(model, PeftModel):
        model.float()
    elif base is not None:
        for parameter in model.parameters():
            if not is_quantised(parameter):
                parameter.data = parameter.data.float()
    reports: list[MergeReport] = []
    # The training does not keep the unquantised weights in memory.
    original = load_model(settings.model).model if base == "original" else None
    # The first training example: it has the template and the language of the task.
    sample = torch.tensor([data.samples.input_ids[0][:_SAMPLE_TOKENS]])
    plain = merge(model, base=base, original=original, sample=sample, report=reports.append)
    record: dict[str, Any] = {}
    for report in reports:
        reporter.say(str(report))
        record = {name: value for name, value in asdict(report).items() if value is not None}
    return plain, record
