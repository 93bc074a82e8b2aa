"""Greedy generation in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from molf.evaluate.inference import (
    for_each_batch,
    inference,
    inner_model,
    pad_left,
    position_limit,
)
from molf.evaluate.padding import ANY, generation_batches
from molf.evaluate.settings import Progress

Stop = Callable[[int, str], bool]
"""Called after each token with a context's index and the answer so far; True ends the answer."""

FirstLogits = Callable[[list[int], Tensor], None]
"""Called with a batch's indices and the logits of its first new tokens, [rows, vocabulary]."""


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
    """Generate the likeliest token again and again, until the end of sequence.

    The model's own generation settings (sampling, penalties, ...) are put aside, so that the
    same weights always give the same text; only its end tokens are kept. Answers that have ended
    leave their batch whenever half of it has, and a batch ends with the last of them.

    Args:
        model: A transformers causal language model, on its device.
        tokenizer: Its tokenizer; the EOS token ends an answer and stands in for a missing pad.
        contexts: Token ids of the prompts, at least one in each.
        max_new_tokens: Most tokens per answer; fewer where its context leaves the model's
            positions no room for them.
        batch_size: Contexts generated together.
        stop: Ends an answer before its end token.
        first_logits: Reads what the model thinks of all tokens that may come first, which
            generation computes anyway.
        progress: Called after each batch.

    Returns:
        The new tokens of each context, without the end token.

    Raises:
        ValueError: A context fills all positions that the model has.
    """
    from transformers import GenerationConfig

    if not contexts:
        return []
    inner = inner_model(model)
    ends = _end_tokens(inner, tokenizer)
    limit = position_limit(inner_model(model).config)
    lengths = [len(context) for context in contexts]
    if limit is not None and max(lengths) >= limit:
        raise ValueError(f"A context fills all of the model's {limit} positions.")
    room = [min(max_new_tokens, (limit or length + max_new_tokens) - length) for length in lengths]
    pad_id = padding_id(tokenizer)
    results: list[list[int]] = [[] for _ in contexts]
    # Models with positions in several dimensions keep shifts of a batch's rows beside the cache.
    reuse = not any(hasattr(module, "rope_deltas") for module in inner.modules())

    def settings(tokens: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            eos_token_id=sorted(ends),
            pad_token_id=pad_id,
            use_cache=True,
            return_dict_in_generate=True,
        )

    def run(batch: list[int]) -> None:
        # Answers with less room end earlier and on their own: beyond its positions a model may
        # fail, and what the others of a batch may generate must not depend on it.
        for tokens, group in groupby(batch, key=room.__getitem__):
            answers = _Answers(tokenizer, list(group), ends, stop)
            first = _first_only(answers.indices, first_logits)
            inputs = pad_left([contexts[index] for index in answers.indices], pad_id, inner.device)
            while answers.rows and answers.steps < tokens:
                made = inner.generate(
                    **inputs,
                    generation_config=settings(tokens - answers.steps),
                    logits_processor=[first],
                    stopping_criteria=[answers],
                )
                inputs = _rows_of(made, inputs["attention_mask"], answers.drop_ended(), reuse)
            for index, answer in zip(answers.indices, answers.tokens, strict=True):
                results[index] = answer

    # generate() fills what a passed configuration leaves open from the model's own.
    own_settings = inner.generation_config
    inner.generation_config = settings(max_new_tokens)
    try:
        several = min(batch_size, len(contexts)) > 1
        allowed = generation_batches(model, pad_id) if several else ANY
        with inference(model):
            for_each_batch(lengths, batch_size, run, "generation", progress, allowed=allowed)
    finally:
        inner.generation_config = own_settings
    return results


def padding_id(tokenizer: Any) -> int:
    """The token that fills batches: the pad token, or EOS where there is none. Always masked."""
    pad: int | None = tokenizer.pad_token_id
    return pad if pad is not None else int(tokenizer.eos_token_id)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of generated tokens without special tokens, spaces left as the model put them."""
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _rows_of(made: Any, mask: Tensor, rows: list[int], reuse: bool) -> dict[str, Any]:
    """What `generate()` goes on from, for some rows of what it has made.

    Args:
        made: Its result; all tokens that it has made of these rows count.
        mask: The attention mask that it began with.
        rows: The rows.
        reuse: Whether the cache may be used on, where it can be cut.
    """
    index = torch.tensor(rows, device=mask.device, dtype=torch.long)
    ids = made.sequences[index]
    new = mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])
    inputs = {"input_ids": ids, "attention_mask": torch.cat([mask[index], new], dim=1)}
    cache = made.get("past_key_values")
    if rows and reuse and _can_be_cut(cache):  # without it all is computed anew
        cache.batch_select_indices(index)
        inputs["past_key_values"] = cache
    return inputs


def _can_be_cut(cache: Any) -> bool:
    """Whether rows of a cache can be selected: those of states other than keys and values cannot.

    Recurrent layers inherit the method of attention layers, which leaves their own states alone.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", [])
    return bool(layers) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )


def _first_only(indices: list[int], read: FirstLogits | None) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor of `generate()` that shows a batch's first logits, and changes none."""
    left = [] if read is None else [read]

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        if left:
            left.pop()(indices, scores)
        return scores

    return process


class _Answers:
    """A stopping criterion of `generate()` that collects the answers of a batch.

    It stops everything when half of the rows have ended, so that they can be dropped.

    Args:
        tokenizer: Decodes what `stop` is asked about.
        indices: The context of each answer.
        ends: Tokens that end an answer and are not part of it.
        stop: Ends an answer after the token that made it say so.

    Attributes:
        indices: As given.
        tokens: The tokens of each answer so far.
        rows: The answer of each row that is being generated, as a position in `tokens`.
        steps: Tokens made so far for each of these rows.
    """

    def __init__(
        self, tokenizer: Any, indices: list[int], ends: set[int], stop: Stop | None
    ) -> None:
        self.indices = indices
        self.tokens: list[list[int]] = [[] for _ in indices]
        self.rows = list(range(len(indices)))
        self.steps = 0
        self._tokenizer = tokenizer
        self._ends = ends
        self._stop = stop
        self._ended = [False] * len(indices)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Take in the newest token of each row, and say which rows stop."""
        self.steps += 1
        for answer, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not self._ended[answer]:
                self._ended[answer] = self._ends_with(answer, token)
        ended = [self._ended[answer] for answer in self.rows]
        if 2 * sum(ended) >= len(ended):
            ended = [True] * len(ended)
        return torch.tensor(ended, device=input_ids.device)

    def drop_ended(self) -> list[int]:
        """Forget the rows that have ended; return the numbers of those that go on."""
        going = [row for row, answer in enumerate(self.rows) if not self._ended[answer]]
        self.rows = [self.rows[row] for row in going]
        return going

    def _ends_with(self, answer: int, token: int) -> bool:
        if token in self._ends:
            return True
        self.tokens[answer].append(token)
        if self._stop is None:
            return False
        return self._stop(self.indices[answer], decode(self._tokenizer, self.tokens[answer]))


def _end_tokens(inner: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's EOS and the model's: chat models end a turn with a token of its own."""
    configured = inner.generation_config.eos_token_id
    if configured is None:
        configured = []
    elif isinstance(configured, int):
        configured = [configured]
    return {int(tokenizer.eos_token_id), *configured}
