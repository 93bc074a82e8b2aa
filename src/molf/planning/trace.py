"""Count the memory of a training step beyond the weights, by running it on tensors without data.

The pass is that of TRL's `SFTTrainer`, and the step that of the real optimizer. Therefore no
formulas for architecture, attention, loss, checkpointing or temporaries are needed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molf.core.arithmetic.blocks import BLOCKS, Blocks
from molf.core.execute.eager import Eager
from molf.core.schedule.unit_optimizer import UnitOptimizer
from molf.errors import InputError, reason_of
from molf.planning.host_memory import pinned_bytes
from molf.planning.live_bytes import LiveBytes
from molf.planning.trainable import Trainable, trainable
from molf.planning.workload import Workload

_HEAD_OUTPUTS = ("log_probs", "entropy", "is_top1")  # SFTTrainer's outputs of the fused head
_MOST_BLOCKS = 300


@dataclass(frozen=True)
class PassTrace:
    """The memory peak of a forward and backward pass, in bytes without weights and state.

    Attributes:
        gradients: Gradients of parameters at the peak.
        activations: The rest: saved activations and temporaries.
    """

    gradients: int
    activations: int


@dataclass(frozen=True)
class StepTrace:
    """The memory of the optimizer and its step, in bytes.

    Attributes:
        gradients: Gradients of all trained parameters.
        moments: First and second moments, and the low halves of bfloat16 weights.
        factors: LoRA factors that the optimizer keeps (molf); an adapter's are weights.
        pinned: Size of moments and factors in pinned host memory, with offload.
        transient: Temporaries at the peak of a step, including device copies of offloaded state.
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
        gc.collect()  # garbage of other models, freed during the count, would be subtracted
        with counter:
            _run_pass(config, made.model, workload, counter)
        kept = _bytes(p.grad for p in made.trained) if workload.accumulates else 0
        return PassTrace(
            gradients=kept + counter.gradients_at_peak,
            activations=counter.peak - counter.gradients_at_peak,
        )


def trace_step(config: Any, workload: Workload) -> StepTrace:
    """Take one step in which the full experts win, and one in which the LoRA experts win.

    Raises:
        InputError: The model cannot be made, or no layer can be adapted.
    """
    with trainable(config, workload) as made, _blocks(made, workload):
        if workload.steps_in_backward:  # gradients and temporaries are counted in the pass
            _make_state(made)
            return StepTrace(0, *_state_bytes(made.optimizer), 0)
        _give_gradients(made)
        # All scores that the host reads are equal, so the first experts win.
        counter = LiveBytes(_tensors(made), scalar=0.5)
        with counter:
            made.optimizer.step()  # creates the state, which `now` includes afterwards
            transient = counter.peak - counter.now
            if workload.offloads:  # from the second step on, state is fetched ahead
                made.optimizer.step()
                transient = max(transient, counter.peak - counter.now)
            _let_lora_win(made.optimizer)
            counter.reset_peak()
            made.optimizer.step()
            transient = max(transient, counter.peak - counter.now)
        state = _state_bytes(made.optimizer)
        return StepTrace(_bytes(p.grad for p in made.trained), *state, transient)


def _trace_steps_in_backward(config: Any, made: Trainable, workload: Workload) -> PassTrace:
    """Run passes with steps inside: the full experts win first, then the LoRA experts."""
    with _blocks(made, workload):
        _make_state(made)
        if isinstance(made.optimizer, UnitOptimizer) and made.optimizer.offload is not None:
            made.optimizer.offload.forget_order()  # no training has _make_state's order
        counter = LiveBytes(_tensors(made))
        gc.collect()
        with counter:
            _run_pass(config, made.model, workload, counter, scalar=0.5)
            made.optimizer.step()
            if workload.offloads:  # from the second step on, state is fetched ahead
                _run_pass(config, made.model, workload, counter, scalar=0.5)
                made.optimizer.step()
            if _let_lora_win(made.optimizer):
                _run_pass(config, made.model, workload, counter, scalar=0.5)
    return PassTrace(gradients=0, activations=counter.peak)


