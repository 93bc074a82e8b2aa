"""Probabilities of the first token of targets after a prompt.

Prompt and target are tokenized together; the first token of the target is the first one that
contains a character of it. Tokenizing " " + target alone would be wrong: SentencePiece tokenizers
then give the same word-boundary token for every target, and all comparisons tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from molf.measure.settings import Progress
from molf.measure.tokens import TokenizedText, tokenize

if TYPE_CHECKING:
    from torch import Tensor

    from molf.measure.generate import FirstLogits

_Context = tuple[int, ...]
_Step = tuple[_Context, int]  # a context, and the token whose probability follows it


@dataclass(frozen=True)
class FirstTokens:
    """Log-probabilities of the first tokens of several targets after one prompt.

    Attributes:
        log_probs: Log-probability of each target's first token, in nats.
        distinct: Whether all targets have different first tokens; equal ones always tie.
    """

    log_probs: tuple[float, ...]
    distinct: bool


@dataclass(frozen=True)
class Comparison:
    """Log-probabilities of the first tokens of two targets after one prompt.

    Attributes:
        log_p_new: Log-probability for the new target, in nats.
        log_p_true: Log-probability for the true target, in nats.
        tie: Whether both targets have the same first token.
    """

    log_p_new: float
    log_p_true: float
    tie: bool

    @classmethod
    def of(cls, tokens: FirstTokens) -> Comparison:
        """Compare the new and the true target, given in this order."""
        new, true = tokens.log_probs
        return cls(new, true, tie=not tokens.distinct)


class FirstTokenQuestions:
    """Computes log-probabilities of the first token of each target after each prompt.

    All probabilities of a prompt are conditional on the longest context that its tokenized texts
    share before any target's first token, a bare word-boundary token included. Where one target
    shares a token with the boundary and another does not, the latter's probability is the product
    over its tokens from the shared context on. A prompt needs one forward pass otherwise, and none
    where an answer is generated from the same context (`reader`).

    Args:
        tokenizer: The model's tokenizer.
        prompts: The prompts; a space joins them to a target.
        targets: The targets of each prompt.
        max_length: Longest context in tokens.
        known: Texts that are tokenized already, by text.

    Attributes:
        texts: Every prompt with each of its targets, tokenized, by text.
        fits: Per prompt, whether all contexts have at most `max_length` tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[str],
        targets: Sequence[Sequence[str]],
        max_length: int,
        known: Mapping[str, TokenizedText] | None = None,
    ) -> None:
        asked = [
            [f"{prompt} {target}" for target in choices]
            for prompt, choices in zip(prompts, targets, strict=True)
        ]
        self.texts = dict(known or {})
        new = [t for t in dict.fromkeys(chain.from_iterable(asked)) if t not in self.texts]
        self.texts.update(zip(new, tokenize(tokenizer, new), strict=True))
        self._steps = [
            _steps([self.texts[text] for text in texts], target_start=len(prompt) + 1)
            for prompt, texts in zip(prompts, asked, strict=True)
        ]
        self.fits = [
            all(len(context) <= max_length for target in choices for context, _ in target)
            for choices in self._steps
        ]
        # Targets mostly share a context: evaluate it once for all their tokens.
        self._unread: dict[_Context, list[int]] = {}
        for choices, fit in zip(self._steps, self.fits, strict=True):
            for context, token in chain.from_iterable(choices) if fit else ():
                self._unread.setdefault(context, []).append(token)
        self._log_probs: dict[_Step, float] = {}

    def reader(self, contexts: Sequence[Sequence[int]]) -> FirstLogits:
        """Return a reader that stores probabilities while answers to `contexts` are generated."""
        return _Reader([tuple(context) for context in contexts], self._unread, self._store)

    def answers(
        self, model: Any, *, pad_id: int, batch_size: int, progress: Progress | None = None
    ) -> list[FirstTokens | None]:
        """Evaluate the contexts without a generated answer; return all probabilities.

        Args:
            model: A transformers causal language model, on its device.
            pad_id: Any id of the vocabulary; padded positions are masked.
            batch_size: Contexts per forward pass.
            progress: Called after each batch.

        Returns:
            One entry per prompt; None where its context is longer than `max_length`.
        """
        from molf.measure.likelihood import next_token_log_probs

        contexts = list(self._unread)
        values = next_token_log_probs(
            model,
            contexts,
            list(self._unread.values()),
            pad_id=pad_id,
            batch_size=batch_size,
            progress=progress,
        )
        for context, log_probs in zip(contexts, values, strict=True):
            self._store(context, log_probs)
        return [
            FirstTokens(
                tuple(math.fsum(self._log_probs[step] for step in target) for target in choices),
                distinct=len({tuple(target) for target in choices}) == len(choices),
            )
            if fit
            else None
            for choices, fit in zip(self._steps, self.fits, strict=True)
        ]

    def _store(self, context: _Context, log_probs: list[float]) -> None:
        """Store the probabilities of a context's tokens, unless they are stored already."""
        if context in self._unread:
            for token, value in zip(self._unread.pop(context), log_probs, strict=True):
                self._log_probs[context, token] = value


class _Reader:
    """Reads the probabilities of contexts from the logits of their generated answers."""

    def __init__(
        self,
        contexts: list[_Context],
        wanted: Mapping[_Context, list[int]],
        store: Callable[[_Context, list[float]], None],
    ) -> None:
        from molf.measure.likelihood import NextTokens

        self._contexts = contexts
        self._found = NextTokens([wanted.get(context, []) for context in contexts])
        self._store = store

    def read(self, batch: list[int], logits: Tensor) -> list[list[float]]:
        """Return the log-probabilities of each context's wanted tokens."""
        self._found.read(batch, logits)
        return [self._found.log_probs[index] for index in batch]

    def store(self, index: int, result: list[float]) -> None:
        """Store those of a context."""
        self._store(self._contexts[index], result)


def _steps(texts: list[TokenizedText], target_start: int) -> list[list[_Step]]:
    """Return the steps from the shared context to each target's first token, usually one each."""
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
    """Return the position, prefix included, of the first token with a character of the target."""
    return len(text.split(target_start)[0])
