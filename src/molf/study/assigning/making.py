"""Make the assignment of a trial: probe, decide, draw. Imports torch when it is called."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.disk.files import write_json, write_text
from molf.errors import InputError
from molf.job.record.contents import short_hash
from molf.job.record.ownership import read_json
from molf.shown import listed
from molf.study.assigning.rule import Rule
from molf.study.assigning.trial_rule import TrialRule
from molf.study.definition import Point, Study
from molf.study.identity import settings_key
from molf.study.running import (
    QuietReporter,
    alone,
    clear_leftovers,
    parameters_of,
    training_flops,
)

if TYPE_CHECKING:
    from torch import nn

    from molf.core.assignment.assignment import Assignment
    from molf.core.config import MoLFConfig
    from molf.job.inputs import Inputs
    from molf.job.settings.settings import TrainSettings

PROBES = "probes"


@dataclass(frozen=True)
class Cost:
    """The cost of a probe.

    Attributes:
        steps: Its steps; 0 without a probe.
        seconds: Its duration, with loading.
        flops: Estimated floating-point operations of its training.
    """

    steps: int = 0
    seconds: float = 0.0
    flops: int = 0


@dataclass(frozen=True)
class Made:
    """An assignment for a trial.

    Attributes:
        assignment: The assignment.
        cost: The cost of its probe, also if another trial paid it.
    """

    assignment: Assignment
    cost: Cost

    @property
    def training(self) -> list[Any]:
        """The parts that a training by it depends on, as JSON values: no evidence, no source."""
        return _training(self.assignment)


class AssignmentMaker:
    """Makes assignments. Trials of equal probes share one, in `probes/CELL/` of the study.

    Args:
        study: The study.
        inputs: Task and base model, kept between trials.
    """

    def __init__(self, study: Study, inputs: Inputs | None) -> None:
        self._study = study
        self._inputs = inputs

    def __call__(self, cell: str, trial_rule: TrialRule, point: Point, seed: int) -> Made:
        """Return the assignment of a trial.

        Args:
            cell: Its cell.
            trial_rule: Its rule.
            point: Its rates.
            seed: Its seed.

        Raises:
            InputError: The rule cannot be applied to the model.
            RunError: The probe failed.
        """
        if trial_rule.rule.has_probe:
            folder, cost = self._probe(cell, trial_rule, point)
            assignment = _decided(folder, trial_rule.rule)
        else:
            assignment, cost = without_probe(trial_rule.rule, trial_rule.routed_at(point)), Cost()
        if trial_rule.rule.random:
            with warnings.catch_warnings():
                # The columns of the row show it.
                warnings.filterwarnings("ignore", message="No other set of layers")
                assignment = assignment.random_like(seed)
        return Made(assignment, cost)

    def _probe(self, cell: str, trial_rule: TrialRule, point: Point) -> tuple[Path, Cost]:
        from molf.job.ahead.probe import probe

        key = settings_key(trial_rule.routed_at(point), ["probe", trial_rule.rule.steps])
        folder = self._study.output_dir / PROBES / cell / key
        record = folder.with_name(f"{key}.json")
        with alone(self._study, PROBES, cell, key):
            known = read_json(record)
            if isinstance(known, dict) and folder.is_dir():
                return folder, Cost(**known)
            clear_leftovers(folder)
            started = time.perf_counter()
            settings = trial_rule.probe_at(point, output_dir=folder, overwrite=True)
            found = probe(settings, reporter=QuietReporter(), inputs=self._inputs)
            flops = training_flops(parameters_of(folder), found.trained_parameters, found.tokens)
            seconds = round(time.perf_counter() - started, 2)
            cost = Cost(trial_rule.rule.steps, seconds, flops)
            write_json(record, vars(cost))  # last: a probe without it is not complete
        return folder, cost


def write_assignment(path: Path, assignment: Assignment) -> None:
    """Write the file that a trial is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, assignment.to_yaml())


def assignment_columns(path: Path) -> dict[str, Any]:
    """Return the columns of the assignment of a run in its row.

    `assignment` is `mixed`, or the one training of all layers: `all full`, `all lora`, `all
    frozen`. `full_weights` is the share of the layers' weights in full.

    Args:
        path: The run's `assignment.yaml`.
    """
    from molf.job.record.assignment_source import read_assignment

    assignment = read_assignment(path)
    kinds = {one.train for one in assignment.entries}
    return {
        "assignment": "mixed" if len(kinds) > 1 else f"all {kinds.pop()}",
        "full_layers": len(assignment.full),
        "lora_layers": len(assignment.lora),
        "full_weights": round(assignment.share, 6),
        "assignment_key": short_hash(_training(assignment)),
    }


