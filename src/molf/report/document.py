"""HTML pages that need no other file: their frame, and pages of tables and figures."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np

from molf.report.figures import Bars, Figure, Floats, Heat, Lines, Points, plain
from molf.shown import TextTable, printable

UPLOT = "uplot-1.6.32.min"
_ASSETS = files("molf.report") / "assets"
_SCALE, _NONE = 200, 255  # a share of 1 in the maps, and an empty cell


@dataclass(frozen=True)
class Marked:
    """A cell of a table.

    Attributes:
        value: Its text.
        more: A second line, smaller: an interval.
        is_strong: Whether it is highlighted.
    """

    value: str
    more: str = ""
    is_strong: bool = False


@dataclass(frozen=True)
class ShownTable:
    """A table of a page.

    Attributes:
        title: Its heading.
        text: Sentences before it.
        columns: Names of the columns.
        rows: The rows; the first cell names the row.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Marked, ...], ...]


def shown_table(found: TextTable, text: str = "") -> ShownTable:
    """Return a table of texts for a page; bold cells (`**text**`) are highlighted.

    An interval after a value (`value [low, high]`) is its second line.
    """
    return ShownTable(found.title, text, found.columns, tuple(map(_cells, found.rows)))


def _cells(row: tuple[str, ...]) -> tuple[str | Marked, ...]:
    name, *cells = row
    return (name, *(_cell(text) for text in cells))


def _cell(text: str) -> str | Marked:
    is_bold = len(text) > 4 and text.startswith("**") and text.endswith("**")
    text = text[2:-2] if is_bold else text
    value, space, interval = text.partition(" [")
    if space:
        return Marked(value, f"[{interval}", is_strong=is_bold)
    return Marked(text, is_strong=True) if is_bold else text


@dataclass(frozen=True)
class Part:
    """Tables and figures under one heading.

    Attributes:
        title: The heading.
        text: Sentences under it.
        tables: The tables.
        figures: The figures.
        lines: A list of short texts.
    """

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[ShownTable, ...] = ()
    figures: tuple[Figure, ...] = ()
    lines: tuple[str, ...] = ()


def render_parts(
    title: str,
    parts: Sequence[Part],
    *,
    about: str = "",
    notices: Sequence[str] = (),
    facts: Sequence[tuple[str, str]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    about_samples: str = "",
) -> str:
    """Return a page of tables and figures.

    Args:
        title: Its title.
        parts: Its parts, in order.
        about: A sentence under the title.
        notices: Lines at the top about missing files and values.
        facts: Name and value of figures at the top.
        samples: Samples for the script.
        about_samples: A sentence before them; empty without any.
    """
    figures: list[dict[str, Any]] = []
    shown = []
    for number, part in enumerate(parts):
        placed = []
        for one in part.figures:
            place = f"{one.name}-{number}"
            figures.append({"id": place, "file": one.name, **figure_values(one, {})})
            placed.append({"id": place, "title": one.title, "text": one.text, "run": ""})
        shown.append({"anchor": f"part-{number}", "part": part, "figures": placed})
    return filled(
        "parts.html.j2",
        title=title,
        written=datetime.now().astimezone(),
        sections=[
            *((f"part-{number}", part.title) for number, part in enumerate(parts)),
            *([("samples", "Samples")] if about_samples else ()),
        ],
        data={"figures": figures, "samples": [samples]},
        about_samples=about_samples,
        parts=shown,
        about=about,
        notices=notices,
        facts=facts,
    )


def filled(
    template: str,
    *,
    title: str,
    written: datetime,
    sections: Sequence[tuple[str, str]],
    data: Mapping[str, Any],
    refresh: int | None = None,
    **context: Any,
) -> str:
    """Return a page.

    Args:
        template: Name of its template, which extends `base.html.j2`.
        title: Its title.
        written: The time of its data.
        sections: Anchor and name of its sections.
        data: The data of its script: `figures` and `samples`.
        refresh: Load the page again after this many seconds; None never.
        context: Further values of the template.
    """
    import jinja2

    text = {name: _asset(name) for name in ("page.css", "page.js", f"{UPLOT}.js", f"{UPLOT}.css")}
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_asset),
    )
    page: str = environment.get_template(template).render(
        title=title,
        version=version("molf"),
        written=written.isoformat(sep=" ", timespec="seconds"),
        policy=_policy(text[f"{UPLOT}.js"], text["page.js"]),
        refresh=refresh,
        css=text["page.css"],
        js=text["page.js"],
        uplot_js=text[f"{UPLOT}.js"],
        uplot_css=text[f"{UPLOT}.css"],
        sections=sections,
        data=_json(data),
        **context,
    )
    return printable(page)


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """Return a policy that lets a browser run these scripts alone, and request nothing."""
    hashes = (
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts
    )
    sources = " ".join(f"'sha256-{one}'" for one in hashes)
    return f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:"


