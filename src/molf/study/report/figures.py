"""Figures of a study: the metric over rates, and quality against harm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from molf.disk.files import replacing_file
from molf.errors import InputError
from molf.study.choice import HARMS
from molf.study.report.second_phase import FORGETTING
from molf.study.report.summary import CellSummary, MethodSummary, front_of
from molf.study.report.tables import seeds_text

_MARKERS = "osDv^<>Phd*"
_LABELS = {
    FORGETTING: "change of forgetting_loss (nats per token)",
    "kl_neutral": "KL(base || tuned) on neutral text (nats per token)",
    "kl_task": "KL(base || tuned) on the task's prompts (nats per token)",
}


def draw_figures(folder: Path, cells: Sequence[CellSummary]) -> dict[str, list[str]]:
    """Draw the figures of each cell as PNG files; return their names by cell.

    Args:
        folder: Where to write them.
        cells: The summary of the study.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "Figures need matplotlib, which is not installed. Run: pip install 'molf[study]', or "
            "give --no_figures."
        ) from error
    names: dict[str, list[str]] = {}
    for cell in cells:
        drawn = []
        if any(len(one.curve) > 1 for one in cell.methods):
            figure = Figure(figsize=(7.5, 4), layout="constrained")
            axis = figure.subplots()
            _draw_rates(axis, cell)
            _add_legend(figure, [axis])
            drawn.append(_save(figure, folder / f"rates-{cell.name}.png"))
        harms = [
            harm
            for harm in HARMS
            if any(one.value is not None and harm in one.harm for one in cell.methods)
        ]
        if harms:
            figure = Figure(figsize=(4.5 * len(harms) + 1.5, 4), layout="constrained")
            axes = figure.subplots(1, len(harms), squeeze=False)[0]
            for axis, harm in zip(axes, harms, strict=True):
                _draw_front(axis, cell, harm)
            _add_legend(figure, axes)
            drawn.append(_save(figure, folder / f"pareto-{cell.name}.png"))
        names[cell.name] = drawn
    return names


def _save(figure: Any, path: Path) -> str:
    with replacing_file(path) as temporary:
        # Without the version of matplotlib, so that equal figures are equal files.
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    return path.name


def _add_legend(figure: Any, axes: Iterable[Any]) -> None:
    """Add one legend for all axes, beside them, so that it covers no point."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside right upper", fontsize="small")


def _draw_rates(axis: Any, cell: CellSummary) -> None:
    for number, one in enumerate(cell.methods):
        if one.curve:
            rates = sorted(one.curve)
            axis.plot(rates, [one.curve[rate] for rate in rates], **_style(number, one.name))
    axis.set_xscale("log")
    axis.set_xlabel("learning rate (of the LoRA factors where these alone are trained)")
    axis.set_ylabel(f"{cell.metric} on the validation part")
    axis.set_title(cell.name)


def _draw_front(axis: Any, cell: CellSummary, harm: str) -> None:
    shown = [
        (number, one)
        for number, one in enumerate(cell.methods)
        if one.value is not None and harm in one.harm
    ]
    for number, one in shown:
        _draw_point(axis, one, harm, number)
    known = {one.name: one for _, one in shown}
    front = sorted(
        (known[name] for name in front_of(cell, harm)), key=lambda one: one.harm[harm].value
    )
    axis.plot(
        [one.harm[harm].value for one in front],
        [one.value.value for one in front if one.value is not None],
        color="0.6",
        linestyle=":",
        zorder=0,
    )
    axis.set_xlabel(_LABELS[harm])
    axis.set_ylabel(cell.metric)
    axis.set_title(cell.name)


def _draw_point(axis: Any, one: MethodSummary, harm: str, number: int) -> None:
    value, cost = one.value, one.harm[harm]
    if value is None:
        return
    axis.errorbar(
        cost.value,
        value.value,
        xerr=_ends(cost.value, cost.low, cost.high),
        yerr=_ends(value.value, value.low, value.high),
        linestyle="none",
        **_style(number, one.name + seeds_text(one)),
    )


def _ends(value: float, low: float, high: float) -> Any:
    if math.isnan(low) or math.isnan(high):
        return None
    return [[max(value - low, 0)], [max(high - value, 0)]]


def _style(number: int, name: str) -> dict[str, Any]:
    # Markers differ as well: methods may have the same values, and there are ten colours.
    marker = _MARKERS[number % len(_MARKERS)]
    return {"color": f"C{number % 10}", "label": name, "alpha": 0.8, "marker": marker}
