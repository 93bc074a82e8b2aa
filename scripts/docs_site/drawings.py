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
        back = y1 - 8 if y1 > y0 else y1 + 8
        tip = f"{x1 - 5:g},{back:g} {x1 + 5:g},{back:g}"
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
        text(260, 20, "one linear layer", "strong"),
        text(24, 118, "x"),
        arrow(36, 113, 72, 113),
        box(75, 32, 370, 168),
        box(105, 60, 105, 105, "full"),
        text(157, 118, "W", "on strong"),
        text(157, 187, "expert full", "small"),
        text(245, 118, "+", "strong"),
        text(275, 118, "s", "strong"),
        box(300, 60, 26, 105, "lora"),
        text(313, 118, "B", "on strong"),
        box(336, 60, 84, 26, "lora"),
        text(378, 78, "A", "on strong"),
        text(360, 187, "LoRA expert", "small"),
        arrow(445, 113, 481, 113),
        text(496, 118, "y"),
        text(260, 230, "y = (W + s B A) x", "strong"),
        text(260, 254, "W [out, in]    B [out, r]    A [r, in]", "small"),
    ]
    return svg(520, 266, parts)


def step() -> str:
    """Return a drawing of one optimizer step of one layer."""
    rows = (("full", "W", "full", 58, 130), ("lora0_r16", "A, B", "lora", 128, 46))
    parts = [
        text(70, 24, "gradients", "strong"),
        text(215, 24, "moments", "strong"),
        text(390, 24, "score", "strong"),
    ]
    for name, tensors, kind, y, score in rows:
        parts += [
            box(15, y - 18, 110, 42, kind),
            text(70, y + 8, f"grad {tensors}", "on"),
            arrow(125, y + 3, 158, y + 3),
            box(160, y - 18, 110, 42),
            text(215, y + 8, "m, v"),
            arrow(270, y + 3, 308, y + 3),
            box(310, y - 11, score, 28, kind),
            text(310, y + 36, name, "small", "start"),
        ]
    parts += [
        '<path class="line" d="M452 61 L490 61 L490 220"/>',
        arrow(490, 220, 442, 220),
        text(210, 193, "winner: one AdamW step", "strong"),
        box(120, 201, 320, 38, "full"),
        text(280, 225, "W is updated", "on strong"),
        text(280, 260, "A and B stay as they are until their score is higher", "small"),
    ]
    return svg(520, 270, parts)


def forms() -> str:
    """Return a drawing of the places of W, A and B in the three forms."""
    parts = []
    columns = (
        ("folded", "molf", "W + s B A", "A, B", None),
        ("with adapter", "molf, dropout", "W", None, "A, B"),
        ("frozen base", "molf-e", "W, frozen", None, "A, B"),
    )
    for index, (title, method, weight, state, adapter) in enumerate(columns):
        x = 5 + index * 173
        frozen = title == "frozen base"
        parts += [
            text(x + 82, 20, title, "strong"),
            text(x + 82, 40, method, "small"),
            box(x, 52, 164, 104),
            text(x + 10, 72, "model", "small", "start"),
            box(x + 10, 82, 144, 28, "soft" if frozen else "full"),
            text(x + 82, 101, weight, "" if frozen else "on"),
            box(x, 166, 164, 64, "soft"),
            text(x + 10, 186, "optimizer", "small", "start"),
            text(x + 10, 216, "m, v", "small", "start"),
        ]
        if adapter:
            parts += [
                box(x + 74, 118, 80, 28, "lora"),
                text(x + 114, 137, adapter, "on"),
                text(x + 12, 137, "adapter", "small", "start"),
            ]
        if state:
            parts += [box(x + 74, 194, 80, 28, "lora"), text(x + 114, 213, state, "on")]
    return svg(520, 240, parts)


def choice() -> str:
    """Return a drawing of the methods between full fine-tuning and LoRA."""
    rows = (
        ("fft", (1, 1, 1, 1, 1, 1), "every layer in full"),
        ("molf", (1, 0, 1, 0, 0, 1), "by the winner, in every step"),
        ("hybrid", (1, 0, 1, 0, 0, 1), "by a fixed assignment"),
        ("lora", (0, 0, 0, 0, 0, 0), "every layer by LoRA"),
    )
    parts = []
    for index, (name, layers, note) in enumerate(rows):
        y = 10 + index * 46
        parts.append(text(60, y + 23, name, "strong", "end"))
        for column, is_full in enumerate(layers):
            parts.append(box(75 + column * 37, y, 31, 32, "full" if is_full else "lora"))
        parts.append(text(308, y + 22, note, anchor="start"))
    parts += [
        text(75, 216, "one box: one layer", "small", "start"),
        box(215, 203, 16, 16, "full"),
        text(238, 216, "updates W", "small", "start"),
        box(345, 203, 16, 16, "lora"),
        text(368, 216, "updates A and B", "small", "start"),
    ]
    return svg(520, 228, parts)


DRAWINGS = {"layer": layer, "step": step, "forms": forms, "choice": choice}
"""The drawings, by file name."""


def main() -> None:
    """Write all drawings."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
