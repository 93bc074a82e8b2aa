"""Extract the change of a run as one LoRA adapter, measure its losses, and write it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molf.disk.files import write_json, write_text
from molf.errors import InputError
from molf.job.extract.adapter import (
    Kept,
    keepable,
    kept_values,
    make_adapter,
    write_adapter,
)
from molf.job.extract.change import (
    Factors,
    LayerChange,
    RestChange,
    as_written,
    changes_of_rest,
    check_same_layers,
    factorise,
    largest_rank,
    replace_by_factors,
    set_parameters,
)
from molf.job.inputs import Inputs
from molf.job.model.export import marker
from molf.job.model.loading import LoadedModel, load_model, load_skeleton, move
from molf.job.model.low_halves import read_low_halves
from molf.job.model.saved_tensors import file_state
from molf.job.model.saving import saving
from molf.job.progress import Reporter
from molf.job.record.finished_run import FinishedRun
from molf.job.record.markdown import code, front_matter
from molf.job.record.ownership import ADAPTER, LOW_HALVES, MODEL
from molf.job.record.result import evaluation_record
from molf.job.record.run_settings import settings_of
from molf.measure import Evaluation, EvaluationSettings, evaluate
from molf.measure.metric import Metric
from molf.shown import counted
from molf.tasks import Task

TRAINED, WITH_REST, AS_WRITTEN, ALONE = (
    "model",
    "adapter, all of the rest",
    "adapter as written",
    "adapter alone",
)
"""The measured models: that of the run; factors instead of its change of linear layers, with all
other changes, with those that the adapter holds, and without any."""

RECORD = "extraction.json"
"""File in the adapter's directory with the errors of all layers and the changes of the rest."""

_LOST = 0.5  # error of a kept parameter above which most of its change is lost


@dataclass
class Extraction:
    """An adapter that was extracted from a run, and the parts of the change that it lacks.

    Attributes:
        run: The run.
        rank: The requested rank.
        layers: The changed linear layers, which the adapter holds.
        rest: The other changed parameters.
        kept: Those of these that the adapter holds.
        metrics: Metrics by measured model: `TRAINED`, `WITH_REST`, `AS_WRITTEN`, `ALONE`.
    """

    run: FinishedRun
    rank: int
    layers: tuple[LayerChange, ...]
    rest: tuple[RestChange, ...]
    kept: Kept
    metrics: dict[str, dict[str, Metric]] = field(default_factory=dict)

    @property
    def left_out(self) -> tuple[RestChange, ...]:
        """The changed parameters that the adapter does not hold."""
        return tuple(one for one in self.rest if one.name not in self.kept.names)

    def record(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "run": self.run.path.resolve().name,
            "rank": self.rank,
            "layers": [one.record() for one in self.layers],
            "rest": [{**one.record(), "kept": one.name in self.kept.names} for one in self.rest],
            "modules_to_save": list(self.kept.modules),
            "metrics": {
                model: evaluation_record(Evaluation(metrics))
                for model, metrics in self.metrics.items()
            },
        }


def check_rank(run: FinishedRun, rank: int) -> None:
    """Check the rank against the layers of the run's base, from its configuration.

    Raises:
        InputError: It exceeds the smaller side of every layer, or the base is missing.
    """
    largest = largest_rank(load_skeleton(str(run.base)))
    if rank > largest:
        raise InputError(
            f"Invalid rank={rank}. Must be at most {largest}: that rank holds every change of the "
            f"linear layers of {run.base} exactly."
        )


