"""The reference of Python names, from their docstrings."""

from __future__ import annotations

import molf

GROUPS: dict[str, tuple[str, ...]] = {
    "Settings": ("MoLFConfig",),
    "Optimizers": ("MoLFAdamW", "AdamW", "trainer_optimizer"),
    "Models with an adapter": ("with_adapter", "peft_config", "merge", "MergeReport"),
    "Decisions": ("Decision", "Evidence"),
    "Assignments": ("Assignment", "AssignedLayer", "with_assignment", "read_assignment"),
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
        for name in names:
            directive = "autoclass" if isinstance(getattr(molf, name), type) else "autofunction"
            parts.append(f"```{{eval-rst}}\n.. {directive}:: molf.{name}")
            parts.append("   :members:\n```\n" if directive == "autoclass" else "```\n")
    return "\n".join(parts)
