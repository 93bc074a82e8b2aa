"""What one training step takes beyond the weights, found by running it on tensors without data.

The forward and backward pass are those of TRL's `SFTTrainer`, the step is the optimizer's own: what
they allocate is counted, so that architecture, attention, loss, checkpointing and the optimizer's
temporaries need no formulas.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molf.core.blocks import BLOCKS, Blocks
from molf.core.eager import Eager
from molf.core.unit_optimizer import UnitOptimizer
from molf.errors import InputError
from molf.plan.host_memory import pinned_bytes
from molf.plan.live_bytes import LiveBytes
from molf.plan.trainable import Trainable, trainable
from molf.plan.workload import Workload

_HEAD_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks of the fused head
_MOST_BLOCKS = 300


@dataclass(frozen=True)
class PassTrace:
    """The memory peak of a forward and backward pass, bytes beyond weights and optimizer state.

    Attributes:
        gradients: Gradients of parameters that were there at the peak.
        activations: All else: saved activations and temporaries.
    """

    gradients: int
    activations: int


@dataclass(frozen=True)
class StepTrace:
    """What the optimizer holds and takes, in bytes.

    Attributes:
        gradients: Gradients of all trained parameters.
        moments: First and second moments of all experts and of what is not routed, and the low
            halves of bfloat16 weights.
        factors: LoRA factors that the optimizer keeps (molf); an adapter's are weights.
        pinned: What moments and factors take in pinned host memory, if they live there.
        transient: Temporaries at the peak of a step; states lent from host memory are among them.
    """

    gradients: int
    moments: int
    factors: int
    pinned: int
    transient: int


def trace_pass(config: Any, workload: Workload) -> PassTrace:
    """Run a forward and backward pass of one batch.

    Args:
        config: The model's transformers configuration.
        workload: Method, shape and types.

    Raises:
        InputError: The model cannot be made, or its forward pass depends on the data's values.
    """
    with trainable(config, workload) as made, _trl_head(made, workload):
        if workload.checkpointing:
            _checkpoint(made.model)
        if workload.accumulates:
            _give_gradients(made)
        if workload.steps_in_backward:
            return _trace_steps_in_backward(config, made, workload)
        counter = LiveBytes(_tensors(made))
        if not workload.accumulates:
            for parameter in made.trained:
                parameter.register_post_accumulate_grad_hook(counter.count_gradient)
        gc.collect()  # what other models left behind must not be freed, and subtracted, meanwhile
        with counter:
            _run_pass(config, made.model, workload, counter)
        kept = _bytes(p.grad for p in made.trained) if workload.accumulates else 0
        return PassTrace(
            gradients=kept + counter.gradients_at_peak,
            activations=counter.peak - counter.gradients_at_peak,
        )


def trace_step(config: Any, workload: Workload) -> StepTrace:
    """Take two steps of the optimizer: the full experts win one, the LoRA experts the other.

    Raises:
        InputError: The model cannot be made, or no layer can be adapted.
    """
    with trainable(config, workload) as made, _blocks(made, workload):
        if workload.steps_in_backward:  # what a step takes beside the state is the pass's
            _make_state(made)
            return StepTrace(0, *_state_bytes(made.optimizer), 0)
        _give_gradients(made)
        # The host reads equal scores, so the first experts win.
        counter = LiveBytes(_tensors(made), scalar=0.5)
        with counter:
            made.optimizer.step()  # this one makes the state as well, which is there at its end
            transient = counter.peak - counter.now
            if workload.offloads:  # the second one knows what to fetch ahead
                made.optimizer.step()
                transient = max(transient, counter.peak - counter.now)
            _let_lora_win(made.optimizer)
            counter.reset_peak()
            made.optimizer.step()
            transient = max(transient, counter.peak - counter.now)
        state = _state_bytes(made.optimizer)
        return StepTrace(_bytes(p.grad for p in made.trained), *state, transient)


def _trace_steps_in_backward(config: Any, made: Trainable, workload: Workload) -> PassTrace:
    """Passes in which layers move: the full experts win the first, the LoRA experts another."""
    with _blocks(made, workload):
        _make_state(made)
        if isinstance(made.optimizer, UnitOptimizer) and made.optimizer.offload is not None:
            made.optimizer.offload.forget_order()  # trainings have taken no step outside of a pass
        counter = LiveBytes(_tensors(made))
        gc.collect()
        with counter:
            _run_pass(config, made.model, workload, counter, scalar=0.5)
            made.optimizer.step()
            if workload.offloads:  # the second one knows what to fetch ahead
                _run_pass(config, made.model, workload, counter, scalar=0.5)
                made.optimizer.step()
            if _let_lora_win(made.optimizer):
                _run_pass(config, made.model, workload, counter, scalar=0.5)
    return PassTrace(gradients=0, activations=counter.peak)


def _run_pass(
    config: Any, model: Any, workload: Workload, counter: LiveBytes, scalar: float | None = None
) -> None:
    """The forward and backward pass of SFTTrainer's training step.

    Args:
        config: The model's configuration, for messages.
        model: The model.
        workload: Shape and types.
        counter: Of the bytes.
        scalar: What the host reads in the backward pass.
    """
    inputs = _inputs(workload)  # alive in the backward pass too, as a trainer's batch is
    try:
        loss = _loss(model, inputs, bf16=workload.bf16)
        counter.scalar = scalar
        loss.backward()
    except Exception as error:  # models fail in ways of their own without data
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"The forward and backward pass of {config.model_type} cannot be planned "
            f"without data: {reason}"
        ) from error
    finally:
        counter.scalar = None


def _inputs(workload: Workload) -> dict[str, Tensor]:
    """A batch. Without a mask, transformers lets attention be causal, as for one of ones alone."""
    ids = torch.zeros(workload.batch_size, workload.length, dtype=torch.long)
    mask = {"attention_mask": torch.ones_like(ids)} if workload.padded else {}
    return {"input_ids": ids, "labels": ids, **mask}


def _loss(model: Any, inputs: dict[str, Tensor], *, bf16: bool) -> Tensor:
    """The loss of SFTTrainer's training step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    loss: Tensor = -outputs.log_probs.sum() / inputs["input_ids"].numel()
    return loss


