"""Which token is the first of a target, and how likely the model finds it.

Taking the first token of " " + target alone is a trap: SentencePiece tokenizers give the bare
word-boundary piece for every target, and all comparisons tie. Here prompt and target are
tokenized together, and the first token of the target is the first that holds a character of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from molf.evaluate.settings import Progress
from molf.tasks.encoding import TokenizedText, tokenize

_Step = tuple[tuple[int, ...], int]  # a context, and the token that is asked for after it


@dataclass(frozen=True)
class Comparison:
    """How likely a model finds the first tokens of two targets after one prompt.

    Attributes:
        log_p_new: Log-probability for the new target, in nats.
        log_p_true: Log-probability for the true target.
        tie: The two first tokens are the same, so nothing is compared.
    """

    log_p_new: float
    log_p_true: float
    tie: bool


def compare_first_tokens(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    targets: Sequence[tuple[str, str]],
    *,
    max_length: int,
    pad_id: int,
    batch_size: int,
    progress: Progress | None = None,
) -> list[Comparison | None]:
    """Compare the new and the true target after each prompt.

    Both probabilities are conditional on the longest context that the two tokenized texts share
    before either target's first token, a bare word-boundary token included. Where one target
    fuses with the boundary and the other does not, the latter's probability is the product over
    its tokens from the shared context on.

    Args:
        model: A transformers causal language model, on its device.
        tokenizer: Its tokenizer.
        prompts: The prompts; a space joins them to a target.
        targets: (new, true) of each prompt.
        max_length: Longest context in tokens.
        pad_id: Any id of the vocabulary; padded positions are masked.
        batch_size: Contexts per forward pass.
        progress: Called after each batch.

    Returns:
        One comparison per prompt; None where its context is longer than `max_length`.
    """
    from molf.evaluate.likelihood import next_token_log_probs

    texts = [
        f"{prompt} {target}"
        for prompt, pair in zip(prompts, targets, strict=True)
        for target in pair
    ]
    tokenized = tokenize(tokenizer, texts)
    pairs = [
        _steps(tokenized[2 * i], tokenized[2 * i + 1], target_start=len(prompt) + 1)
        for i, prompt in enumerate(prompts)
    ]
    fits = [all(len(context) <= max_length for context, _ in new + true) for new, true in pairs]

    # New and true target mostly share their context: it is evaluated once, for both tokens.
    wanted: dict[tuple[int, ...], list[int]] = {}
    for (new, true), fit in zip(pairs, fits, strict=True):
        for context, token in (new + true) * fit:
            wanted.setdefault(context, []).append(token)
    values = next_token_log_probs(
        model,
        list(wanted),
        list(wanted.values()),
        pad_id=pad_id,
        batch_size=batch_size,
        progress=progress,
    )
    log_probs = {
        (context, token): value
        for (context, tokens), row in zip(wanted.items(), values, strict=True)
        for token, value in zip(tokens, row, strict=True)
    }
    return [
        Comparison(
            math.fsum(log_probs[step] for step in new),
            math.fsum(log_probs[step] for step in true),
            tie=new == true,
        )
        if fit
        else None
        for (new, true), fit in zip(pairs, fits, strict=True)
    ]


def _steps(
    new: TokenizedText, true: TokenizedText, target_start: int
) -> tuple[list[_Step], list[_Step]]:
    """The steps from the shared context through each target's first token, usually one each."""
    stops = [_first_target_token(text, target_start) for text in (new, true)]
    rows = [tuple(text.prefix + text.ids) for text in (new, true)]
    shared = 0
    while shared < min(stops) and rows[0][shared] == rows[1][shared]:
        shared += 1
    new_steps, true_steps = (
        [(row[:position], row[position]) for position in range(shared, stop + 1)]
        for row, stop in zip(rows, stops, strict=True)
    )
    return new_steps, true_steps


def _first_target_token(text: TokenizedText, target_start: int) -> int:
    """Position, among prefix and tokens, of the first token that reaches into the target."""
    return len(text.split(target_start)[0])
