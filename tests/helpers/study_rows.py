"""Rows of a study as they are stored, made by hand, and their summary."""

from molf.study.report.parts import parts_of
from molf.study.report.records import Records
from molf.study.report.summary import summarise
from molf.study.report.writing import report_text

SEEDS = [11, 12, 13, 14, 15]
GRID = [1e-4, 1e-3, 1e-2]


def method(rates, **entry):
    return {"options": {}, "rates": rates, "share_of": None, "control_of": None, **entry}


def grid(**lists):
    """The points of a grid of rates, the last rate varying first."""
    points = [{}]
    for name, values in lists.items():
        points = [{**point, name: value} for point in points for value in values]
    return points


FFT = method(grid(learning_rate=GRID))
EPD = method(grid(learning_rate=GRID, lora_lr_ratio=[2]))
SHUFFLED = method(EPD["rates"], control_of="epd")


def trial(name, phase, point, seed, value, rates, **more):
    """A row as it is stored; without a value a failed one."""
    row = {
        "cell": "facts",
        "method": name,
        "phase": phase,
        "point": point,
        "seed": seed,
        "state": "failed" if value is None else "complete",
        **rates,
    }
    if "lora_lr_ratio" in rates:
        row["lora_learning_rate"] = rates["learning_rate"] * rates["lora_lr_ratio"]
    if value is not None:
        row |= {"after/es": value, "before/es": 0.0}
    return row | more


def choosing(name, entry, values):
    """The rows of the first phase, with one seed."""
    return [
        trial(name, "choose", index, 1, value, entry["rates"][index])
        for index, value in enumerate(values)
    ]


def reported(name, entry, index, values, **more):
    """The rows of the second phase at one point; None fails."""
    return [
        trial(name, "report", index, seed, value, entry["rates"][index], **more)
        for seed, value in zip(SEEDS, values, strict=True)
    ]


def records(methods, rows, *, minimize=False, baseline=("fft",), **points):
    return Records(
        {
            "study": "made",
            "about": "",
            "cells": {
                "facts": {
                    "metric": "es",
                    "minimize": minimize,
                    "rates": {},
                    "points": {
                        name: points.get(name, len(entry["rates"]))
                        for name, entry in methods.items()
                    },
                }
            },
            "methods": methods,
            "choose": {"seeds": [1], "sampler": "grid"},
            "report": {"seeds": SEEDS, "baseline": list(baseline)},
        },
        rows,
        {},
    )


def cell_of(methods, rows, **options):
    (cell,) = summarise(records(methods, rows, **options))
    return cell


def text_of(methods, rows, **options):
    stored = records(methods, rows, **options)
    return report_text(stored, parts_of(stored, summarise(stored)), {})
