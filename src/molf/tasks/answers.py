"""Generated and expected answers as texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from molf.measure.settings import EvaluationSettings, Progress
from molf.measure.tokens import tokenize

if TYPE_CHECKING:
    from molf.data.encoding import GenerationContext
    from molf.measure.generate import FirstLogits

UNDECODED = "\ufffd"
"""The replacement character: not all bytes of a character are generated yet."""


def generate_answers(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[GenerationContext],
    max_new_tokens: int,
    settings: EvaluationSettings,
    progress: Progress | None = None,
    is_complete: Callable[[str], bool] | None = None,
    first_logits: FirstLogits | None = None,
) -> list[str]:
    """Generate a greedy answer to each prompt, from the same prompt tokens as in training.

    Args:
        model: A transformers causal language model, on its device.
        tokenizer: Its tokenizer.
        contexts: The prompts, all shorter than the model's positions.
        max_new_tokens: Most tokens per answer.
        settings: Batch size.
        progress: Called after each batch.
        is_complete: Ends an answer: returns True where more text would not change its score.
        first_logits: Called with the logits of the first new tokens of each batch.

    Returns:
        The answers, as texts.
    """
    from molf.measure.generate import decode, generate_greedy

    def answer(index: int, text: str) -> str:
        return text.lstrip().removeprefix(contexts[index].missing.strip())

    def stop(index: int, text: str) -> bool:
        return is_complete is not None and is_complete(answer(index, text))

    generated = generate_greedy(
        model,
        tokenizer,
        [context.ids for context in contexts],
        max_new_tokens=max_new_tokens,
        batch_size=settings.batch_size,
        stop=stop if is_complete is not None else None,
        first_logits=first_logits,
        progress=progress,
    )
    return [answer(index, decode(tokenizer, tokens)) for index, tokens in enumerate(generated)]


def expected_answers(tokenizer: Any, contexts: Sequence[GenerationContext]) -> list[str]:
    """Return the samples' own answers, decoded from tokens as generated answers are."""
    from molf.measure.generate import decode

    answers = []
    for context in contexts:
        tokens = context.text.ids[len(context.text.ids) - context.answer_tokens :]
        text = decode(tokenizer, tokens)
        answers.append(text.lstrip().removeprefix(context.missing.strip()))
    return answers


def longest_answer(tokenizer: Any, answers: Sequence[str]) -> int:
    """Return the number of tokens of the longest text."""
    return max(len(answer.ids) for answer in tokenize(tokenizer, answers))
