"""The chat template that training uses, and the form in which it takes messages."""

from __future__ import annotations

import copy
import itertools
import json
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from molf.errors import InputError

Message = dict[str, Any]
"""A chat message: `role`, `content` (text, or a list of text parts), and further fields."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_PROBE = ("vexq", "jumbz")  # words that no template writes of its own

_REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers makes each of the others

_NOT_FOR_TEMPLATES = frozenset({"role", "content", "weight", "tool_call_id", "id"})
"""Message fields whose absence from a template loses nothing that could be trained on."""


@dataclass(frozen=True)
class Rendering:
    """Messages as a template writes them.

    Attributes:
        text: The text.
        marks: Start and end, in characters, of each part inside `{% generation %}`; contiguous
            parts are one. None where the template has no such marks.
    """

    text: str
    marks: tuple[tuple[int, int], ...] | None


class ChatTemplate:
    """The template that training renders conversations with.

    Where TRL knows the tokenizer's template and has a training variant of it, this is the variant:
    it marks the assistant's turns, and writes a turn the same way whether or not others follow.

    Args:
        tokenizer: The tokenizer; `source` is one of its templates.
        source: The template.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        # Of a tokenizer without BOS the template writes none, also where it adds it to a text.
        self._special_tokens = {"bos_token": "", **tokenizer.special_tokens_map}
        self.source = _training_variant(tokenizer, source) or source
        self.has_marks = _GENERATION.search(self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        ask: bool = False,
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Rendering:
        """Render messages.

        Args:
            messages: The messages, as the template takes them (`Chat` finds that form).
            ask: Whether the start of an assistant's turn is added (`add_generation_prompt`).
            tools: JSON schemas of the tools that the assistant may call.
            options: Further variables of the template (TRL's `chat_template_kwargs`).

        Raises:
            Exception: The template refuses the messages: `jinja2.TemplateError`, or anything else.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            conversations=[list(messages)],
            tools=None if tools is None else list(tools),
            chat_template=self.source,
            return_assistant_tokens_mask=self.has_marks,
            add_generation_prompt=ask,
            **{**self._special_tokens, **(options or {})},
        )
        return Rendering(texts[0], _joined(marks[0]) if self.has_marks else None)

    def reads(self, name: str) -> bool:
        """Whether the template's text has a variable or field of this name."""
        names = _REASONING if name in _REASONING else (name,)
        return any(re.search(rf"\b{re.escape(one)}\b", self.source) for one in names)

    @cached_property
    def takes_texts(self) -> bool:
        """Whether contents may be texts; templates of vision models may want lists of parts."""
        return self._writes_probe(parts=False) or not self._writes_probe(parts=True)

    def _writes_probe(self, *, parts: bool) -> bool:
        messages = [
            {"role": role, "content": _content(word, parts=parts)}
            for role, word in zip(("user", "assistant"), _PROBE, strict=True)
        ]
        try:
            text = self.render(messages).text
        except Exception:  # a template is a program: it may raise anything
            return False
        return all(word in text for word in _PROBE)


class Chat:
    """A conversation in the form that its tokenizer's template takes.

    Templates differ in three things that records do not say: whether a content is a text or a list
    of parts, whether a tool call's arguments are an object or JSON text, and how a message without
    content is given. The first form that the template accepts is used; objects come first,
    because a template that expects them writes a text twice quoted. A form in which the template
    writes `None` or `null` for an absent content comes last.

    Args:
        tokenizer: The tokenizer.
        messages: The messages, at least one.
        tools: JSON schemas of tools.
        options: Further variables of the template.

    Raises:
        InputError: The tokenizer has no template, or it refuses the messages.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.template = template_of(tokenizer, has_tools=tools is not None)
        self._tools = tools
        self._options = options
        self._given = messages
        self._messages: list[Message] = []
        self._known: dict[tuple[int, bool], Rendering | None] = {}
        self.whole = self._first_accepted()

    def __len__(self) -> int:
        """The number of messages."""
        return len(self._messages)

    @property
    def assistants(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [i for i, message in enumerate(self._given) if message["role"] == "assistant"]

    def given(self, index: int) -> Message:
        """A message as the record has it."""
        return self._given[index]

    def render(self, count: int, *, ask: bool = False) -> Rendering | None:
        """Render the first `count` messages; None where the template refuses them alone."""
        if count == len(self) and not ask:
            return self.whole
        if (count, ask) not in self._known:
            found = self._tried(self._messages[:count], ask=ask)
            self._known[count, ask] = None if isinstance(found, Exception) else found
        return self._known[count, ask]

    def render_with(self, index: int, content: str, count: int) -> Rendering | None:
        """Render the first `count` messages with another text in message `index`."""
        messages = self._messages[:count]
        parts = not self.template.takes_texts
        messages[index] = {**messages[index], "content": _content(content, parts=parts)}
        found = self._tried(messages)
        return None if isinstance(found, Exception) else found

    @property
    def unread(self) -> list[str]:
        """Names of fields of the messages and variables that the template does not read."""
        names = {
            key
            for message in self._messages
            for key in message
            if key not in _NOT_FOR_TEMPLATES and (key, message["role"]) != ("name", "tool")
        }
        names |= set(self._options) | ({"tools"} if self._tools else set())
        return sorted(name for name in names if not self.template.reads(name))

    def _first_accepted(self) -> Rendering:
        accepted: list[tuple[Rendering, list[Message]]] = []
        refusal: Exception | None = None
        for messages in self._forms():
            found = self._tried(messages)
            if isinstance(found, Exception):
                refusal = refusal or found
                continue
            accepted.append((found, messages))
            if all(message.get("content") is not None for message in messages):
                break
        if not accepted:
            raise InputError(f"the tokenizer's chat template refuses the messages: {refusal}")
        rendering, self._messages = min(accepted, key=lambda form: _nulls(form[0].text))
        return rendering

    def _forms(self) -> Iterator[list[Message]]:
        parts = not self.template.takes_texts
        has_calls = any(message.get("tool_calls") for message in self._given)
        has_empty = any(message.get("content") is None for message in self._given)
        for as_object, empty in itertools.product(
            (True, False) if has_calls else (True,),
            ("absent", "null", "text") if has_empty else ("absent",),
        ):
            yield [
                _formed(message, parts=parts, as_object=as_object, empty=empty)
                for message in self._given
            ]

    def _tried(self, messages: Sequence[Message], *, ask: bool = False) -> Rendering | Exception:
        tools, options = self._tools, self._options
        try:
            return self.template.render(messages, ask=ask, tools=tools, options=options)
        except Exception as error:  # a template is a program: it may raise anything
            return error


_templates: weakref.WeakKeyDictionary[Any, dict[str, ChatTemplate]] = weakref.WeakKeyDictionary()


def template_of(tokenizer: Any, *, has_tools: bool) -> ChatTemplate:
    """Return the template for conversations with or without tools.

    Raises:
        InputError: The tokenizer has none, or none that is its default one.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "a conversation needs a chat template, and the tokenizer has none. Use a model with "
            "one, or records with prompt and completion texts."
        )
    try:
        source: str = tokenizer.get_chat_template(tools=[] if has_tools else None)
    except ValueError as error:
        raise InputError(
            "the tokenizer has several chat templates, and none is its default one (they are: "
            f"{', '.join(tokenizer.chat_template)})."
        ) from error
    known = _templates.setdefault(tokenizer, {})
    if source not in known:
        known[source] = ChatTemplate(tokenizer, source)
    return known[source]


