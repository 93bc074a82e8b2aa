"""Training samples: texts, and the spans of characters that carry the loss."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from molf.data.control_tokens import control_tokens

EMPTY = "an answer that carries loss is empty, so that its end alone is learned"
"""A fault of a rendered sample."""

Span = tuple[int, int]
"""Start and end in characters of a text."""


@dataclass(frozen=True)
class Rendered:
    """A sample rendered as one text, ready to be tokenized.

    Attributes:
        text: Prompt and answers together.
        spans: The parts that carry loss, in order; the last one ends with the text.
        answer_start: Start of the last answer; the text before it is the prompt for generation.
        faults: Sentences about differences between text and record.
        literal: The spans of control tokens to read as plain text. None where the whole text is
            the user's: the tokenizer's `split_special_tokens` then applies.
        control_tokens: Number of control tokens in the user's texts.
    """

    text: str
    spans: tuple[Span, ...]
    answer_start: int
    faults: tuple[str, ...] = ()
    literal: tuple[Span, ...] | None = None
    control_tokens: int = 0

    def all_faults(self, tokenizer: Any) -> tuple[str, ...]:
        """Return the faults, and a sentence on control tokens where the texts contain any."""
        if not self.control_tokens:
            return self.faults
        if getattr(tokenizer, "split_special_tokens", False):
            return (*self.faults, "the text spells out control tokens, which become plain text")
        return (
            *self.faults,
            f"the text spells out control tokens, such as {tokenizer.eos_token}, which act as "
            "such: in an answer they end generation. --split_special_tokens makes them plain text",
        )


class Sample(ABC):
    """One record to train on, independent of a tokenizer.

    Attributes:
        record: 0-based record of the data file that the sample was made from.
        has_answer: Whether a part of the text answers the rest, so that it can be generated.
    """

    record: int
    has_answer: ClassVar[bool] = True

    @property
    @abstractmethod
    def answer(self) -> str:
        """The expected answer to this sample's prompt."""

    @property
    @abstractmethod
    def content(self) -> Hashable:
        """A key that is equal for records with the same texts."""

    def longest_text(self, tokenizer: Any) -> str:
        """Return a text that the rendered one is a part of, in less time than `render` takes.

        Raises:
            InputError: As in `render`.
        """
        return self.render(tokenizer).text

    @abstractmethod
    def render(self, tokenizer: Any) -> Rendered:
        """Render the sample's text, a conversation with the tokenizer's chat template.

        Raises:
            InputError: The tokenizer has no chat template that the sample can be rendered with.
        """


@dataclass(frozen=True)
class PromptCompletion(Sample):
    """A prompt and its completion, joined without a separator."""

    prompt: str
    completion: str
    record: int

    @property
    def answer(self) -> str:
        """The completion."""
        return self.completion

    @property
    def content(self) -> Hashable:
        """Prompt and completion."""
        return self.prompt, self.completion

    def longest_text(self, tokenizer: Any) -> str:
        """Return the two texts, joined."""
        return self.prompt + self.completion

    def render(self, tokenizer: Any) -> Rendered:
        """Join the two texts; the completion carries the loss."""
        faults = () if self.completion.strip() else (EMPTY,)
        return _rendered(tokenizer, self.prompt + self.completion, len(self.prompt), faults)


@dataclass(frozen=True)
class PlainText(Sample):
    """A text without a prompt, as in continued pre-training; all of it carries loss."""

    text: str
    record: int
    has_answer: ClassVar[bool] = False

    @property
    def answer(self) -> str:
        """The text."""
        return self.text

    @property
    def content(self) -> Hashable:
        """The text."""
        return self.text

    def longest_text(self, tokenizer: Any) -> str:
        """Return the text."""
        return self.text

    def render(self, tokenizer: Any) -> Rendered:
        """Return the text; all of it carries the loss."""
        return _rendered(tokenizer, self.text, 0)


def hash_of_samples(samples: Iterable[Sample]) -> str:
    """Return the SHA-256 of samples in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample).encode(errors="surrogatepass"))
    return digest.hexdigest()


def _rendered(tokenizer: Any, text: str, start: int, faults: tuple[str, ...] = ()) -> Rendered:
    """Return a text that is wholly the user's, with loss from character `start` on."""
    # Do not count an EOS at the end: every sample ends with EOS.
    own = text.removesuffix(tokenizer.eos_token or "")
    spelled = len(control_tokens(tokenizer).findall(own))
    return Rendered(text, ((start, len(text)),), start, faults, control_tokens=spelled)
