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
class FirstTokens:
    """How likely a model finds the first tokens of several targets after one prompt.

    Attributes:
        log_probs: Log-probability of each target's first token, in nats.
        distinct: No two targets have the same first token; else these cannot be told apart.
    """

    log_probs: tuple[float, ...]
    distinct: bool


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
    """Compare the new and the true target after each prompt; see `first_token_log_probs`.

    Returns:
        One comparison per prompt; None where its context is longer than `max_length`.
    """
    found = first_token_log_probs(
        model,
        tokenizer,
        prompts,
        targets,
        max_length=max_length,
        pad_id=pad_id,
        batch_size=batch_size,
        progress=progress,
    )
    return [None if tokens is None else _comparison(tokens) for tokens in found]


def first_token_log_probs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    targets: Sequence[Sequence[str]],
    *,
    max_length: int,
    pad_id: int,
    batch_size: int,
    progress: Progress | None = None,
) -> list[FirstTokens | None]:
    """How likely the model finds the first token of each target after each prompt.

    All probabilities of a prompt are conditional on the longest context that its tokenized texts
    share before any target's first token, a bare word-boundary token included. Where one target
    fuses with the boundary and another does not, the latter's probability is the product over its
    tokens from the shared context on. Otherwise it is one forward pass per prompt.

    Args:
        model: A transformers causal language model, on its device.
        tokenizer: Its tokenizer.
        prompts: The prompts; a space joins them to a target.
        targets: The targets of each prompt.
        max_length: Longest context in tokens.
        pad_id: Any id of the vocabulary; padded positions are masked.
        batch_size: Contexts per forward pass.
        progress: Called after each batch.

    Returns:
        One entry per prompt; None where its context is longer than `max_length`.
    """
    from molf.evaluate.likelihood import next_token_log_probs

    texts = iter(
        tokenize(
            tokenizer,
            [
                f"{prompt} {target}"
                for prompt, choices in zip(prompts, targets, strict=True)
                for target in choices
            ],
        )
    )
    steps = [
        _steps([next(texts) for _ in choices], target_start=len(prompt) + 1)
        for prompt, choices in zip(prompts, targets, strict=True)
    ]
    fits = [
        all(len(context) <= max_length for target in choices for context, _ in target)
        for choices in steps
    ]

    # The targets mostly share their context: it is evaluated once, for all their tokens.
    wanted: dict[tuple[int, ...], list[int]] = {}
    for choices, fit in zip(steps, fits, strict=True):
        if fit:
            for context, token in (step for target in choices for step in target):
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
        FirstTokens(
            tuple(math.fsum(log_probs[step] for step in target) for target in choices),
            distinct=len({tuple(target) for target in choices}) == len(choices),
        )
        if fit
        else None
        for choices, fit in zip(steps, fits, strict=True)
    ]


def _comparison(tokens: FirstTokens) -> Comparison:
    new, true = tokens.log_probs
    return Comparison(new, true, tie=not tokens.distinct)


def _steps(texts: list[TokenizedText], target_start: int) -> list[list[_Step]]:
    """The steps from the shared context through each target's first token, usually one each."""
    stops = [_first_target_token(text, target_start) for text in texts]
    rows = [tuple(text.prefix + text.ids) for text in texts]
    shared = 0
    while shared < min(stops) and len({row[shared] for row in rows}) == 1:
        shared += 1
    return [
        [(row[:position], row[position]) for position in range(shared, stop + 1)]
        for row, stop in zip(rows, stops, strict=True)
    ]


def _first_target_token(text: TokenizedText, target_start: int) -> int:
    """Position, among prefix and tokens, of the first token that reaches into the target."""
    return len(text.split(target_start)[0])