@contextmanager
def _trl_head(made: Trainable, workload: Workload) -> Iterator[None]:
    """Give the model SFTTrainer's output head, which makes no logits of the whole batch."""
    from trl.kernels import chunked_logprob
    from trl.trainer.utils import add_fused_lm_head

    model = made.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_fused_lm_head(inner, outputs=_HEAD_OUTPUTS)
    with ExitStack() as stack:
        if workload.device == "cuda":
            # There, kernels fold a tile of logits where it lies; the CPU makes copies of it.
            for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
                stack.enter_context(_replaced(chunked_logprob, name, lambda *_, **__: None))
        yield


@contextmanager
def _blocks(made: Trainable, workload: Workload) -> Iterator[None]:
    """Let the optimizer go through tensors as it does on the planned device."""
    threads = torch.get_num_threads()
    elements = -(-BLOCKS.elements // threads)
    if workload.device == "cpu":
        # Thousands of blocks would take minutes; a block of 1 in 300 weighs little either.
        least = sum(p.numel() for p in made.trained) // _MOST_BLOCKS // threads
        elements = max(BLOCKS.cpu_elements, least)
    with _in_blocks_of(made.optimizer, elements):
        yield


@contextmanager
def _in_blocks_of(optimizer: torch.optim.Optimizer, elements: int) -> Iterator[None]:
    """Have an optimizer go through tensors in blocks of so many elements; torch's has no blocks."""
    if not isinstance(optimizer, UnitOptimizer):
        yield
        return
    with _replaced(optimizer, "executor", Eager(Blocks(cpu_elements=elements))):
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _checkpoint(model: Any) -> None:
    """Recompute activations, as the trainer would."""
    # transformers renamed it; the old name warns, the new one is not in 5.13.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        enable({"use_reentrant": False})
    if hasattr(model, "get_base_model"):
        model.enable_input_require_grads()


def _let_lora_win(optimizer: torch.optim.Optimizer) -> bool:
    """Have LoRA experts take the next step where the optimizer routes and they can; can any?"""
    groups = [
        group
        for group in optimizer.param_groups
        if group.get("layer") is not None and group["top_k"] <= len(group["ranks"])
    ]
    for group in groups:
        group["score"] = "lora"
    return bool(groups)


def _give_gradients(made: Trainable) -> None:
    for parameter in made.trained:
        dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
        parameter.grad = torch.empty_like(parameter, dtype=dtype)


def _make_state(made: Trainable) -> None:
    """Take a step outside of a backward pass, so that the state is there in the next one."""
    _give_gradients(made)
    # What it takes is not asked for: whole tensors, not blocks, are the fewest operations.
    with _in_blocks_of(made.optimizer, 1 << 40), LiveBytes(scalar=0.5):
        made.optimizer.step()


def _tensors(made: Trainable) -> list[Tensor]:
    model: nn.Module = made.model
    tensors = [*model.parameters(), *model.buffers()]
    for state in made.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return tensors + [p.grad for p in made.trained if p.grad is not None]


def _state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Bytes of moments (scalar counters included), of factors, and of both in pinned memory."""
    moments = factors = pinned = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                size = value.untyped_storage().nbytes()
                if name in ("lora_A", "lora_B"):
                    factors += size
                else:
                    moments += size
                pinned += pinned_bytes(value)
    return moments, factors, pinned


def _bytes(tensors: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)
