"""Inference with a causal language model: modes, padding, batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from molf.core.storage.sharding import is_sharded
from molf.errors import InputError
from molf.measure.settings import Progress
from molf.measure.sharing import everywhere, in_step, own_share

_during_training: ContextVar[bool] = ContextVar("during_training", default=False)


@contextmanager
def during_training() -> Iterator[None]:
    """Measure a model whose training continues after the block.

    Tensors that a model or FSDP2 keeps, such as tables of positions, then have no inference mode,
    in which a backward pass would refuse them.
    """
    token = _during_training.set(True)
    try:
        yield
    finally:
        _during_training.reset(token)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients; restore the mode of each module at the end.

    Modes are restored per module because users may keep parts of a model in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad() if _during_training.get() else torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def inner_model(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper, or any other model unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def position_limit(config: Any) -> int | None:
    """Return a model's maximum number of positions; None where its configuration has none."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def length_limit(model: Any, max_length: int) -> int:
    """Return the smaller of `max_length` and the model's own maximum, in tokens."""
    return min(max_length, position_limit(inner_model(model).config) or max_length)


def pad_left(model: Any, rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Pad token rows on the left, so that all rows end in the last column.

    Evaluation reads the ends of rows: aligned, they are one slice.

    Returns:
        `input_ids` and `attention_mask`, both [rows, longest], on the model's device.

    Raises:
        InputError: The model has no embedding for a token.
    """
    largest = max(max(row, default=0) for row in rows)  # a prompt may be empty
    embeddings = _embeddings(model)
    if embeddings is not None and largest >= embeddings:
        raise InputError(
            f"A text of the evaluation has a token with id {largest}, and the model has "
            f"{embeddings} embeddings. Resize them, or give the tokenizer that the model was "
            "trained with."
        )
    longest = max(len(row) for row in rows)
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }


def _embeddings(model: Any) -> int | None:
    """Return a model's number of token embeddings; None where it does not tell."""
    try:
        return int(inner_model(model).get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def last_logits(model: Any, rows: Sequence[Sequence[int]], pad_id: int, keep: int) -> Tensor:
    """Compute the logits at the last `keep` positions of each row: [rows, keep, vocabulary].

    Models with `logits_to_keep` compute only these positions, which saves most of the memory: the
    vocabulary is the largest dimension. Rows shorter than `keep` have padding at their front.
    """
    inputs: dict[str, Any] = pad_left(model, rows, pad_id)
    accepted = inspect.signature(inner_model(model).forward).parameters
    if "position_ids" in accepted and len({len(row) for row in rows}) > 1:
        # Set positions only with padding: some models' own positions do not start at 0.
        positions = inputs["attention_mask"].cumsum(dim=-1) - 1
        inputs["position_ids"] = positions.clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    return model(**inputs, use_cache=False).logits[:, -keep:]


def for_each_batch(
    model: Any,
    lengths: Sequence[int],
    batch_size: int,
    run: Callable[[list[int]], None],
    what: str,
    progress: Progress | None = None,
    *,
    allowed: str = "any",
) -> list[int]:
    """Call `run` on batches of indices of similar length, the longest first.

    Similar lengths need little padding; the longest come first so that a lack of memory shows at
    the start. A batch that runs out of memory is halved, and so are all later ones. `allowed`
    limits the rows of one batch; it is a constant of `molf.measure.padding`.

    If several processes share one model (FSDP2), each runs as many forward passes as the others,
    the last ones of one token and without use. Running out of memory in one then ends it, because
    the others wait in the pass.

    Returns:
        The indices: all, or those of this process (`molf.measure.sharing`).
    """
    order = own_share(sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True))
    size = 1 if allowed == "single" else batch_size
    is_shared = any(map(is_sharded, model.parameters()))

    def run_all() -> None:
        _run_batches(order, lengths, size, run, what, progress, allowed, halves=not is_shared)

    if is_shared:
        in_step(model, run_all, lambda: last_logits(model, [[0]], 0, keep=1))
    else:
        everywhere(run_all)
    return order


def _run_batches(
    order: list[int],
    lengths: Sequence[int],
    batch_size: int,
    run: Callable[[list[int]], None],
    what: str,
    progress: Progress | None,
    allowed: str,
    *,
    halves: bool,
) -> None:
    start = 0
    while start < len(order):
        batch = order[start : start + batch_size]
        if allowed == "equal":
            batch = [index for index in batch if lengths[index] == lengths[batch[0]]]
        try:
            run(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1 or not halves:
                raise
            fits = False
        else:
            fits = True
        # Not in the handler: there, the exception keeps the failed batch's tensors alive.
        if not fits:
            batch_size = len(batch) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        start += len(batch)
        if progress is not None:
            progress(what, start, len(order))