def text_of(content: Any) -> str:
    """The text of a message's content: itself, its text parts joined, or nothing."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _training_variant(tokenizer: Any, source: str) -> str | None:
    """TRL's training variant of a template; None where it has none or none is needed."""
    from trl import get_training_chat_template

    single = copy.copy(tokenizer)  # it may have several templates, and TRL looks at the default
    single.chat_template = source
    try:
        variant: str | None = get_training_chat_template(single)
    except Exception:  # TRL does not know it; looking, it renders probes that may raise anything
        return None
    return variant


def _nulls(text: str) -> int:
    """How often a text says that something is absent."""
    return len(re.findall(r"\b(?:None|null)\b", text))


def _joined(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans in order, those that touch as one, empty ones left out."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if start == end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)


def _content(text: str, *, parts: bool) -> Any:
    return [{"type": "text", "text": text}] if parts else text


def _formed(message: Message, *, parts: bool, as_object: bool, empty: str) -> Message:
    """A message in one form; fields that are null are left out, as transformers does."""
    formed = {name: value for name, value in message.items() if value is not None}
    formed.pop("weight", None)  # says whether the turn is learned
    if "content" in formed:
        formed["content"] = _content(text_of(formed["content"]), parts=parts)
    elif empty != "absent":
        formed["content"] = None if empty == "null" else _content("", parts=parts)
    if isinstance(formed.get("tool_calls"), list):
        formed["tool_calls"] = [_call(call, as_object=as_object) for call in formed["tool_calls"]]
    return formed


def _call(call: Any, *, as_object: bool) -> Any:
    """A tool call with its arguments as an object or as JSON text, where they are either."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], as_object=as_object)}
    arguments = call.get("arguments")
    if as_object and isinstance(arguments, str):
        try:
            loaded = json.loads(arguments)
        except ValueError:
            return call
        return {**call, "arguments": loaded} if isinstance(loaded, dict) else call
    if not as_object and isinstance(arguments, dict):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call