def _run_pass(
    config: Any, model: Any, workload: Workload, counter: LiveBytes, scalar: float | None = None
) -> None:
    """Run the forward and backward pass of SFTTrainer's training step.

    Args:
        config: The model's configuration, for messages.
        model: The model.
        workload: Shape and types.
        counter: The counter of bytes.
        scalar: The value that `.item()` returns in the backward pass.
    """
    inputs = _inputs(workload)  # kept alive in the backward pass, like a trainer's batch
    try:
        loss = _loss(model, inputs, bf16=workload.bf16)
        counter.scalar = scalar
        loss.backward()
    except Exception as error:  # operations that need data raise errors of many types
        raise InputError(
            f"The forward and backward pass of {config.model_type} cannot be planned "
            f"without data: {reason_of(error)}"
        ) from error
    finally:
        counter.scalar = None


def _inputs(workload: Workload) -> dict[str, Tensor]:
    """Return a batch of ids and labels `[rows, tokens]`, with a mask if attention takes one."""
    shape = workload.batch_size, workload.length
    ids = torch.zeros((1, shape[0] * shape[1]) if workload.joined else shape, dtype=torch.long)
    # Without a mask, transformers uses causal attention, as it does for a mask of ones. The mask
    # that it makes from the positions of joined sequences has the size of this one's.
    has_mask = workload.padded or workload.joined
    mask = {"attention_mask": torch.ones_like(ids)} if has_mask else {}
    return {"input_ids": ids, "labels": ids, **mask}


def _loss(model: Any, inputs: dict[str, Tensor], *, bf16: bool) -> Tensor:
    """Return the loss of SFTTrainer's training step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    loss: Tensor = -outputs.log_probs.sum() / inputs["input_ids"].numel()
    return loss


@contextmanager
def _trl_head(made: Trainable, workload: Workload) -> Iterator[None]:
    """Give the model SFTTrainer's output head, which computes logits in chunks."""
    from trl.kernels import chunked_logprob
    from trl.trainer.utils import add_fused_lm_head

    model = made.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_fused_lm_head(inner, outputs=_HEAD_OUTPUTS)
    with ExitStack() as stack:
        if workload.device == "cuda":
            # On CUDA, kernels reduce a tile of logits in place. The CPU's code makes copies.
            for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
                stack.enter_context(_replaced(chunked_logprob, name, lambda *_, **__: None))
        yield


@contextmanager
def _blocks(made: Trainable, workload: Workload) -> Iterator[None]:
    """Give the optimizer the block sizes of the planned device."""
    threads = torch.get_num_threads()
    elements = -(-BLOCKS.elements // threads)
    if workload.device == "cpu":
        # Tracing thousands of blocks takes minutes. With at most 300, a block is still small.
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
    """Enable activation checkpointing, as the trainer does."""
    # transformers renamed the method: the old name warns, and 5.13 lacks the new one.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        enable({"use_reentrant": False})
    if hasattr(model, "get_base_model"):
        model.enable_input_require_grads()


def _let_lora_win(optimizer: torch.optim.Optimizer) -> bool:
    """Let LoRA experts win the next step where they are routed; return whether any can."""
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
    """Create the optimizer's state, by a step outside of a backward pass."""
    _give_gradients(made)
    # Not counted, so tensors are processed whole, which takes the fewest operations.
    with _in_blocks_of(made.optimizer, 1 << 40), LiveBytes(scalar=0.5):
        made.optimizer.step()


def _tensors(made: Trainable) -> list[Tensor]:
    model: nn.Module = made.model
    tensors = [*model.parameters(), *model.buffers()]
    for state in made.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return tensors + [p.grad for p in made.trained if p.grad is not None]


def _state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Return the bytes of moments (with step counts), of factors, and of both if pinned."""
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
