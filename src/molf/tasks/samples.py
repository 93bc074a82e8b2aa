"""Training samples: texts, and which of their characters carry the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from molf.tasks.control_tokens import control_tokens

Span = tuple[int, int]
"""Start and end in characters of a text."""


@dataclass(frozen=True)
class Rendered:
    """A sample as the one text that is tokenized.

    Attributes:
        text: Prompt and answers together.
        spans: The parts that carry loss, in order; the last one ends with the text.
        answer_start: Where the last answer starts: everything before it is the prompt to generate
            it from.
        faults: Sentences that say how the text differs from the record.
        literal: The parts that are plain text although they spell control tokens. None where the
            whole text is the user's, so that the tokenizer's `split_special_tokens` decides.
        control_tokens: How many control tokens the user's texts spell out.
    """

    text: str
    spans: tuple[Span, ...]
    answer_start: int
    faults: tuple[str, ...] = ()
    literal: tuple[Span, ...] | None = None
    control_tokens: int = 0

    def all_faults(self, tokenizer: Any) -> tuple[str, ...]:
        """The faults, and a sentence on control tokens where the texts spell any out."""
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
    """One record to train on, before a tokenizer is known.

    Attributes:
        record: 0-based record of the data file that the sample was made from.
    """

    record: int

    @property
    @abstractmethod
    def answer(self) -> str:
        """The text that a model asked with this sample's prompt should answer."""

    @property
    @abstractmethod
    def content(self) -> Hashable:
        """What the sample teaches: equal for records that say the same."""

    @abstractmethod
    def render(self, tokenizer: Any) -> Rendered:
        """The sample's text, with the tokenizer's chat template where it is a conversation.

        Raises:
            InputError: The tokenizer has no chat template that the sample can be rendered with.
        """


@dataclass(frozen=True)
class PromptCompletion(Sample):
    """A prompt and the completion that follows it, with nothing put between them."""

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

    def render(self, tokenizer: Any) -> Rendered:
        """Join the two texts; the completion carries the loss."""
        text = self.prompt + self.completion
        start = len(self.prompt)
        # An EOS at the very end is where a completion ends anyway.
        own = text.removesuffix(tokenizer.eos_token or "")
        spelled = len(control_tokens(tokenizer).findall(own))
        return Rendered(text, ((start, len(text)),), start, control_tokens=spelled)
