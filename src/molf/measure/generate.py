"""Greedy generation in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from molf.measure.inference import (
    for_each_batch,
    inference,
    inner_model,
    pad_left,
    position_limit,
)
from molf.measure.padding import ANY, generation_batches
from molf.measure.settings import Progress
from molf.measure.sharing import collect

Stop = Callable[[int, str], bool]
"""Called after each token with a context's index and its answer so far; True ends the answer."""


class FirstLogits(Protocol):
    """Reads the logits of the first new tokens, so that no separate forward pass is needed."""

    def read(self, batch: list[int], logits: Tensor) -> list[Any]:
        """Return the result of each row, from a batch's indices and logits [rows, vocabulary]."""

    def store(self, index: int, result: Any) -> None:
        """Store the result of a context, which this or another process has read."""


def generate_greedy(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Stop | None = None,
    first_logits: FirstLogits | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Generate an answer to each context greedily, until its end token.

    The model's own generation settings (sampling, penalties, ...) are ignored except for its end
    tokens, so that the same weights always give the same text. Finished answers are removed from a
    batch as soon as half of its rows are finished.

    Args:
        model: A transformers causal language model, on its device.
        tokenizer: Its tokenizer; EOS ends an answer and replaces a missing padding token.
        contexts: Token ids of the prompts, at least one in each.
        max_new_tokens: Most tokens per answer; fewer where context and answer together would
            exceed the model's positions.
        batch_size: Contexts generated together.
        stop: Ends an answer before its end token.
        first_logits: Reads the logits of the first new tokens.
        progress: Called after each batch.

    Returns:
        The new tokens of each context, without the end token.

    Raises:
        ValueError: A context fills all of the model's positions.
    """
    if not contexts:
        return []
    inner = inner_model(model)
    lengths = [len(context) for context in contexts]
    room = _room(lengths, max_new_tokens, position_limit(inner.config))
    ends, pad_id = end_tokens(inner, tokenizer), padding_id(tokenizer)
    generation = _Generation(inner, tokenizer, contexts, room, ends, pad_id, stop, first_logits)
    with generation.replaced_settings(max_new_tokens):
        several = min(batch_size, len(contexts)) > 1
        allowed = generation_batches(model, pad_id) if several else ANY
        with inference(model):
            done = for_each_batch(
                model, lengths, batch_size, generation.run, "generation", progress, allowed=allowed
            )
    if first_logits is not None:
        for index, result in enumerate(collect(generation.read, done)):
            first_logits.store(index, result)
    return collect(generation.answers, done)


def _room(lengths: Sequence[int], most: int, limit: int | None) -> list[int]:
    """Return the most new tokens of each context within the model's positions.

    Raises:
        ValueError: A context fills all of them.
    """
    if limit is None:
        return [most] * len(lengths)
    if max(lengths) >= limit:
        raise ValueError(f"A context fills all of the model's {limit} positions.")
    return [min(most, limit - length) for length in lengths]


@dataclass
class _Generation:
    """The answers to contexts, made in batches.

    Attributes:
        inner: The model of transformers.
        tokenizer: Its tokenizer.
        contexts: Token ids of the prompts.
        room: Most new tokens of each context.
        ends: Tokens that end an answer.
        pad_id: Fills batches.
        stop: Ends an answer before its end token.
        first_logits: Reads the logits of the first new tokens.
        answers: The new tokens of each context so far.
        read: The results of `first_logits` so far.
    """

    inner: Any
    tokenizer: Any
    contexts: Sequence[Sequence[int]]
    room: list[int]
    ends: set[int]
    pad_id: int
    stop: Stop | None
    first_logits: FirstLogits | None

    def __post_init__(self) -> None:
        """Begin without answers."""
        self.answers: list[list[int]] = [[] for _ in self.contexts]
        self.read: list[Any] = [None for _ in self.contexts]
        # Models with multi-dimensional positions keep shifts of a batch's rows outside the cache.
        self._reuse = not any(hasattr(one, "rope_deltas") for one in self.inner.modules())

    @contextmanager
    def replaced_settings(self, tokens: int) -> Iterator[None]:
        """Replace the model's own settings, from which `generate()` takes unset values."""
        own = self.inner.generation_config
        self.inner.generation_config = self._settings(tokens)
        try:
            yield
        finally:
            self.inner.generation_config = own

    def run(self, batch: list[int]) -> None:
        """Make the answers to some contexts, given by their indices."""
        # One group per answer length: a model may fail beyond its positions, and a short answer
        # must not end the longer ones of its batch.
        for tokens, group in groupby(batch, key=self.room.__getitem__):
            self._run_group(list(group), tokens)

    def _run_group(self, indices: list[int], tokens: int) -> None:
        answers = _Answers(self.tokenizer, indices, self.ends, self.stop)
        first = _first_logits_processor(indices, self.first_logits, self.read)
        inputs = pad_left(self.inner, [self.contexts[index] for index in indices], self.pad_id)
        while answers.rows and answers.steps < tokens:
            made = self.inner.generate(
                **inputs,
                generation_config=self._settings(tokens - answers.steps),
                logits_processor=[first],
                stopping_criteria=[answers],
                # `in_step` keeps processes in step; transformers would wait for all of them in
                # each pass of a model in shards.
                synced_gpus=False,
            )
            inputs = _inputs_to_continue(
                made, inputs["attention_mask"], answers.drop_ended(), self._reuse
            )
        for index, answer in zip(indices, answers.tokens, strict=True):
            self.answers[index] = answer

    def _settings(self, tokens: int) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.pad_id,
            use_cache=True,
            return_dict_in_generate=True,
        )


