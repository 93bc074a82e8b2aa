"""Running a causal language model without training it: modes, padding, batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from molf.evaluate.settings import Progress


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back afterwards.

    Modes are kept per module because users freeze parts of a model by leaving them in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def inner_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper; any other model is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def position_limit(config: Any) -> int | None:
    """The most positions that a model was made for; None where its configuration does not say."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def length_limit(model: Any, max_length: int) -> int:
    """The smaller of `max_length` and the model's own maximum, in tokens."""
    return min(max_length, position_limit(inner_model(model).config) or max_length)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Pad token rows on the left, so that all rows end in the last column.

    The ends are what evaluation looks at: aligned, they can be cut out as one slice.

    Returns:
        `input_ids` and `attention_mask`, both [rows, longest].
    """
    longest = max(len(row) for row in rows)
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def last_logits(model: Any, rows: Sequence[Sequence[int]], pad_id: int, keep: int) -> Tensor:
    """The logits at the last `keep` positions of each row: [rows, keep, vocabulary].

    The vocabulary is the largest dimension by far, so models that can are asked to compute no
    other position. Rows shorter than `keep` hold padding at their front.
    """
    inputs: dict[str, Any] = pad_left(rows, pad_id, model.device)
    accepted = inspect.signature(inner_model(model).forward).parameters
    if "position_ids" in accepted and len({len(row) for row in rows}) > 1:
        # Without padding the model's own are right; some begin with another number than 0.
        positions = inputs["attention_mask"].cumsum(dim=-1) - 1
        inputs["position_ids"] = positions.clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    return model(**inputs, use_cache=False).logits[:, -keep:]


def for_each_batch(
    lengths: Sequence[int],
    batch_size: int,
    run: Callable[[list[int]], None],
    what: str,
    progress: Progress | None = None,
    *,
    allowed: str = "any",
) -> None:
    """Call `run` on batches of indices of similar length, the longest first.

    Similar lengths leave little padding, and with the longest first a batch that is too big shows
    at the start. One that runs out of memory is halved, and so are those that follow. What is
    `allowed` in one batch is one of those of `molf.evaluate.padding`.
    """
    if allowed == "single":
        batch_size = 1
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    start = 0
    while start < len(order):
        batch = order[start : start + batch_size]
        if allowed == "equal":
            batch = [index for index in batch if lengths[index] == lengths[batch[0]]]
        try:
            run(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            fits = False
        else:
            fits = True
        # Outside the handler: the exception would keep the failed batch's tensors alive.
        if not fits:
            batch_size = len(batch) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        start += len(batch)
        if progress is not None:
            progress(what, start, len(order))
