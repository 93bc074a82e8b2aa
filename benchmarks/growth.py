"""Time a training step of MoLF by rank, number of experts, depth and tokens.

Each row is one size. The ratio compares whole training steps of MoLF and of full fine-tuning with
torch's fused AdamW, in interleaved rounds. Sizes fit into some minutes on a CPU: ranks and experts
on the 20M-parameter Qwen2 of the other benchmarks, depth with layers of width 128, and up to 65,536
tokens on a model of width 256.

    python benchmarks/growth.py [--rounds 5] [--only NAME ...] [--json FILE] [--plot FILE]

The bar: at 8,192 tokens, a step with experts of ranks 8, 32, 128 and 512 takes at most 1.05 times
as long as a step with a single expert of rank 512. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import (
    Bar,
    fft_step,
    interleave,
    make_batch,
    make_model,
    molf_step,
    ratio_interval,
    report,
)

BAR = 1.05
BAR_TOKENS = 8192
MANY, ONE = (8, 32, 128, 512), (512,)


class Size(NamedTuple):
    """One row.

    Attributes:
        value: The varied size, as on the plot's axis.
        ranks: Ranks of the LoRA experts.
        tokens: Tokens per step.
        shape: Options of the model's shape, where it is not the default.
    """

    value: int
    ranks: tuple[int, ...]
    tokens: int
    shape: dict[str, Any] = {}  # noqa: RUF012  # read only


def _shape(width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }


GROWTHS: dict[str, list[Size]] = {
    "rank": [Size(rank, (rank,), 2048) for rank in (8, 32, 128, 512)],
    "experts of rank 32": [Size(count, (32,) * count, 2048) for count in (1, 2, 4, 8)],
    "layers of width 128": [
        Size(layers, (16,), 512, _shape(128, layers)) for layers in (12, 24, 48, 96)
    ],
    "tokens, width 256": [
        Size(tokens, (64,), tokens, _shape(256, 4)) for tokens in (512, 2048, 8192, 32768, 65536)
    ],
}


def measure(sizes: Sequence[Size], rounds: int) -> Iterator[dict[str, Any]]:
    """Time each size; yield its row."""
    for size in sizes:
        model, batch = make_model(**size.shape), make_batch(size.tokens)
        steps = {"fft": fft_step(model, batch), "molf": molf_step(model, batch, size.ranks)}
        seconds = interleave(steps, rounds)
        ratio, low, high = ratio_interval(
            [a / b for a, b in zip(seconds["molf"], seconds["fft"], strict=True)]
        )
        yield {
            "value": size.value,
            "ranks": size.ranks,
            "tokens": size.tokens,
            "parameters": sum(p.numel() for p in model.parameters()),
            "fft": statistics.median(seconds["fft"]),
            "molf": statistics.median(seconds["molf"]),
            "ratio": ratio,
            "low": low,
            "high": high,
        }


def many_experts(rounds: int) -> Bar:
    """Measure a step with four experts against one with the largest alone."""
    model, batch = make_model(), make_batch(BAR_TOKENS)
    steps = {str(ranks): molf_step(model, batch, ranks) for ranks in (MANY, ONE)}
    seconds = interleave(steps, rounds)
    name = f"{BAR_TOKENS} tokens: MoLF's training step with ranks {MANY} against {ONE}"
    return Bar.of_ratios(name, BAR, seconds[str(MANY)], seconds[str(ONE)])


def _short(value: int) -> str:
    """Shorten a label, such as 65,536 to 64k, because longer ones overlap."""
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)


def plot(growths: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw a panel for each varied size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(growths), figsize=(3.4 * len(growths), 3.2), sharey=True, squeeze=False
    )
    for panel, (name, rows) in zip(panels[0], growths.items(), strict=True):
        values = [row["value"] for row in rows]
        ratios = [row["ratio"] for row in rows]
        below = [row["ratio"] - row["low"] for row in rows]
        above = [row["high"] - row["ratio"] for row in rows]
        panel.errorbar(values, ratios, yerr=[below, above], marker="o", capsize=3)
        panel.axhline(1.0, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [_short(value) for value in values])
        panel.set_xlabel(name)
    panels[0][0].set_ylabel("MoLF's step / full fine-tuning's")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run the benchmark, print its tables and draw them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bar_rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=(*GROWTHS, "bar"), default=[*GROWTHS, "bar"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)  # some ranks are as large as a layer

    growths: dict[str, list[dict[str, Any]]] = {}
    for name in [name for name in options.only if name in GROWTHS]:
        print(f"\n{name}")
        print("   value     ranks  tokens  params M  fft s   molf s  ratio (95% interval)")
        growths[name] = []
        for row in measure(GROWTHS[name], options.rounds):
            growths[name].append(row)
            ranks = row["ranks"]
            shown = f"{len(ranks)} x {ranks[0]}" if len(ranks) > 1 else str(ranks[0])
            print(
                f"{row['value']:>8} {shown:>9} {row['tokens']:>7} {row['parameters'] / 1e6:>9.1f} "
                f"{row['fft']:>6.3f} {row['molf']:>8.3f}  {row['ratio']:.3f} "
                f"({row['low']:.3f}-{row['high']:.3f})",
                flush=True,
            )
    bars = [many_experts(options.bar_rounds)] if "bar" in options.only else []
    settings = {k: v for k, v in vars(options).items() if k != "plot"}
    report(settings, bars, options.json, growths=growths)
    if options.plot and growths:
        if importlib.util.find_spec("matplotlib") is None:
            print("No plot: matplotlib is not installed.")
        else:
            plot(growths, options.plot)


if __name__ == "__main__":
    main()
