"""Print an extraction: the errors by kind of layer, the rest, and the metrics."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from molf.console import PlainConsole, new_table
from molf.measure.meanings import meanings

if TYPE_CHECKING:
    from rich.table import Table

    from molf.job.extract.change import LayerChange
    from molf.job.extract.extract import Extraction


def print_extraction(made: Extraction) -> None:
    """Print it to standard output."""
    console = PlainConsole()
    console.print(_layers_table(made))
    console.lines(
        "change: |W - W0| / |W0|. kept: share of |W - W0|^2 (worst: of one layer). error: distance "
        "of B A from W - W0, of |W - W0|. rank of 90%: the rank that keeps 90%."
    )
    if made.rest:
        console.print(_rest_table(made))
        console.lines(
            "change: as above, mean. largest: absolute change of one number. error: distance of "
            "the adapter's values from the trained ones, relative to the change; mean."
        )
    if made.metrics:
        console.print(_metrics_table(made))
        first = next(iter(made.metrics.values()))
        console.lines(
            "model: that of the run. adapter, all of the rest: B A for the change of the linear "
            "layers, all other changes as trained. adapter as written: the other changes that it "
            "holds. adapter alone: none of them.",
            *(f"  {names}  {meaning}" for names, meaning in meanings(first)),
        )


def _layers_table(made: Extraction) -> Table:
    """Return the errors of the adapter by kind of layer."""
    kinds: dict[str, list[LayerChange]] = {}
    for layer in made.layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    table = new_table(f"Rank {made.rank}", "kind", "layers", "change", "kept", "worst", "error")
    table.add_column("rank of 90%", justify="right", max_width=7)
    for name, layers in kinds.items():
        table.add_row(
            name,
            str(len(layers)),
            f"{fmean(x.relative for x in layers):.2g}",
            f"{fmean(x.kept for x in layers):.1%}",
            f"{min(x.kept for x in layers):.1%}",
            f"{fmean(x.error for x in layers):.2g}",
            f"{fmean(x.rank_90 for x in layers):.0f}",
        )
    return table


def _rest_table(made: Extraction) -> Table:
    """Return the changes of other parameters by kind."""
    table = new_table("Changed outside of these", "kind", "parameters", "change", "largest")
    table.add_column("in the adapter", justify="right", max_width=8)
    table.add_column("error", justify="right")
    for kind in dict.fromkeys(one.kind for one in made.rest):
        rest = [one for one in made.rest if one.kind == kind]
        held = [one.error for one in rest if one.name in made.kept.names]
        table.add_row(
            kind,
            str(len(rest)),
            f"{fmean(x.relative for x in rest):.2g}",
            f"{max(x.largest for x in rest):.2g}",
            f"{len(held)} of {len(rest)}",
            f"{fmean(held):.2g}" if held else "-",
        )
    return table


def _metrics_table(made: Extraction) -> Table:
    """Return the metrics of the run's model and of the adapter, one column for each."""
    table = new_table("Metrics", "metric")
    for model in made.metrics:
        table.add_column(model, justify="right", max_width=max(8, *map(len, model.split())))
    for name in next(iter(made.metrics.values())):
        values = [metrics.get(name) for metrics in made.metrics.values()]
        table.add_row(name, *("-" if one is None else f"{one.value:.3f}" for one in values))
    return table