def with_cost(row: Mapping[str, Any], cost: Cost) -> dict[str, Any]:
    """Return a row with the cost of its probe, which its time and its operations include.

    Args:
        row: The row, also one with the cost of another probe.
        cost: The cost.
    """
    made = dict(row)
    for total, part, value in (
        ("seconds", "probe_seconds", cost.seconds),
        ("training_flops", "probe_flops", cost.flops),
    ):
        made[total] = round(made[total] - (made.get(part) or 0) + value, 2)
        made[part] = value
    return {**made, "probe_steps": cost.steps}


def _training(assignment: Assignment) -> list[Any]:
    layers = [[one.name, one.train, one.r, one.alpha] for one in assignment.entries]
    return [layers, assignment.use_rslora, assignment.freeze_rest, list(assignment.frozen_rest)]


def _decided(folder: Path, rule: Rule) -> Assignment:
    from molf.job.advice.advice import advise
    from molf.job.record.finished_run import read_run

    return advise(read_run(folder), share=rule.share, by=rule.by).assignment


def without_probe(rule: Rule, settings: TrainSettings) -> Assignment:
    """Return the assignment by shape or by patterns of the layers that a method molf routes.

    Other layers belong to the rest, as in an assignment by a probe.

    Args:
        rule: A rule without a probe.
        settings: Those of its method molf.

    Raises:
        InputError: The patterns do not fit the model or the experts.
    """
    from molf.core.assignment.assignment import Assignment
    from molf.core.model.linear_layers import trainable_layers
    from molf.job.model.loading import load_skeleton
    from molf.job.run import checked

    resolved = checked(settings, datetime.now())
    config = resolved.method_config
    assert config is not None  # of method molf
    model = load_skeleton(resolved.model)
    routed = {layer.name for layer in trainable_layers(model, config)}
    freezes = bool(resolved.freeze_rest)
    start = Assignment.from_patterns(model, {"default": "full", "freeze_rest": freezes})
    if rule.full:
        made = _by_patterns(model, rule, config).with_options(freeze_rest=freezes)
        _check_routed(rule, [layer.name for layer in made.full], routed)
    else:
        lr, lora_lr = resolved.learning_rate, resolved.lora_learning_rate
        made = start.by_shape(config, lr=lr, lora_lr=lora_lr)
    others = start.without(layer.name for layer in start.entries) if freezes else start
    entries = tuple(made[name] if name in routed else others[name] for name in made.layers)
    return replace(made, entries=entries)


def _by_patterns(model: nn.Module, rule: Rule, config: MoLFConfig) -> Assignment:
    """Return the assignment by patterns of the layers in full; others get the one LoRA expert.

    A rank above a layer's smaller side becomes that side, as in an assignment by a probe.
    """
    from molf.core.assignment.assigned import FULL, LORA, Treatment
    from molf.core.assignment.assignment import Assignment
    from molf.core.assignment.choice import with_treatments

    if len(config.ranks) > 1:
        raise InputError(
            f"assignment, full: {rule.of} has {len(config.ranks)} LoRA experts, and each other "
            "layer gets one. Give a method with one rank."
        )
    try:
        named = Assignment.from_patterns(model, {"full": list(rule.full), "default": "frozen"})
    except ValueError as error:
        raise InputError(f"assignment, full: {error}") from error
    lora = Treatment(LORA, config.ranks[0], float(config.alphas[0]))
    treatments = {
        layer.name: Treatment(FULL) if layer.train == FULL else lora for layer in named.entries
    }
    entries = with_treatments(named.entries, treatments, use_rslora=config.use_rslora)
    return replace(named, entries=entries, use_rslora=config.use_rslora)


def _check_routed(rule: Rule, full: Sequence[str], routed: Collection[str]) -> None:
    if others := [name for name in full if name not in routed]:
        raise InputError(
            f"assignment, full: {listed(others, 2)} {'is' if len(others) == 1 else 'are'} not "
            f"routed by {rule.of}. Give patterns of layers that it routes."
        )
