"""The reference of Python names, from their docstrings."""

from __future__ import annotations

import molf

GROUPS: dict[str, tuple[str, ...]] = {
    "Settings": ("MoLFConfig",),
    "Optimizers": ("MoLFAdamW", "AdamW", "trainer_optimizer", "RoutingCallback"),
    "Models with an adapter": ("with_adapter", "peft_config", "merge", "MergeReport"),
    "Decisions": ("Decision", "Evidence"),
    "Assignments": ("Assignment", "AssignedLayer", "with_assignment", "read_assignment"),
    "Whole jobs": (
        "train",
        "evaluate",
        "plan",
        "find_rates",
        "probe",
        "Run",
        "TrainingPlan",
        "RangeTest",
    ),
    "Scores": ("Score", "ScoreTerm", "register_score"),
}
"""The public names of `molf`, by heading."""


def api_reference() -> str:
    """Return Markdown with a directive of autodoc for each public name.

    Raises:
        ValueError: A public name has no heading in `GROUPS`, or a name there is not public.
    """
    grouped = [name for names in GROUPS.values() for name in names]
    if sorted(grouped) != sorted(molf.__all__):
        raise ValueError(
            "Invalid GROUPS of scripts/docs_site/api.py. Must have each name of molf.__all__ once: "
            f"{', '.join(sorted(set(grouped) ^ set(molf.__all__)))}."
        )
    parts = []
    for heading, names in GROUPS.items():
        parts.append(f"## {heading}\n")
        parts += [_directive(name) for name in names]
    return "\n".join(parts)


def _directive(name: str) -> str:
    """Return the directive of a public name."""
    value = getattr(molf, name)
    if not isinstance(value, type):
        return f"```{{eval-rst}}\n.. autofunction:: molf.{name}\n```\n"
    lines = [f".. autoclass:: molf.{name}", "   :members:"]
    if fields := getattr(value, "_fields", None):  # of a named tuple: the docstring has them
        lines.append(f"   :exclude-members: {', '.join(fields)}")
    return "\n".join(("```{eval-rst}", *lines, "```\n"))
