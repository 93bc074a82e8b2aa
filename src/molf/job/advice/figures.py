"""Figures of advice as PNG files: the layers as a map, and how early they were decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molf.core.assignment.assigned import FULL
from molf.disk.files import replacing_file
from molf.errors import InputError, system_reason
from molf.job.advice.advice import Advice

MAP, SETTLED = "assignment-map.png", "assignment-evidence.png"


def draw_figures(advice: Advice, folder: Path) -> list[Path]:
    """Draw both figures; return their paths.

    `assignment-map.png`: kinds of projection by depth, coloured by the share of decisions that
    `full` won, with a frame around layers assigned to `full`. `assignment-evidence.png`: the share
    of layers that kept their winner, by step, and the mean margins.

    Args:
        advice: The advice.
        folder: Where to write them; created if it is missing.

    Raises:
        InputError: They cannot be written.
    """
    from matplotlib.figure import Figure

    kinds = advice.by_kind
    known = {one.depth for one in advice.layers if one.depth is not None}
    depths: list[int | None] = [*sorted(known)] or [None]
    size = (max(5.0, 1.5 + 0.4 * len(depths)), 1.5 + 0.4 * len(kinds))
    layer_map = Figure(figsize=size, layout="constrained")
    _draw_map(layer_map, advice, depths)
    evidence = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = evidence.subplots(1, 2)
    _draw_settled(left, advice)
    _draw_margins(right, advice)
    paths = [folder / MAP, folder / SETTLED]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure, path in zip((layer_map, evidence), paths, strict=True):
            with replacing_file(path) as temporary:
                # Without the version of matplotlib, so that equal figures are equal files.
                figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    except OSError as error:
        raise InputError(f"figures {folder} cannot be written: {system_reason(error)}.") from error
    return paths


def _draw_map(figure: Any, advice: Advice, depths: list[int | None]) -> None:
    from matplotlib.patches import Rectangle

    axis = figure.subplots()
    kinds = [group.name for group in advice.by_kind]
    won = [[float("nan")] * len(depths) for _ in kinds]
    for one in advice.layers:
        column = depths.index(one.depth) if one.depth in depths else 0
        row = kinds.index(one.kind)
        won[row][column] = one.evidence.share(FULL)
        if advice.assigned(one).train == FULL:
            axis.add_patch(
                Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, fill=False, edgecolor="black")
            )
    image = axis.imshow(won, vmin=0, vmax=1, cmap="coolwarm", aspect="auto")
    axis.set_yticks(range(len(kinds)), kinds)
    step = -(-len(depths) // 16)
    axis.set_xticks(range(0, len(depths), step), [str(x) for x in depths[::step]])
    axis.set_xlabel("decoder layer")
    axis.set_title("framed: assigned to full", fontsize="medium")
    figure.colorbar(image, ax=axis, label="share of steps won by full")


def _draw_settled(axis: Any, advice: Advice) -> None:
    last = sorted(one.settled for one in advice.layers)
    steps, shares = [0], [0.0]
    for number, step in enumerate(last, 1):
        steps.append(step)
        shares.append(number / len(last))
    axis.step([*steps, max(advice.steps, last[-1])], [*shares, 1.0], where="post")
    axis.set_xlabel("step")
    axis.set_ylabel("share of layers after their last flip")
    axis.set_ylim(0, 1.03)


def _draw_margins(axis: Any, advice: Advice) -> None:
    groups = [group for group in advice.by_kind if group.margin is not None]
    for row, group in enumerate(groups):
        margins = [one.evidence.margin for one in group.layers]
        colors = ["C3" if one.differs else "C0" for one in group.layers]
        axis.scatter(margins, [row] * len(margins), c=colors, s=18, alpha=0.7)
    axis.axvline(0, color="0.6", linewidth=1)
    axis.set_yticks(range(len(groups)), [group.name for group in groups])
    axis.invert_yaxis()
    axis.set_xlabel("mean margin of full over LoRA")
    axis.set_title("red: another winner than shape predicts", fontsize="medium")
