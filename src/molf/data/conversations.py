"""Conversations as training samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molf.data.chat_template import INSTEAD_OF_CONTENT, Chat, Message, comparable, text_of
from molf.data.control_tokens import control_tokens, marked, unmarked, without_marks
from molf.data.samples import EMPTY, PromptCompletion, Rendered, Sample
from molf.data.turns import find_turns
from molf.errors import InputError

_REWRITTEN = (
    "an earlier assistant turn carries no loss: the chat template writes it differently once "
    "messages follow"
)
_PROMPT = (
    "the last assistant turn does not begin with the chat template's generation prompt, so "
    "training and generation differ at its beginning"
)
_LOST = "the chat template leaves out text or tool calls of a message"
_UNREAD = "the chat template does not read {}"
_UNNAMED = "the chat template does not name the role {!r}, of which no message carries loss"


@dataclass(frozen=True)
class Conversation(Sample):
    """Chat messages; the assistant's turns carry the loss.

    Attributes:
        messages: The conversation, cut after the last assistant turn that carries loss. An
            assistant message with `weight` 0 carries none.
        context: Number of first messages that never carry loss (the prompt of a
            prompt-completion record).
        record: 0-based record of the data file.
        tools: JSON schemas of the tools that the assistant may call; None for none.
        template_options: Further variables of the chat template (TRL's `chat_template_kwargs`).
    """

    messages: tuple[Message, ...]
    context: int
    record: int
    tools: tuple[Any, ...] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The text of the last assistant turn, without text added by a chat template."""
        return text_of(self.messages[-1].get("content"))

    @property
    def content(self) -> Hashable:
        """A hash of all inputs of the template, equal whichever turns carry loss."""
        messages = [comparable(message) for message in self.messages]
        whole = [messages, self.tools, dict(self.template_options)]
        # Parquet has values that JSON has not, such as times.
        text = json.dumps(whole, sort_keys=True, default=repr)
        # Keys of many records are kept at once, and this is shorter than their texts.
        return hashlib.sha256(text.encode()).digest()

    def longest_text(self, tokenizer: Any) -> str:
        """Return all messages as the template renders them.

        Raises:
            InputError: As in `render`.
        """
        return self._chat(tokenizer).whole.text

    def render(self, tokenizer: Any) -> Rendered:
        """Render the conversation through the tokenizer's chat template and find its turns.

        With the tokenizer's `split_special_tokens`, control tokens in the messages become plain
        text; those that the template writes stay control tokens.

        Raises:
            InputError: The tokenizer has no chat template, the template rejects the messages, or
                the last turn cannot be found in the rendered text.
        """
        chat = self._chat(tokenizer)
        learned = learned_turns(self.messages, self.context)
        try:
            turns = find_turns(tokenizer, chat, learned)
        except InputError as error:
            raise InputError(f"Record {self.record}: {error}") from error
        text, literal = unmarked(tokenizer, turns.text)
        faults = [_UNREAD.format(name) for name in chat.unread]
        faults += [_UNNAMED.format(role) for role in chat.unnamed_roles]
        if turns.rewritten:
            faults.append(_REWRITTEN)
        if turns.prompt_differs:
            faults.append(_PROMPT)
        # Templates strip and indent texts, so white space is not compared.
        written = _without_space(text)
        if not all(_is_in(written, part) for part in self._parts()):
            faults.append(_LOST)
        if any(_is_empty(self.messages[turn]) for turn in learned):
            faults.append(EMPTY)
        spelled = control_tokens(tokenizer)
        return Rendered(
            text=text,
            spans=tuple(
                (without_marks(turns.text, start), without_marks(turns.text, end))
                for start, end in turns.spans
            ),
            answer_start=without_marks(turns.text, turns.answer_start),
            faults=tuple(faults),
            literal=literal,
            control_tokens=sum(
                len(spelled.findall(text)) for text in _texts((self.messages, self.tools))
            ),
        )

    def _chat(self, tokenizer: Any) -> Chat:
        """Return the messages in the form that the tokenizer's template accepts."""
        messages, tools = self.messages, self.tools
        if getattr(tokenizer, "split_special_tokens", False):
            messages, tools = marked(tokenizer, messages), marked(tokenizer, tools)
        try:
            return Chat(tokenizer, messages, tools, self.template_options)
        except InputError as error:
            raise InputError(f"Record {self.record}: {error}") from error

    def _parts(self) -> Iterator[str]:
        """Yield the texts that the rendering must contain."""
        for message in self.messages:
            yield text_of(message.get("content"))
            yield from _called(message.get("tool_calls"))


@dataclass(frozen=True)
class Instruction(Sample):
    """An instruction and its output: a conversation for chat models, else a prompt with headings.

    Attributes:
        conversation: The record as messages, for tokenizers with a chat template.
        plain: The record as prompt and completion, for tokenizers without.
    """

    conversation: Conversation
    plain: PromptCompletion

    @property
    def record(self) -> int:  # type: ignore[override]
        """0-based record of the data file."""
        return self.plain.record

    @property
    def answer(self) -> str:
        """The output."""
        return self.plain.answer

    @property
    def content(self) -> Hashable:
        """That of the conversation."""
        return self.conversation.content

    def render(self, tokenizer: Any) -> Rendered:
        """Render the conversation if the tokenizer has a chat template, else the prompt.

        Raises:
            InputError: The template rejects the messages.
        """
        return self._form(tokenizer).render(tokenizer)

    def longest_text(self, tokenizer: Any) -> str:
        """Return the text of the form that `render` renders.

        Raises:
            InputError: As in `render`.
        """
        return self._form(tokenizer).longest_text(tokenizer)

    def _form(self, tokenizer: Any) -> Conversation | PromptCompletion:
        has_template = getattr(tokenizer, "chat_template", None) is not None
        return self.conversation if has_template else self.plain


def learned_turns(messages: Sequence[Message], context: int) -> list[int]:
    """Return the indices of the assistant messages that carry loss; the context has none."""
    return [
        index
        for index in range(context, len(messages))
        if messages[index]["role"] == "assistant" and messages[index].get("weight") != 0
    ]


def _is_empty(message: Message) -> bool:
    """Return whether a message has neither a text nor anything in its place."""
    return not (
        text_of(message.get("content")).strip() or any(map(message.get, INSTEAD_OF_CONTENT))
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _texts(entry)


def _called(calls: Any) -> Iterator[str]:
    """Yield the names of called functions."""
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield function["name"]


def _is_in(written: str, part: str) -> bool:
    """Return whether a text without white space contains a part, as it is or quoted as JSON."""
    quoted = (json.dumps(part, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return any(_without_space(form) in written for form in (part, *quoted))


def _without_space(text: str) -> str:
    return "".join(text.split())
