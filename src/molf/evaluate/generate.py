"""Greedy generation in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molf.evaluate.inference import (
    for_each_batch,
    inference,
    inner_model,
    pad_left,
    position_limit,
)
from molf.evaluate.settings import Progress


def generate_greedy(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Generate the likeliest token again and again, until the end of sequence.

    The model's own generation settings (sampling, penalties, ...) are put aside, so that the
    same weights always give the same text; only its end tokens are kept.

    Args:
        model: A transformers causal language model, on its device.
        tokenizer: Its tokenizer; the EOS token ends an answer and stands in for a missing pad.
        contexts: Token ids of the prompts, at least one in each.
        max_new_tokens: Most tokens per answer; fewer where the longest context leaves the
            model's positions no room for them.
        batch_size: Contexts generated together.
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
    limit = position_limit(model)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - max(len(context) for context in contexts))
        if max_new_tokens < 1:
            raise ValueError(f"A context fills all of the model's {limit} positions.")
    pad_id = padding_id(tokenizer)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad_id,
        use_cache=True,
    )
    results: list[list[int]] = [[] for _ in contexts]

    def run(batch: list[int]) -> None:
        inputs = pad_left([contexts[index] for index in batch], pad_id, inner.device)
        output = inner.generate(**inputs, generation_config=settings)
        new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        for index, tokens in zip(batch, new_tokens, strict=True):
            results[index] = _until_end(tokens, ends)

    # generate() fills what a passed configuration leaves open from the model's own.
    own_settings = inner.generation_config
    inner.generation_config = settings
    try:
        with inference(model):
            lengths = [len(context) for context in contexts]
            for_each_batch(lengths, batch_size, run, "generation", progress)
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


def _end_tokens(inner: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's EOS and the model's: chat models end a turn with a token of its own."""
    configured = inner.generation_config.eos_token_id
    if configured is None:
        configured = []
    elif isinstance(configured, int):
        configured = [configured]
    return {int(tokenizer.eos_token_id), *configured}


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[:position]
    return tokens