def _json(value: Any) -> str:
    """Return JSON that is safe inside of a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def figure_values(figure: Figure, ranges: Mapping[str, Any]) -> dict[str, Any]:
    """Return a figure for the script.

    Args:
        figure: The figure.
        ranges: Axes that it shares with others: `x_range` and `y_range`; empty for its own.
    """
    table = {"columns": figure.table.columns, "rows": figure.table.rows}
    base: dict[str, Any] = {"title": figure.title}
    if isinstance(figure, Lines):
        own_table = {"table": table} if figure.has_own_table else {}
        return base | _lines(figure, ranges) | own_table
    base["table"] = table
    if isinstance(figure, Heat):
        return base | _heat(figure)
    if isinstance(figure, Points):
        return base | _points(figure)
    assert isinstance(figure, Bars)
    return base | _bars(figure)


def _lines(figure: Lines, ranges: Mapping[str, Any]) -> dict[str, Any]:
    own = {} if figure.y_range is None else {"y_range": figure.y_range}
    series = [
        {
            "name": one.name,
            "values": [plain(value) for value in one.values],
            "color": one.color,
            "faint": one.faint,
        }
        for one in figure.series
    ]
    return {
        "kind": "lines",
        "x": [plain(x) for x in figure.x],
        "x_label": figure.x_label,
        "y_label": figure.y_label,
        "stepped": figure.stepped,
        "log_x": figure.log_x,
        "dotted": figure.dotted,
        "series": series,
        **ranges,
        **own,
    }


def _heat(figure: Heat) -> dict[str, Any]:
    values = (figure.values + 1) / 2 if figure.is_margin else figure.values
    return {
        "kind": "heat",
        "rows": figure.rows,
        "kinds": figure.kinds,
        "first": figure.first,
        "last": figure.last,
        "planes": [_packed(plane) for plane in values],
        "names": figure.names,
        "is_margin": figure.is_margin,
        "factors": None if figure.factors is None else figure.factors.tolist(),
        "layers": 0 if figure.full_at is None else len(figure.full_at),
    }


def _points(figure: Points) -> dict[str, Any]:
    points = [
        {
            "name": one.name,
            "x": [plain(x) for x in (one.x.value, one.x.low, one.x.high)],
            "y": [plain(y) for y in (one.y.value, one.y.low, one.y.high)],
        }
        for one in figure.points
    ]
    return {
        "kind": "points",
        "x_label": figure.x_label,
        "y_label": figure.y_label,
        "points": points,
        "front": figure.front,
    }


def _bars(figure: Bars) -> dict[str, Any]:
    return {
        "kind": "bars",
        "groups": figure.groups,
        "parts": figure.parts,
        "values": [[plain(value) for value in row] for row in figure.values],
    }


def _packed(shares: Floats) -> str:
    """Return shares in steps of 0.005 as bytes in base64; NaN is 255."""
    stored = np.where(np.isnan(shares), _NONE, np.rint(np.nan_to_num(shares) * _SCALE))
    return base64.b64encode(stored.astype(np.uint8).tobytes()).decode()
