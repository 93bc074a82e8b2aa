"""The model card that a saved checkpoint carries: how it was made and how it measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from molf.evaluate import Evaluation, Metric
from molf.train.defaults import SUMMARIES
from molf.train.resolved import ResolvedSettings
from molf.train.saved_text import show_saved
from molf.train.secrets import mask

if TYPE_CHECKING:  # it imports torch, and wrong input must be found without
    from molf.core.quantised import Quantisation


def model_card(
    settings: ResolvedSettings,
    task: Mapping[str, Any],
    before: Evaluation,
    after: Evaluation | None,
    *,
    routing: str = "",
    saved: Mapping[str, Any] | None = None,
) -> str:
    """Return the card's text.

    Args:
        settings: The run's settings.
        task: The task's description.
        before: Metrics of the base model.
        after: Metrics of the saved model; None while it has not been measured.
        routing: Which experts won and what that comes to, in words; empty without routing.
        saved: How much of the training was saved; None while that is not known.
    """
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": sorted({"molf", settings.method}),
    }
    base = settings.model
    if Path(base).is_dir():
        base = Path(base).name
    else:
        front["base_model"] = base
    name = settings.output_dir.name
    options = mask(settings.as_options())
    shown = {key: value for key, value in options.items() if value not in (None, "", [], {})}
    card = "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            f"# {name}",
            "",
            f"`{base}` fine-tuned on the task `{task['name']}` with {SUMMARIES[settings.method]}. "
            "Trained with molf; loads with transformers alone.",
            "",
            "## Metrics",
            "95% intervals in brackets.",
            "",
            "| metric | before | after | count |",
            "|---|---|---|---|",
            *(_metric_row(name, metric, after) for name, metric in before.metrics.items()),
            "",
            *(("## Routing", routing, "") if routing else ()),
            *([f"Saved in {shown_saved}.", ""] if (shown_saved := show_saved(saved)) else []),
            "## Settings",
            "```yaml",
            yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip(),
            "```",
            "",
            "## Data",
            "```yaml",
            yaml.safe_dump(mask(dict(task)), sort_keys=False, allow_unicode=True).strip(),
            "```",
            "",
        ]
    )
    # A card is published with its model: it names files, and not where they were.
    places = (settings.model, settings.data, settings.eval_data, settings.forgetting_data)
    for place in (*places, options["output_dir"]):
        if place and Path(place).is_absolute():
            card = card.replace(place, Path(place).name)
    return card


def adapter_card(settings: ResolvedSettings, quantisation: Quantisation | None) -> str:
    """Return the text of the card that a saved adapter carries.

    Args:
        settings: The run's settings.
        quantisation: How the base beside it was quantised.
    """
    base = settings.model
    front: dict[str, Any] = {"library_name": "peft", "tags": ["molf"]}
    if Path(base).is_dir():
        base = Path(base).name
    else:
        front["base_model"] = base
    beside = f" beside the base in {quantisation.bits} bits" if quantisation else ""
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            f"# {settings.output_dir.name}: adapter",
            "",
            f"For `{base}`, trained on the task `{settings.task}`{beside} with molf, "
            f"method `{settings.method}`. Loads with PEFT alone. `model/` of the same run has the "
            "merged model and its measurements.",
            "",
        ]
    )


def _metric_row(name: str, before: Metric, after: Evaluation | None) -> str:
    now = after.metrics.get(name) if after is not None else None
    return f"| {name} | {show_metric(before)} | {show_metric(now)} | {before.count} |"


def show_metric(metric: Metric | None) -> str:
    """Return a value with its interval, where that is known."""
    if metric is None:
        return "-"
    if math.isnan(metric.low):
        return f"{metric.value:.3f}"
    return f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"
