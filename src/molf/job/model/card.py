"""Write the model cards of saved checkpoints and adapters: settings, data and metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.amounts import fixed
from molf.data.sources import OPTIONS as SOURCES
from molf.data.sources import places as sources
from molf.job.record.markdown import code, yaml_block
from molf.job.settings.defaults import SUMMARIES
from molf.job.settings.resolved import ResolvedSettings
from molf.masking import mask, mask_text
from molf.measure import Evaluation, Metric
from molf.shown import as_line, map_texts

if TYPE_CHECKING:  # imports torch, which must not delay errors of wrong input
    from huggingface_hub import EvalResult

    from molf.core.model.quantised import Quantisation

_METRICS = "## Metrics"
# Of a data set; its configuration and its split, if they are given.
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]*))?(?::([\w.-]+))?")
_OF_HELD_OUT_TEXT = ("forgetting_loss", "kl_neutral")


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
    # The Hub reads the front matter: which library loads the model, which base and metrics it has.
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": sorted({"molf", settings.method}),
        **_base_model(settings),
        **_model_index(settings, task, after),
    }
    options = settings.as_options()
    # A card is published with its model, so it has the names of files but not their folders.
    named = ("model", *SOURCES, "forgetting_data", "assignment", "output_dir")
    places = [
        place
        for name in named
        for place in (sources(options[name]) if name in SOURCES else [options[name]])
        if place and Path(place).is_absolute()
    ]
    # The longest first: one path may be inside another.
    places.sort(key=len, reverse=True)
    shown = {key: value for key, value in options.items() if value not in (None, "", [], {})}
    return _card(
        front,
        [
            f"# {code(settings.output_dir.name)}",
            "",
            f"{code(_base_name(settings))} fine-tuned on the task `{task['name']}` with "
            f"{SUMMARIES[settings.method]}. Trained with molf; loads with transformers alone.",
            "",
            *_metrics(before, after),
            *(("## Routing", routing, "") if routing else ()),
            *([f"Saved in {shown_saved}.", ""] if (shown_saved := show_saved(saved)) else []),
            "## Settings",
            yaml_block(_without_folders(mask(shown), places)),
            "",
            "## Data",
            yaml_block(_without_folders(mask(dict(task)), places)),
            "",
        ],
    )


def adapter_card(settings: ResolvedSettings, quantisation: Quantisation | None) -> str:
    """Return the text of an adapter's card.

    Args:
        settings: The run's settings.
        quantisation: The quantisation of the base in training; None for none.
    """
    front = {"library_name": "peft", "tags": ["molf"], **_base_model(settings)}
    beside = f" beside the base in {quantisation.bits} bits" if quantisation else ""
    return _card(
        front,
        [
            f"# {code(settings.output_dir.name)}: adapter",
            "",
            f"For {code(_base_name(settings))}, trained on the task `{settings.task}`{beside} "
            f"with molf, method `{settings.method}`. Loads with PEFT alone.",
            "",
        ],
    )


def measured_adapter_card(
    card: str,
    settings: ResolvedSettings,
    task: Mapping[str, Any],
    before: Evaluation,
    after: Evaluation,
) -> str:
    """Return the card of an adapter with the metrics of the model that it was merged into.

    Args:
        card: The result of `adapter_card`; metrics in it are replaced.
        settings: The run's settings.
        task: The task's description.
        before: Metrics of the base model.
        after: Metrics of the merged model.
    """
    from huggingface_hub import ModelCard

    front = ModelCard(card).data.to_dict()
    front.pop("model-index", None)
    text = card.partition("\n---\n")[2].partition(_METRICS)[0]
    merged = "Of the base, and of the base with the adapter merged."
    return _card(
        {**front, **_model_index(settings, task, after)},
        [*text.rstrip().split("\n"), "", *_metrics(before, after, merged)],
    )


def _card(front: Mapping[str, Any], lines: Sequence[str]) -> str:
    """Return a card with front matter as the Hub parses it."""
    from huggingface_hub import ModelCard, ModelCardData

    # YAML indents continued lines of a value, so that none of them is the closing `---`.
    text = f"---\n{ModelCardData(**front).to_yaml()}\n---\n" + "\n".join(lines)
    return str(ModelCard(text))


def _model_index(
    settings: ResolvedSettings, task: Mapping[str, Any], after: Evaluation | None
) -> dict[str, Any]:
    """Return name and measured values for the front matter; empty before the measurement."""
    if after is None:
        return {}
    results = [
        _result(settings, task, name, metric)
        for name, metric in after.metrics.items()
        if math.isfinite(metric.value)
    ]
    name = as_line(settings.output_dir.name)
    return {"model_name": name, "eval_results": results} if results else {}


def _result(
    settings: ResolvedSettings, task: Mapping[str, Any], name: str, metric: Metric
) -> EvalResult:
    """Return a metric as the Hub has it; local data go by the name of the task."""
    from huggingface_hub import EvalResult

    task_name = str(task["name"])
    measured: dict[str, Any]
    if name in _OF_HELD_OUT_TEXT:
        measured = {"dataset_type": "text", "dataset_name": "held-out text"}
    else:
        data = str(settings.data or "")
        found = None if Path(data).exists() else _HUB_ID.fullmatch(data)
        measured = {
            "dataset_type": found[1] if found else task_name,
            "dataset_name": task_name,
            "dataset_config": (found[2] or None) if found else None,
            "dataset_split": settings.eval_part,
        }
    return EvalResult(
        task_type="text-generation", metric_type=name, metric_value=metric.value, **measured
    )


def _metrics(before: Evaluation, after: Evaluation | None, of: str = "") -> Iterator[str]:
    """Yield the lines of the section on metrics."""
    yield from (_METRICS, f"{of} 95% intervals in brackets.".strip(), "")
    yield from ("| metric | before | after | count |", "|---|---|---|---|")
    yield from _metric_rows(before, after)
    yield ""


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
        return fixed(metric.value, 3)
    return f"{fixed(metric.value, 3)} [{fixed(metric.low, 3)}, {fixed(metric.high, 3)}]"


def show_saved(record: Mapping[str, Any] | None) -> str | None:
    """Return a run's `saved` record as a sentence; None without measurements."""
    if not record or "moved_share" not in record:
        return None
    how = str(record["dtype"])
    if not record["moved_share"]:
        return f"{how}: no number moved in the training"
    if not record["update_error"]:
        return f"{how}: the whole update ({record['moved_share']:.1%} of all numbers moved)"
    return (
        f"{how}, rounding {record['rounding']}: {record['update_kept']:.1%} of the update's length "
        f"is kept, with an error of {record['update_error']:.0%} of it; "
        f"{record['moved_share']:.1%} of all numbers moved, {record['kept_share']:.1%} differ from "
        "the base after saving"
    )
