"""`--help`: common options first, names that are never broken; `--help-all` and `molf help`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cyclopts.help import DefaultFormatter, HelpEntry, HelpPanel, InlineText
from cyclopts.help.specs import (
    AsteriskColumn,
    ColumnSpec,
    DescriptionColumn,
    NameRenderer,
)
from rich.text import Text

HELP_ALL = "--help-all"
# fmt: off
_COMMON = frozenset({
    "task", "data", "eval_data", "config", "model", "method", "ranks", "score", "assignment",
    "learning_rate", "lora_learning_rate", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "dtype",
    "load_in_4bit", "gradient_checkpointing", "seed", "output_dir", "overwrite", "resume",
    "dry_run", "steps", "from", "to", "json", "num_gpus", "num_nodes", "help",
})
# fmt: on
EXAMPLES = {
    "train": "molf train --model Qwen/Qwen2.5-1.5B --task custom --data records.jsonl "
    "--output_dir out",
    "plan": "molf plan --model Qwen/Qwen2.5-1.5B --task custom --max_length 256",
    "probe": "molf probe --model Qwen/Qwen2.5-1.5B --task custom --data records.jsonl "
    "--output_dir probe",
    "lr": "molf lr --model Qwen/Qwen2.5-1.5B --task custom --data records.jsonl --output_dir rates",
}
_INDENT = 2  # of a name on a second line


class _Shown:
    """Whether `--help-all` was given."""

    everything = False


def without_help_all(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `--help` for `--help-all`, and note which one was given."""
    _Shown.everything = HELP_ALL in arguments
    return ["--help" if one == HELP_ALL else one for one in arguments]


def epilogue(command: str) -> str:
    """Return the lines below the options of a command that has many."""
    return f"Example: {EXAMPLES[command]}\n\nAll options: molf {command} {HELP_ALL}"


def _columns(console: Any, options: Any, entries: list[HelpEntry]) -> tuple[ColumnSpec, ...]:
    # The default breaks names that are longer than a third of the terminal.
    longest = max(len(label) for one in entries for label in one.display_labels_with_metavar)
    width = max(longest + _INDENT, console.width * 35 // 100)
    names = ColumnSpec(
        renderer=NameRenderer(max_width=width),
        header="Option",
        style="cyclopts.name",
        max_width=width,
        no_wrap=True,
    )
    if any(one.required for one in entries):
        return AsteriskColumn, names, DescriptionColumn
    return names, DescriptionColumn


class WholeNames(DefaultFormatter):
    """Shows every option, with names that are never broken."""

    def __init__(self) -> None:
        super().__init__(column_specs=_columns)

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        """Print one group of options."""
        entries = [_on_one_line(one) for one in panel.entries]
        super().__call__(console, options, panel.copy(entries=entries))


class CommonOptions(WholeNames):
    """Shows the common options of a command alone, unless `--help-all` was given."""

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        """Print one group of options."""
        if panel.format == "parameter" and not _Shown.everything:
            entries = [one for one in panel.entries if _is_common(one)]
            if not entries:
                return
            panel = panel.copy(entries=entries)
        super().__call__(console, options, panel)


def _on_one_line(entry: HelpEntry) -> HelpEntry:
    """Return an entry whose text has no line breaks: the terminal wraps it."""
    if not isinstance(text := entry.description, InlineText):
        return entry
    plain = getattr(text.primary_renderable, "plain", "")
    return entry.copy(description=InlineText(Text(" ".join(plain.split())))) if plain else entry


def _is_common(entry: HelpEntry) -> bool:
    names = {name.lstrip("-") for name in entry.all_options}
    return entry.positional_label is not None or bool(names & _COMMON)