def extract(
    run: FinishedRun,
    rank: int,
    dtype: str,
    path: Path,
    *,
    keeps_modules: bool,
    evaluates: bool,
    reporter: Reporter,
) -> Extraction:
    """Extract, measure and write an adapter.

    Args:
        run: A run with a model, of any method.
        rank: Rank of the adapter.
        dtype: Type of its weights; errors and metrics are those of the rounded numbers.
        path: The adapter's directory, checked by `extraction_place`.
        keeps_modules: Keep changed norms, embeddings and biases in the adapter too.
        evaluates: Measure the model, the adapter with all of the rest, and the adapter alone on
            the task of the run.
        reporter: Shows the progress.

    Raises:
        InputError: The rank exceeds all layers, the base is missing or has other layers, no linear
            layer changed, or the task's data is missing.
        SaveError: It could not be written; an earlier export is unchanged.
    """
    check_rank(run, rank)
    settings = settings_of(run)
    task = Inputs().task(settings.task_options) if evaluates else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tuned = load_model(str(run.base)), load_model(str(run.path / MODEL))
    check_same_layers(base.model, tuned.model, str(run.base))
    _add_low_halves(run, tuned)
    layers, factors = [], {}
    reporter.say(f"Decomposing the change of {run.path} at rank {rank}")
    numbers = getattr(torch, dtype)
    for layer, one in factorise(base.model, tuned.model, rank, numbers, device):
        layers.append(layer)
        factors[layer.name] = one
    rest = tuple(changes_of_rest(base.model, tuned.model))
    if not layers:
        raise InputError(
            f"{run.path}: no linear layer that an adapter can hold differs from {run.base}, so "
            "there is nothing to extract."
        )
    kept = keepable(base.model, layers, rest) if keeps_modules else Kept()
    values = kept_values(tuned.model, kept, numbers)
    rest = tuple(
        as_written(one, base.model, tuned.model, values[one.name])
        if one.name in kept.names
        else one
        for one in rest
    )
    made = Extraction(run, rank, tuple(layers), rest, kept)
    if task is not None:
        measure = _measurement(run, task, tuned, device, reporter)
        made.metrics = _measured(made, base.model, tuned.model, factors, values, measure)
    adapted = make_adapter(base.model, factors, layers, rank, kept, values)
    if made.left_out:
        warnings.warn(_lacking(made), stacklevel=2)
    if lost := [one for one in rest if one.name in kept.names and one.error > _LOST]:
        warnings.warn(
            f"{dtype} rounds away most of the change of {counted(len(lost), 'parameter')} that the "
            f"adapter keeps ({_kinds(lost)}). --dtype float32 keeps it.",
            stacklevel=2,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(one.A.nbytes + one.B.nbytes for one in factors.values())
    with saving(path, size) as directory:
        write_adapter(adapted, str(run.base), numbers, directory)
        write_json(directory / RECORD, made.record())
        write_text(directory / "README.md", _card(made))
        marker(run, ADAPTER, numbers)(directory)
    return made


def _add_low_halves(run: FinishedRun, tuned: LoadedModel) -> None:
    """Restore the float32 weights of the training, where the run kept what rounding took away."""
    if not (run.path / LOW_HALVES).is_file():
        return
    halves = read_low_halves(run.path / LOW_HALVES)
    state = file_state(tuned.model)
    for name in state.keys() & halves.tensors.keys():
        high, low = state[name].bfloat16(), halves.tensors[name]
        joined = halves.rounding.join(high.flatten(), low.flatten(), name)
        state[name] = joined.view_as(high)
    # Files hold the fused weights of experts in parts; loading fuses them again.
    tuned.model = type(tuned.model).from_pretrained(
        None, config=tuned.model.config, state_dict=state, dtype=torch.float32
    )


def _measurement(
    run: FinishedRun, task: Task, tuned: LoadedModel, device: torch.device, reporter: Reporter
) -> Callable[[str], dict[str, Metric]]:
    """Return a function that measures the trained model as it then is, with the run's settings."""
    settings = settings_of(run)
    chosen = EvaluationSettings.of(settings)
    text = task.forgetting_text(settings.forgetting_data)

    def measure(title: str) -> dict[str, Metric]:
        move(tuned.model, device)
        with reporter.evaluating(title) as show:
            found: Evaluation = evaluate(tuned.model, tuned.tokenizer, task, text, chosen, show)
        return dict(found.metrics)

    return measure


def _measured(
    made: Extraction,
    base: Any,
    tuned: Any,
    factors: dict[str, Factors],
    values: Mapping[str, Tensor],
    measure: Callable[[str], dict[str, Metric]],
) -> dict[str, dict[str, Metric]]:
    """Return the metrics of the trained model, which becomes the adapted base step by step."""
    trained, start = (dict(one.named_parameters()) for one in (tuned, base))
    found = {TRAINED: measure("Evaluating the model of the run")}
    replace_by_factors(tuned, base, factors)
    found[WITH_REST] = measure(f"Evaluating rank {made.rank}, with the rest of the change")
    lacking = [one.name for one in made.left_out]
    is_rounded = any(not torch.equal(trained[name].cpu(), values[name]) for name in made.kept.names)
    set_parameters(tuned, {**{name: start[name] for name in lacking}, **values})
    if lacking or is_rounded:
        name = AS_WRITTEN if values else ALONE
        found[name] = measure("Evaluating the adapter as it is written")
    if values:
        set_parameters(tuned, {name: start[name] for name in values if name in start})
        found[ALONE] = measure("Evaluating the adapter without any of the rest")
    return found


def _lacking(made: Extraction) -> str:
    way_out = "An adapter cannot hold them." if made.kept.names else "--modules_to_save keeps them."
    return (
        f"The adapter leaves out {counted(len(made.left_out), 'changed parameter')} outside of the "
        f"linear layers ({_kinds(made.left_out)}). {way_out}"
    )


def _kinds(rest: Iterable[RestChange]) -> str:
    kinds = Counter(one.kind for one in rest)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _card(made: Extraction) -> str:
    base = str(made.run.base)
    front: dict[str, Any] = {"library_name": "peft", "tags": ["molf"]}
    if not Path(base).is_dir():
        front["base_model"] = base
    lacking = len(made.left_out)
    return "\n".join(
        [
            front_matter(front),
            f"# {code(made.run.path.resolve().name)}: adapter of rank {made.rank}",
            "",
            f"The change of a model trained from {code(Path(base).name)} with molf, method "
            f"`{made.run.method}`, extracted by truncated SVD of W - W0. Loads with PEFT alone. "
            f"`{RECORD}` has the error of each layer.",
            "",
            f"It leaves out {lacking} changed parameters outside of the adapted layers."
            if lacking
            else "It leaves out no changed parameter.",
            "",
        ]
    )
