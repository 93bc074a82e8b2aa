"""Log-probabilities of tokens under a causal language model, in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.measure.inference import for_each_batch, inference, last_logits
from molf.measure.padding import ANY, logits_batches
from molf.measure.settings import Progress
from molf.measure.sharing import collect
from molf.measure.tokens import IGNORED


class NextTokens:
    """Log-probabilities of chosen next tokens, computed from a model's logits.

    Args:
        wanted: Per context, the token ids whose log-probability as the next token is needed.

    Attributes:
        log_probs: Per context those of its wanted tokens, computed in float32; empty before `read`.
    """

    def __init__(self, wanted: Sequence[Sequence[int]]) -> None:
        self._wanted = wanted
        self.log_probs: list[list[float]] = [[] for _ in wanted]

    def read(self, batch: list[int], logits: Tensor) -> None:
        """Store log-probabilities from the next tokens' logits of a batch, [rows, vocabulary].

        Raises:
            FloatingPointError: The logits are NaN, as after a diverged training.
        """
        row_of = [row for row, index in enumerate(batch) for _ in self._wanted[index]]
        tokens = [token for index in batch for token in self._wanted[index]]
        log_probs = logits.float().log_softmax(dim=-1)
        values = iter(check_not_nan(log_probs[row_of, tokens]).tolist())
        for index in batch:
            self.log_probs[index] = [next(values) for _ in self._wanted[index]]


def next_token_log_probs(
    model: Any,
    contexts: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_size: int,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Compute log-probabilities of chosen next tokens after each context.

    Args:
        model: A transformers causal language model of any dtype, on its device.
        contexts: Token ids, at least one in each.
        wanted: Per context, the token ids whose log-probability as the next token is needed.
        pad_id: Any id of the vocabulary; padded positions are masked.
        batch_size: Contexts per forward pass.
        progress: Called after each batch.

    Returns:
        Per context the log-probabilities of its wanted tokens, computed in float32.

    Raises:
        FloatingPointError: The model's logits are NaN, as after a diverged training.
    """
    found = NextTokens(wanted)

    def run(batch: list[int]) -> None:
        rows = [contexts[index] for index in batch]
        found.read(batch, last_logits(model, rows, pad_id, keep=1)[:, -1])

    lengths = [len(context) for context in contexts]
    allowed = logits_batches(model, pad_id) if pads(lengths, batch_size) else ANY
    with inference(model):
        done = for_each_batch(
            model, lengths, batch_size, run, "probabilities", progress, allowed=allowed
        )
    return collect(found.log_probs, done)


def sequence_losses(
    model: Any,
    sequences: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_size: int,
    what: str = "loss",
    progress: Progress | None = None,
) -> list[tuple[float, int]]:
    """Compute the summed next-token loss of each sequence over its labelled tokens.

    Args:
        model: A transformers causal language model of any dtype, on its device.
        sequences: Token ids.
        labels: The same ids where a token carries loss, -100 elsewhere. A label on the first
            token is not counted: no logits predict it.
        pad_id: Any id of the vocabulary; padded positions are masked.
        batch_size: Sequences per forward pass.
        what: Name shown with the progress.
        progress: Called after each batch.

    Returns:
        Per sequence the summed negative log-likelihood, computed in float32, and its number of
        counted tokens.

    Raises:
        FloatingPointError: The model's logits are NaN, as after a diverged training.
    """
    results: list[tuple[float, int]] = [(0.0, 0)] * len(sequences)
    # The labels from the first counted token on: only there are logits needed.
    tails = [_counted_tail(row) for row in labels]

    def run(batch: list[int]) -> None:
        keep = max(len(tails[index]) for index in batch)
        rows = [sequences[index][:-1] for index in batch]  # the last token predicts nothing
        logits = last_logits(model, rows, pad_id, keep)
        # Row by row, so that only one row's logits are held in float32 at a time.
        sums = torch.stack(
            [_loss_sum(logits[row], tails[index]) for row, index in enumerate(batch)]
        )
        for index, total in zip(batch, check_not_nan(sums).tolist(), strict=True):
            results[index] = (total, sum(label != IGNORED for label in tails[index]))

    counted = [index for index, tail in enumerate(tails) if tail]
    lengths = [len(sequences[index]) for index in counted]
    allowed = logits_batches(model, pad_id) if pads(lengths, batch_size) else ANY
    with inference(model):
        done = for_each_batch(
            model,
            lengths,
            batch_size,
            lambda batch: run([counted[position] for position in batch]),
            what,
            progress,
            allowed=allowed,
        )
    return collect(results, [counted[position] for position in done])


def pads(lengths: Sequence[int], batch_size: int) -> bool:
    """Return whether batches of rows of these lengths contain padding."""
    return batch_size > 1 and len(set(lengths)) > 1


def _counted_tail(labels: Sequence[int]) -> list[int]:
    first = next((i for i, label in enumerate(labels) if i > 0 and label != IGNORED), len(labels))
    return list(labels[first:])


def _loss_sum(logits: Tensor, tail: list[int]) -> Tensor:
    """Compute the summed cross-entropy of the last len(tail) logits [positions, vocabulary]."""
    target = torch.tensor(tail, device=logits.device)
    scores = logits[-len(tail) :].float()
    return torch.nn.functional.cross_entropy(
        scores, target, ignore_index=IGNORED, reduction="sum"
    ).double()


def check_not_nan(values: Tensor) -> Tensor:
    """Return the values.

    Raises:
        FloatingPointError: One is NaN.
    """
    if values.isnan().any():
        raise FloatingPointError("The model's output is NaN: its weights are not usable.")
    return values
