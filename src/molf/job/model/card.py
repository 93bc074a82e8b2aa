"""Write the model cards of saved checkpoints and adapters: settings, data and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.job.model.saved_text import show_saved
from molf.job.record.markdown import code, front_matter, yaml_block
from molf.job.settings.defaults import SUMMARIES
from molf.job.settings.resolved import ResolvedSettings
from molf.masking import mask, mask_text
from molf.measure import Evaluation, Metric
from molf.shown import map_texts

if TYPE_CHECKING:  # imports torch, which must not delay errors of wrong input
    from molf.core.model.quantised import Quantisation


def model_card(
    settings: ResolvedSettings,
    task: Mapping[str, Any],
    before: Evaluation,
    after: Evaluation | None,
    *,
    routing: str = "",
    saved: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a model's card.

    Args:
        settings: The run's settings.
        task: The task's description.
        before: Metrics of the base model.
        after: Metrics of the saved model; None before it is measured.
        routing: Shares of the experts and their interpretation; empty without routing.
        saved: The record of the saved model; None before it is measured.
    """
    # The Hub reads the front matter: which library loads the model, and which base it has.
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": sorted({"molf", settings.method}),
        **_base_model(settings),
    }
    options = settings.as_options()
    # A card is published with its model, so it has the names of files but not their folders.
    named = ("model", "data", "eval_data", "forgetting_data", "assignment", "output_dir")
    places = [
        options[name] for name in named if options[name] and Path(options[name]).is_absolute()
    ]
    # The longest first: one path may be inside another.
    places.sort(key=len, reverse=True)
    shown = {key: value for key, value in options.items() if value not in (None, "", [], {})}
    return "\n".join(
        [
            front_matter(front),
            f"# {code(settings.output_dir.name)}",
            "",
            f"{code(_base_name(settings))} fine-tuned on the task `{task['name']}` with "
            f"{SUMMARIES[settings.method]}. Trained with molf; loads with transformers alone.",
            "",
            "## Metrics",
            "95% intervals in brackets.",
            "",
            "| metric | before | after | count |",
            "|---|---|---|---|",
            *_metric_rows(before, after),
            "",
            *(("## Routing", routing, "") if routing else ()),
            *([f"Saved in {shown_saved}.", ""] if (shown_saved := show_saved(saved)) else []),
            "## Settings",
            yaml_block(_without_folders(mask(shown), places)),
            "",
            "## Data",
            yaml_block(_without_folders(mask(dict(task)), places)),
            "",
        ]
    )


def adapter_card(settings: ResolvedSettings, quantisation: Quantisation | None) -> str:
    """Return the text of an adapter's card.

    Args:
        settings: The run's settings.
        quantisation: The quantisation of the base in training; None for none.
    """
    front = {"library_name": "peft", "tags": ["molf"], **_base_model(settings)}
    beside = f" beside the base in {quantisation.bits} bits" if quantisation else ""
    return "\n".join(
        [
            front_matter(front),
            f"# {code(settings.output_dir.name)}: adapter",
            "",
            f"For {code(_base_name(settings))}, trained on the task `{settings.task}`{beside} "
            f"with molf, method `{settings.method}`. Loads with PEFT alone. `model/` of the same "
            "run has the merged model and its measurements.",
            "",
        ]
    )


def _base_model(settings: ResolvedSettings) -> dict[str, str]:
    """Return the base's Hub id for the front matter; empty if the base is a directory."""
    return {} if Path(settings.model).is_dir() else {"base_model": mask_text(settings.model)}


def _base_name(settings: ResolvedSettings) -> str:
    base = settings.model
    return Path(base).name if Path(base).is_dir() else mask_text(base)


def _without_folders(value: Any, places: Sequence[str]) -> Any:
    def shorten(text: str) -> str:
        for place in places:
            text = text.replace(place, Path(place).name)
        return text

    return map_texts(value, shorten)


def _metric_rows(before: Evaluation, after: Evaluation | None) -> Iterator[str]:
    found = after.metrics if after is not None else {}
    for name in {**before.metrics, **found}:
        was, now = before.metrics.get(name), found.get(name)
        count = next(metric.count for metric in (was, now) if metric is not None)
        yield f"| {name} | {show_metric(was)} | {show_metric(now)} | {count} |"


def show_metric(metric: Metric | None) -> str:
    """Return a metric's value as text, with its interval if known."""
    if metric is None:
        return "-"
    # A metric of lm-evaluation-harness may have no standard error.
    if math.isnan(metric.low):
        return f"{metric.value:.3f}"
    return f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"
