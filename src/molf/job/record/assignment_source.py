"""Read an assignment from a file, or from a run: the one that it wrote, or its routing log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.core.assignment.assigned import Decided, adapters_of
from molf.core.assignment.assignment import Assignment
from molf.core.assignment.patterns import Patterns
from molf.core.assignment.text import is_explicit, parse
from molf.core.config import MoLFConfig
from molf.errors import InputError
from molf.inputs import read_text
from molf.job.record.finished_run import FinishedRun, read_run
from molf.job.record.ownership import ASSIGNMENT
from molf.job.record.routing_arrays import read_evidence
from molf.job.record.routing_log import routing_parts
from molf.job.settings.resolved import ResolvedSettings
from molf.paths import check_path, expanded

if TYPE_CHECKING:
    from torch import nn

_MOST_BYTES = 50_000_000


@dataclass(frozen=True)
class AssignmentSource:
    """A file or run that an assignment is read from; checked as far as possible without a model.

    Attributes:
        path: The file or the run.
        values: Content of the file, or of the run's `assignment.yaml`; None for a routing log.
        run: The run whose routing log is read; None for a file.
    """

    path: Path
    values: Mapping[str, Any] | None
    run: FinishedRun | None

    def assignment(self, model: nn.Module, *, share: float | None = None) -> Assignment:
        """Return the assignment for a model.

        Args:
            model: The plain model that is to be trained, with or without values.
            share: For a routing log: that of `Assignment.of`.

        Raises:
            InputError: The model has other layers, or a pattern does not fit it.

        Warns:
            UserWarning: Layers without a pattern stay frozen because `default` is missing.
        """
        from molf.core.assignment.layout import Layout

        layout = Layout.of(model)
        try:
            if self.values is not None:
                return Assignment.of_values(self.values, layout)
            assert self.run is not None
            return Assignment.from_decisions(decided_in(self.run, layout), share=share)
        except ValueError as error:
            raise InputError(f"assignment {self.path}: {error}") from error


def read_assignment_source(path: str | Path, *, from_log: bool = False) -> AssignmentSource:
    """Read and check the content of a file, or that of a run.

    Args:
        path: The file or the run.
        from_log: Read the routing log of a run, also of one with an `assignment.yaml`.

    Raises:
        InputError: The path is missing, the content is no assignment, or the run has neither an
            assignment nor a routing log; or `from_log` and there is no routing log.
    """
    place = expanded(path)
    check_path(place, "assignment")
    if not place.is_dir():
        if from_log:
            raise InputError(
                f"assignment {place}: a share is for the routing log of a run, and this is a file. "
                "Leave share out."
            )
        return AssignmentSource(place, _values(place), None)
    run = read_run(place)
    if (place / ASSIGNMENT).is_file() and not from_log:
        return AssignmentSource(place, _values(place / ASSIGNMENT), None)
    routing_parts(place)
    return AssignmentSource(place, None, run)


def source_for(settings: ResolvedSettings) -> AssignmentSource | None:
    """Return the source of a training's assignment; None for other methods than hybrid.

    A resumed run takes its own `assignment.yaml`: the given file may have changed.

    Raises:
        InputError: As `read_assignment_source`.
    """
    if settings.assignment is None:
        return None
    own = settings.output_dir / ASSIGNMENT
    if settings.resume and own.is_file():
        return AssignmentSource(own, _values(own), None)
    return read_assignment_source(settings.assignment)


def read_assignment(
    path: str | Path, model: nn.Module | None = None, *, share: float | None = None
) -> Assignment:
    """Return the assignment of a file or a run.

    Args:
        path: A YAML file, as `Assignment.to_yaml` writes it or with patterns; or the directory of
            a run: its `assignment.yaml` if it has one (of method hybrid, a probe, or `molf
            advise`), or else its routing log, by which each layer gets the expert with the most
            wins.
        model: The plain model that is to be trained, with or without values. It may be left out for
            a file with one entry per layer.
        share: Read the routing log of the run in any case, and give `full` to this share of the
            routed layers instead, to those where its score leads most.

    Raises:
        InputError: The path is missing, its content is no assignment, or it is that of a model with
            other layers; or `share` was given, and there is no routing log.
    """
    source = read_assignment_source(path, from_log=share is not None)
    if model is not None:
        return source.assignment(model, share=share)
    if source.values is None or not is_explicit(source.values):
        what = "a routing log is" if source.values is None else "patterns are"
        raise InputError(f"assignment {source.path}: {what} read with model=, the plain model.")
    return Assignment.of_values(source.values, None)


def _values(path: Path) -> Mapping[str, Any]:
    """Return the content of a file, after all checks that need no model."""
    shown = f"assignment {path}"
    text = read_text(path, shown, most=_MOST_BYTES)
    try:
        values = parse(text)
        if is_explicit(values):
            Assignment.of_values(values, None)
        else:
            Patterns.of(values)
    except ValueError as error:
        raise InputError(f"{shown}: {error}") from error
    return values


def experts_of(run: FinishedRun) -> MoLFConfig:
    """Return ranks, alpha and scaling of a run's LoRA experts."""
    return MoLFConfig(
        ranks=tuple(run.config["ranks"]),
        alpha=tuple(run.config["alpha"]),
        use_rslora=run.config["use_rslora"],
        freeze_base=run.method == "molf-e",
    )


def decided_in(run: FinishedRun, layout: Any) -> Decided:
    """Return the decisions of a run's routing log.

    Args:
        run: A run of molf or molf-e.
        layout: `Layout` of the plain model.
    """
    config, evidence = run.config, read_evidence(run.path)
    freezes = run.method == "molf-e" if config.get("freeze_rest") is None else config["freeze_rest"]
    experts = experts_of(run)
    left_out = tuple(f"{name}." for name in config["run"]["model"].get("not_reached") or ())
    trained = {
        name
        for name in layout.layers
        if not freezes and name not in evidence and not f"{name}.".startswith(left_out)
    }
    frozen = [name for name in layout.rest if name.startswith(left_out)]
    return Decided(
        layers=layout.layers,
        heads=layout.heads,
        evidence=evidence,
        adapters=adapters_of(experts.lora_experts, experts.ranks, experts.scalings),
        trained=frozenset(trained),
        freeze_rest=bool(freezes),
        frozen_rest=() if freezes else tuple(frozen),
        model=layout.model,
        source=f"{run.path.name} (score {config.get('score')})",
    )
