"""Forgetting: the loss on plain text that the model was not fine-tuned on."""

from __future__ import annotations

from typing import Any

from molf.errors import InputError
from molf.measure.generate import padding_id
from molf.measure.inference import length_limit
from molf.measure.likelihood import sequence_losses
from molf.measure.metric import Metric, bootstrap_mean
from molf.measure.settings import Progress
from molf.measure.tokens import IGNORED, TokenizedText, tokenize


def forgetting_loss(
    model: Any,
    tokenizer: Any,
    text: str,
    max_length: int = 256,
    batch_size: int = 16,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Metric:
    """Compute the mean next-token loss of a held-out plain text, in nats per token.

    The text is tokenized once and cut into windows. Every token is predicted exactly once; its
    context is the earlier part of its window.

    Args:
        model: A transformers causal language model, on its device.
        tokenizer: Its tokenizer.
        text: The held-out text.
        max_length: Tokens per window, at most the model's own maximum.
        batch_size: Windows per forward pass.
        seed: Seed of the bootstrap.
        progress: Called after each batch.

    Returns:
        The mean over tokens; the interval resamples windows, and `count` is their number.

    Raises:
        InputError: The text has fewer than two tokens.
    """
    windows = plain_text_windows(tokenizer, text, length_limit(model, max_length))
    losses = sequence_losses(
        model,
        [ids for ids, _ in windows],
        [labels for _, labels in windows],
        pad_id=padding_id(tokenizer),
        batch_size=batch_size,
        what="forgetting",
        progress=progress,
    )
    means = [total / count for total, count in losses]
    return bootstrap_mean(means, weights=[count for _, count in losses], seed=seed)


def plain_text_windows(
    tokenizer: Any, text: str, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Cut a text into windows of at most `max_length` tokens, and return their ids and labels.

    A window starts with the tokenizer's prefix (BOS), or else with the previous token of the text.
    This part is context only.

    Raises:
        InputError: The text has fewer than two tokens.
    """
    windows = _windows(tokenize(tokenizer, [text])[0], max_length)
    if not windows:
        raise InputError("The text for forgetting_loss is too short: it needs at least two tokens.")
    return windows


def _windows(text: TokenizedText, max_length: int) -> list[tuple[list[int], list[int]]]:
    # Without a prefix, nothing precedes the first token, so it cannot be predicted.
    first = 0 if text.prefix else 1
    step = max_length - max(len(text.prefix), 1)
    windows = []
    for start in range(first, len(text.ids), step):
        context = text.prefix or text.ids[start - 1 : start]
        scored = text.ids[start : start + step]
        windows.append((context + scored, [IGNORED] * len(context) + scored))
    return windows
