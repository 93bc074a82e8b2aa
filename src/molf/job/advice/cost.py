"""The memory and arithmetic of an assignment, beside those of other methods."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

from molf.core.assignment.assigned import FULL, AssignedLayer
from molf.core.assignment.assignment import Assignment
from molf.errors import InputError
from molf.job.record.finished_run import FinishedRun
from molf.job.record.ownership import ENVIRONMENT, read_json
from molf.job.record.run_settings import settings_of
from molf.job.settings.planned import workload_of
from molf.job.settings.resolved import ResolvedSettings
from molf.planning.memory import Planner
from molf.planning.workload import Workload

COMPARED = ("fft", "molf", "lora", "hybrid")


@dataclass(frozen=True)
class MethodCost:
    """The cost of training one model by one method.

    Attributes:
        method: The method.
        trained: Number of trained parameters.
        peak: Planned peak memory of the device, in bytes.
        operations: Floating-point operations of the routed or assigned linear layers per token,
            forward and backward.
    """

    method: str
    trained: int
    peak: int
    operations: float

    def record(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Costs:
    """The costs of the compared methods for one workload.

    Attributes:
        workload: Shape and storage of the steps.
        methods: The costs, full fine-tuning first.
    """

    workload: Workload
    methods: tuple[MethodCost, ...]

    def of(self, method: str) -> MethodCost:
        """Return the cost of a method."""
        return next(one for one in self.methods if one.method == method)


def known_costs(run: FinishedRun, assignment: Assignment) -> Costs | None:
    """Return the result of `plan_costs`, or None with a warning: advice does not depend on it.

    Warns:
        UserWarning: The model cannot be planned.
    """
    try:
        return plan_costs(run, assignment)
    except InputError as error:
        warnings.warn(f"The cost is not planned: {error}", stacklevel=2)
        return None


def plan_costs(run: FinishedRun, assignment: Assignment) -> Costs:
    """Plan fft, molf, lora and hybrid with the options of a run.

    The storage options of a probe are replaced by the defaults of `molf train`.

    Args:
        run: A run of molf or molf-e.
        assignment: The assignment of its layers.

    Raises:
        InputError: The model cannot be planned.
    """
    from molf.job.model.config import read_config

    settings = settings_of(run)
    if run.is_probe:
        settings = _as_trained(settings)
    config = read_config(settings.model)
    planner = Planner(config)
    longest = (run.config["run"].get("data") or {}).get("longest_tokens")
    if settings.packing:  # rows are as long as allowed
        longest = None
    batch = settings.per_device_train_batch_size
    tokens = batch * settings.gradient_accumulation_steps * (longest or settings.max_length)
    costs, workload = [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user has not chosen these methods
        for method in COMPARED:
            workload = workload_of(
                _with_method(settings, method, assignment),
                length=longest or settings.max_length,
                padded=batch > 1,
                device=_device(run),
                quantised=None,
            )
            costs.append(
                MethodCost(
                    method=method,
                    trained=planner.shape(workload).trained,
                    peak=planner.memory(workload).peak,
                    operations=sum(
                        _operations(method, layer, settings.ranks or (), tokens)
                        for layer in assignment.entries
                    ),
                )
            )
    assert workload is not None
    return Costs(workload, tuple(costs))


def _device(run: FinishedRun) -> str:
    """Return the kind of device that the run was on, as plans name it."""
    environment = read_json(run.path / ENVIRONMENT)
    device = environment.get("device") if isinstance(environment, dict) else None
    kind = device.get("type") if isinstance(device, dict) else None
    return "cuda" if kind == "cuda" else "cpu"


def _as_trained(settings: ResolvedSettings) -> ResolvedSettings:
    """Return a probe's settings with the storage of a training."""
    return replace(
        settings,
        dtype="float32",
        optimizer_in_backward=False,
        state_dtype="float32",
        state_offload=False,
        weight_rounding=None,
    )


def _with_method(
    settings: ResolvedSettings, method: str, assignment: Assignment
) -> ResolvedSettings:
    """Return the settings for another method."""
    options: dict[str, Any] = {"method": method, "score": "epd", "top_k": 1, "freeze_rest": None}
    if method == "lora":  # one adapter of the summed rank
        options |= {"alpha": None}
    if method == "molf":
        options |= {"lora_dropout": 0.0}
    if method == "hybrid":
        # The path stands for the assignment, which is not read from it.
        options |= {"assignment": "assignment", "assigned": assignment, "lora_dropout": 0.0}
    return replace(settings, **options)


def _operations(method: str, layer: AssignedLayer, ranks: tuple[int, ...], tokens: int) -> float:
    """Return the floating-point operations of one layer per token.

    A product with the weight takes 2 per element: forward, gradient of the input, and gradient of
    the weight if that is trained. The products of a LoRA adapter take as much per element of its
    factors. MoLF's optimizer multiplies the gradient with the factors once per step, and adds one
    product of factors to the weight.

    Args:
        method: The method.
        layer: The layer.
        ranks: Ranks of the LoRA experts; a LoRA adapter has their sum.
        tokens: Tokens of a step.
    """
    weights, rank = layer.weights, sum(ranks)
    if method == "fft" or (method == "hybrid" and layer.train == FULL):
        return 6.0 * weights
    if method == "molf":
        return 6.0 * weights + 8.0 * rank * weights / tokens
    factors = rank * sum(layer.shape) if method == "lora" else layer.factors
    return 4.0 * weights + 6.0 * factors
