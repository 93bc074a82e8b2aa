"""Draw the pictures of the documentation as SVG.

    python scripts/docs_site/drawings.py

writes `docs/drawings/*.svg`. The files have their own colours for light and dark; on the site the
style sheet replaces them, so that they follow the theme of the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "drawings"

RULES = """\
text { fill: var(--ink); font: 15px system-ui, sans-serif; }
.small { font-size: 13px; }
.strong { font-weight: 600; }
.line { stroke: var(--ink); stroke-width: 1.5; fill: none; }
.tip { fill: var(--ink); }
.box { fill: var(--paper); stroke: var(--ink); stroke-width: 1.5; }
.soft { fill: var(--soft); stroke: var(--ink); stroke-width: 1; }
.full { fill: var(--full); }
.lora { fill: var(--lora); }
.faint { opacity: 0.35; }
.on { fill: #fff; }"""
"""The rules of all drawings; the site has the same."""

LIGHT = "--ink: #1f2328; --paper: #ffffff; --soft: #eef1f4; --full: #1f5fbf; --lora: #b3500b;"
DARK = "--ink: #e6edf3; --paper: #16191d; --soft: #2a3038; --full: #3d7fe0; --lora: #cf6a1d;"

_STYLE = f"""\
<style>
svg {{ {LIGHT} }}
@media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }}
{RULES}
</style>"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """Return a line of text; `x` is its middle unless `anchor` is `start` or `end`."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    """Return a rectangle with round corners."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{kind}"/>'
    )


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    """Return a straight arrow, horizontal or vertical."""
    if x0 == x1:
        tip = f"{x1 - 5:g},{y1 - 8 if y1 > y0 else y1 + 8:g} {x1 + 5:g},{y1 - 8 if y1 > y0 else y1 + 8:g}"
    else:
        back = x1 - 8 if x1 > x0 else x1 + 8
        tip = f"{back:g},{y1 - 5:g} {back:g},{y1 + 5:g}"
    return (
        f'<path class="line" d="M{x0:g} {y0:g} L{x1:g} {y1:g}"/>'
        f'<polygon class="tip" points="{x1:g},{y1:g} {tip}"/>'
    )


def svg(width: int, height: int, parts: Sequence[str]) -> str:
    """Return a whole drawing."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img">'
    )
    return "\n".join((head, _STYLE, *parts, "</svg>")) + "\n"


def layer() -> str:
    """Return a drawing of the experts of one layer."""
    parts = [
        text(40, 118, "x"),
        arrow(52, 113, 108, 113),
        box(110, 30, 320, 170),
        text(270, 20, "one linear layer", "strong"),
        box(135, 60, 105, 105, "full"),
        text(187, 118, "W", "on strong"),
        text(187, 187, "expert full", "small"),
        text(262, 118, "+", "strong"),
        text(283, 118, "s"),
        box(297, 60, 26, 105, "lora"),
        text(310, 118, "B", "on strong"),
        box(333, 60, 80, 26, "lora"),
        text(373, 78, "A", "on strong"),
        text(355, 187, "LoRA expert", "small"),
        arrow(430, 113, 488, 113),
        text(503, 118, "y"),
        text(560, 80, "W  [out, in]", anchor="start"),
        text(560, 105, "B  [out, r],  A  [r, in]", anchor="start"),
        text(560, 130, "y = (W + s B A) x", anchor="start"),
        text(560, 155, "more LoRA experts: more pairs B A", "small", "start"),
    ]
    return svg(800, 210, parts)


def step() -> str:
    """Return a drawing of one optimizer step of one layer."""
    rows = (("full", "W", "full", 62, 118), ("lora0_r16", "A, B", "lora", 128, 46))
    parts = [
        text(70, 28, "gradients", "strong small"),
        text(230, 28, "moments", "strong small"),
        text(420, 28, "score", "strong small"),
        text(650, 28, "winner: one AdamW step", "strong small"),
    ]
    for name, tensors, kind, y, score in rows:
        parts += [
            box(20, y - 18, 100, 40, kind),
            text(70, y + 7, f"grad {tensors}", "on"),
            arrow(120, y + 2, 168, y + 2),
            box(170, y - 18, 120, 40),
            text(230, y + 7, "m, v"),
            arrow(290, y + 2, 338, y + 2),
            box(340, y - 12, score, 28, kind),
            text(340, y + 34, name, "small", "start"),
        ]
    parts += [
        arrow(500, 96, 548, 96),
        box(550, 76, 200, 40, "full"),
        text(650, 101, "W is updated", "on strong"),
        text(650, 142, "A and B stay as they are", "small"),
        text(650, 160, "until their score is higher", "small"),
        text(400, 196, "every expert, in every step: exact gradients, new moments, a score", "small"),
    ]
    return svg(780, 210, parts)


def forms() -> str:
    """Return a drawing of the places of W, A and B in the three forms."""
    parts = []
    columns = (
        ("folded", "--method molf", "W + s B A", "A, B", None),
        ("beside an adapter", "molf, --lora_dropout 0.05", "W", None, "A, B"),
        ("frozen base", "--method molf-e", "W", None, "A, B"),
    )
    for index, (title, option, weight, state, adapter) in enumerate(columns):
        x = 20 + index * 265
        frozen = title == "frozen base"
        parts += [
            text(x + 115, 24, title, "strong"),
            text(x + 115, 44, option, "small"),
            box(x, 58, 230, 92),
            text(x + 10, 76, "model", "small", "start"),
            box(x + 15, 88, 120, 46, "soft" if frozen else "full"),
            text(x + 75, 116, f"{weight}, frozen" if frozen else weight, "" if frozen else "on"),
            box(x, 162, 230, 66, "soft"),
            text(x + 10, 180, "optimizer: moments", "small", "start"),
        ]
        if adapter:
            parts += [
                box(x + 147, 88, 68, 46, "lora"),
                text(x + 181, 116, adapter, "on"),
                text(x + 181, 76, "adapter", "small"),
            ]
        if state:
            parts += [box(x + 147, 190, 68, 28, "lora"), text(x + 181, 209, state, "on")]
    return svg(800, 240, parts)


def choice() -> str:
    """Return a drawing of the methods between full fine-tuning and LoRA."""
    bars = (
        ("fft", (1, 1, 1, 1, 1, 1)),
        ("molf", (1, 0, 1, 0, 0, 1)),
        ("hybrid", (1, 0, 1, 0, 0, 1)),
        ("lora", (0, 0, 0, 0, 0, 0)),
    )
    notes = (
        "every layer in full, in every step",
        "each layer by its winner, chosen again in every step",
        "each layer by a fixed assignment",
        "every layer by LoRA, the base frozen",
    )
    parts = []
    for index, ((name, layers), note) in enumerate(zip(bars, notes, strict=True)):
        y = 14 + index * 48
        parts.append(text(80, y + 24, name, "strong", "end"))
        for column, is_full in enumerate(layers):
            parts.append(box(100 + column * 48, y, 40, 34, "full" if is_full else "lora"))
        parts.append(text(405, y + 24, note, anchor="start"))
    parts += [
        box(100, 210, 16, 16, "full"),
        text(124, 223, "update of the weight", "small", "start"),
        box(280, 210, 16, 16, "lora"),
        text(304, 223, "update of LoRA factors", "small", "start"),
        text(500, 223, "one box: one layer", "small", "start"),
    ]
    return svg(800, 238, parts)


DRAWINGS = {"layer": layer, "step": step, "forms": forms, "choice": choice}
"""The drawings, by file name."""


def main() -> None:
    """Write all drawings."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
