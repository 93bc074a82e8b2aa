"""Training samples: texts, and which of their characters carry the loss."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from molf.errors import InputError

Message = dict[str, Any]
"""A chat message: `role` and `content`, both strings, and what else the chat template knows."""


@dataclass(frozen=True)
class Rendered:
    """A sample as the one text that is tokenized.

    Attributes:
        text: Prompt and answers together.
        spans: Start and end of each part that carries loss, in characters of `text`, in order;
            the last one ends with the text.
    """

    text: str
    spans: tuple[tuple[int, int], ...]

    @property
    def answer_start(self) -> int:
        """Where the last answer starts: everything before it is the prompt to generate it from."""
        return self.spans[-1][0]


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
        """Glue the two texts; the completion carries the loss."""
        text = self.prompt + self.completion
        return Rendered(text, ((len(self.prompt), len(text)),))


@dataclass(frozen=True)
class Conversation(Sample):
    """Chat messages of which the assistant's turns carry the loss.

    Attributes:
        messages: The conversation up to the last assistant turn, which is the last message.
        context: How many of the first messages never carry loss (the prompt of a
            prompt-completion record).
        record: 0-based record of the data file.
    """

    messages: tuple[Message, ...]
    context: int
    record: int

    @property
    def answer(self) -> str:
        """The last assistant turn."""
        content: str = self.messages[-1]["content"]
        return content

    @property
    def content(self) -> Hashable:
        """The messages, and which of them carry loss."""
        return self.context, json.dumps(self.messages, sort_keys=True)

    def render(self, tokenizer: Any) -> Rendered:
        """Render the conversation once and find the assistant's turns in it.

        A turn starts where the rendering of the messages before it, with the generation prompt,
        ends: exactly what the model is given when it answers. It ends where the rendering of the
        messages up to it ends, the template's end-of-turn token included. White space after an
        EOS token is dropped: nothing is ever generated there.

        That needs a template whose rendering of the first messages is a prefix of the whole.
        Some templates rewrite earlier turns once later ones follow (they drop the reasoning);
        such turns carry no loss, with a warning.
        """
        eos = tokenizer.eos_token or ""
        whole = self._apply_template(tokenizer, len(self.messages), ask=False)
        turns = [
            turn
            for turn in range(self.context, len(self.messages))
            if self.messages[turn]["role"] == "assistant"
        ]
        found = [self._span(tokenizer, turn, whole, eos) for turn in turns]
        if found[-1] is None:
            raise InputError(
                f"Record {self.record}: the tokenizer's chat template renders the last assistant "
                "turn's start differently once the turn is known, so it cannot be found. "
                "Use records with prompt and completion texts, or another chat template."
            )
        if None in found:
            warnings.warn(
                "The tokenizer's chat template rewrites earlier turns of a conversation: such "
                "turns carry no loss, the last one does.",
                stacklevel=2,
            )
        spans = tuple(span for span in found if span is not None)
        return Rendered(_drop_space_after(whole, eos), spans)

    def _span(self, tokenizer: Any, turn: int, whole: str, eos: str) -> tuple[int, int] | None:
        """Where an assistant turn is in the whole text; None where the template rewrote it."""
        before = self._apply_template(tokenizer, turn, ask=True)
        upto = self._apply_template(tokenizer, turn + 1, ask=False)
        if not (upto.startswith(before) and whole.startswith(upto)):
            return None
        return len(before), len(_drop_space_after(upto, eos))

    def _apply_template(self, tokenizer: Any, count: int, *, ask: bool) -> str:
        """Render the first `count` messages; `ask` adds the start of the assistant's turn."""
        from jinja2 import TemplateError

        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"Record {self.record} is a conversation, but the tokenizer has no chat template. "
                "Use a model with one, or records with prompt and completion texts."
            )
        try:
            rendered: str = tokenizer.apply_chat_template(
                list(self.messages[:count]), tokenize=False, add_generation_prompt=ask
            )
        except (TemplateError, TypeError) as error:
            raise InputError(
                f"Record {self.record}: the tokenizer's chat template refuses the messages: {error}"
            ) from error
        return rendered


def _drop_space_after(text: str, eos: str) -> str:
    """Without the white space that follows an EOS token at the text's end."""
    stripped = text.rstrip()
    return stripped if eos and stripped.endswith(eos) else text