def padding_id(tokenizer: Any) -> int:
    """Return the token that fills batches (masked): the pad token, or EOS where there is none."""
    pad: int | None = tokenizer.pad_token_id
    return pad if pad is not None else int(tokenizer.eos_token_id)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Decode generated tokens without special tokens; keep spaces as generated."""
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _inputs_to_continue(made: Any, mask: Tensor, rows: list[int], reuse: bool) -> dict[str, Any]:
    """Return the inputs with which `generate()` continues some rows of its result.

    Args:
        made: The result of `generate()`.
        mask: The attention mask of that call.
        rows: The rows to continue.
        reuse: Whether to reuse the cache, if rows can be selected from it.
    """
    index = torch.tensor(rows, device=mask.device, dtype=torch.long)
    ids = made.sequences[index]
    new = mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])
    inputs = {"input_ids": ids, "attention_mask": torch.cat([mask[index], new], dim=1)}
    cache = made.get("past_key_values")
    if rows and reuse and _has_selectable_rows(cache):  # otherwise the whole text is computed again
        cache.batch_select_indices(index)
        inputs["past_key_values"] = cache
    return inputs


def _has_selectable_rows(cache: Any) -> bool:
    """Return whether rows of a cache can be selected: only caches of keys and values allow it.

    Recurrent layers inherit `batch_select_indices` from attention layers, but it does not select
    from their own states.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", [])
    return bool(layers) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )


def _first_logits_processor(
    indices: list[int], reader: FirstLogits | None, results: list[Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a logits processor for `generate()` that has a batch's first logits read."""
    left = [] if reader is None else [reader]

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        if left:
            for index, result in zip(indices, left.pop().read(indices, scores), strict=True):
                results[index] = result
        return scores

    return process


class _Answers:
    """A stopping criterion of `generate()` that collects the answers of a batch.

    It stops all rows once half of them have ended, so that the ended ones can be dropped.

    Args:
        tokenizer: Decodes the answers for `stop`.
        indices: The context of each answer.
        ends: Tokens that end an answer and are not part of it.
        stop: Ends an answer after the token for which it returns True.

    Attributes:
        tokens: The tokens of each answer so far.
        rows: For each row of the batch, the position of its answer in `tokens`.
        steps: Number of tokens generated per row so far.
    """

    def __init__(
        self, tokenizer: Any, indices: list[int], ends: set[int], stop: Stop | None
    ) -> None:
        self._indices = indices
        self.tokens: list[list[int]] = [[] for _ in indices]
        self.rows = list(range(len(indices)))
        self.steps = 0
        self._tokenizer = tokenizer
        self._ends = ends
        self._stop = stop
        self._ended = [False] * len(indices)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Store the newest token of each row; return whether each row stops, [rows]."""
        self.steps += 1
        for answer, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not self._ended[answer]:
                self._ended[answer] = self._ends_with(answer, token)
        ended = [self._ended[answer] for answer in self.rows]
        if 2 * sum(ended) >= len(ended):
            ended = [True] * len(ended)
        return torch.tensor(ended, device=input_ids.device)

    def drop_ended(self) -> list[int]:
        """Drop the rows that have ended; return the indices of the others."""
        going = [row for row, answer in enumerate(self.rows) if not self._ended[answer]]
        self.rows = [self.rows[row] for row in going]
        return going

    def _ends_with(self, answer: int, token: int) -> bool:
        if token in self._ends:
            return True
        self.tokens[answer].append(token)
        if self._stop is None:
            return False
        return self._stop(self._indices[answer], decode(self._tokenizer, self.tokens[answer]))


def end_tokens(inner: Any, tokenizer: Any) -> set[int]:
    """Return the EOS tokens of tokenizer and model: chat models end turns with another token."""
    configured = inner.generation_config.eos_token_id
    if configured is None:
        configured = []
    elif isinstance(configured, int):
        configured = [configured]
    return {int(tokenizer.eos_token_id), *configured}
