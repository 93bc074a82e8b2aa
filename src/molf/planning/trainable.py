"""Make a method's model and optimizer on tensors without data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from molf.core.adamw import AdamW
from molf.core.assignment.model import with_assignment
from molf.core.model.linear_layers import trainable_layers
from molf.core.model.peft_model import with_adapter
from molf.core.optimizer import MoLFAdamW
from molf.core.options import OptimizerOptions
from molf.core.storage.offload import StateOffload
from molf.planning.host_memory import PlannedCarrier
from molf.planning.model_class import make_skeleton
from molf.planning.quantised_base import quantise
from molf.planning.reach import Reach, find_reach
from molf.planning.workload import Workload


class Trainable(NamedTuple):
    """A model and its optimizer.

    Attributes:
        model: The model, with its PEFT adapter if the method has one.
        optimizer: The optimizer of `molf train`.
    """

    model: Any
    optimizer: torch.optim.Optimizer

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that get gradients."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def skeleton(config: Any, dtype: str = "float32") -> Any:
    """Create a transformers model on the meta device, with names and shapes but no memory.

    Args:
        config: The model's transformers configuration.
        dtype: Type of the weights, instead of the configuration's.

    Raises:
        InputError: The configuration is not that of a model that generates text.
    """
    with torch.device("meta"):
        return make_skeleton(config, dtype=getattr(torch, dtype))


def freeze(model: nn.Module, modules: tuple[str, ...]) -> None:
    """Freeze the named modules of a plain model, which text input does not reach."""
    for name in modules:
        model.get_submodule(name).requires_grad_(False)


def find_reach_of(config: Any) -> Reach:
    """Find the modules of a multimodal model that text input does not reach, without data.

    Empty for other models, and where the forward pass needs data.
    """
    # A text model has no part that text does not reach; the pass takes seconds.
    if not config.sub_configs:
        return Reach()
    ids = torch.zeros(1, 16, dtype=torch.long)
    with _silent("torch._subclasses.fake_tensor"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = skeleton(config)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                _leave_meta(model)
                return find_reach(model, lambda: model(input_ids=ids, use_cache=False))
        except Exception:  # operations that read data raise errors of many types
            return Reach()


@contextmanager
def trainable(config: Any, workload: Workload) -> Iterator[Trainable]:
    """Yield a model and its optimizer on tensors with shape, type and device, but no memory.

    Operations inside the context compute nothing.

    Args:
        config: The model's transformers configuration.
        workload: The planned training.

    Raises:
        InputError: The model cannot be made, or no layer can be adapted.
    """
    with warnings.catch_warnings(), _silent("torch._subclasses.fake_tensor"):
        warnings.simplefilter("ignore")  # `describe_model` gives the relevant ones once
        model = skeleton(config, workload.dtype)
        freeze(model, workload.unreached)
        model = _with_adapter(model, workload)
        # Constants that the model's code creates are real tensors; they are small.
        with FakeTensorMode(allow_non_fake_inputs=True):
            _leave_meta(model)
            optimizer = _optimizer(model, workload)
            if isinstance(optimizer, AdamW) and workload.offloads:
                # Its host memory is the meta device, which is not counted.
                optimizer.offload = StateOffload(lambda _: PlannedCarrier())
            if workload.quantised is not None:
                compute = torch.bfloat16 if workload.bf16 else torch.float32
                full = workload.assignment.full if workload.assignment else ()
                quantise(model, workload.quantised, compute, {layer.name for layer in full})
            yield Trainable(model.train(), optimizer)


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Disable a logger, which would print a traceback in addition to the raised error."""
    found = logging.getLogger(logger)
    before = found.disabled
    found.disabled = True
    try:
        yield
    finally:
        found.disabled = before


def _with_adapter(model: Any, workload: Workload) -> Any:
    """Return the model, on the meta device, with the method's adapter if it has one."""
    config = workload.config
    with torch.device("meta"):
        if workload.assignment is not None:
            return with_assignment(
                model,
                workload.assignment,
                use_dora=workload.use_dora,
                lora_dropout=workload.lora_dropout,
            )
        if config is None or not workload.has_adapter:
            return model
        if workload.method != "lora":
            return with_adapter(model, config)
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.ranks[0],
            lora_alpha=config.alphas[0],
            use_rslora=config.use_rslora,
            lora_dropout=config.lora_dropout,
            target_modules=[
                layer.name for layer in trainable_layers(model, config, in_adapter=True)
            ],
        )
        return get_peft_model(model, lora)


def _leave_meta(model: nn.Module) -> None:
    """Replace tensors on the meta device by tensors on the CPU."""
    # Not `Module.to_empty`, which unties shared tensors.
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = (
                        nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    )
                table[name] = made[tensor]


def _optimizer(model: nn.Module, workload: Workload) -> torch.optim.Optimizer:
    # The planned tensors are not on CUDA, so `trainable` sets up the offload.
    options = replace(OptimizerOptions.of(workload), state_offload=False)
    if workload.method == "molf-e":  # PEFT's factors are float32
        options = replace(options, weight_rounding=None)
    if workload.state_dtype == "8bit":
        _make_tables()
    if workload.method in ("molf", "molf-e"):
        return MoLFAdamW.from_model(model, workload.config, **options.as_keywords())
    if workload.assignment is not None:
        return _assigned_optimizer(model, workload, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if workload.method == "fft" and not workload.is_plain(workload.dtype):
        return AdamW(trained, **options.as_keywords())
    return torch.optim.AdamW(trained, fused=True)


def _assigned_optimizer(
    model: nn.Module, workload: Workload, options: OptimizerOptions
) -> torch.optim.Optimizer:
    """Return the optimizer that `molf.job.methods.hybrid` chooses."""
    assert workload.assignment is not None
    if workload.is_plain(workload.dtype):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, fused=True)
    if not workload.trains_dense:
        options = replace(options, weight_rounding=None)
    return AdamW.from_assignment(model, workload.assignment, **options.as_keywords())


def _make_tables() -> None:
    """Take a real step with 8-bit moments, so that torchao's cached tables have data."""
    with unset_fake_temporarily():
        parameter = nn.Parameter(torch.zeros(16, 256))  # matrices alone have 8-bit moments
        parameter.grad = torch.zeros_like(parameter)
        AdamW([parameter], state_dtype="8bit").step()
