"""The chat template used in training, and conversations in the form that it accepts."""

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

_NULL = re.compile(r"\b(?:None|null)\b")  # written by templates for a missing value

_PROBE = ("vexq", "jumbz")  # words that no template contains

_REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers copies one to the others

INSTEAD_OF_CONTENT = ("tool_calls", *_REASONING)
"""Message fields beside which a content may be missing or empty."""

ROLES = ("system", "user", "assistant", "tool")
"""Roles that templates may write without naming them."""

_IDS = frozenset({"id", "tool_call_id"})

_NOT_FOR_TEMPLATES = _IDS | {"role", "content", "weight"}
"""Message fields without text to train on: a template may ignore them."""


@dataclass(frozen=True)
class Rendering:
    """Messages rendered by a template.

    Attributes:
        text: The text.
        marks: Start and end, in characters, of each part inside `{% generation %}`; contiguous
            parts are joined. None where the template has no such marks.
    """

    text: str
    marks: tuple[tuple[int, int], ...] | None


class ChatTemplate:
    """The template that renders conversations for training.

    This is TRL's training variant of the tokenizer's template where TRL has one. The variant marks
    the assistant's turns and renders a turn the same way whether or not others follow.

    Args:
        tokenizer: The tokenizer; `source` is one of its templates.
        source: The template.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        # A template that writes `bos_token` writes nothing where the tokenizer has none.
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
            messages: The messages, in the form that the template accepts (see `Chat`).
            ask: Whether the start of an assistant's turn is added (`add_generation_prompt`).
            tools: JSON schemas of the tools that the assistant may call.
            options: Further variables of the template (TRL's `chat_template_kwargs`).

        Raises:
            Exception: The template rejects the messages: `jinja2.TemplateError`, or anything else.
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
        return Rendering(texts[0], _join_spans(marks[0]) if self.has_marks else None)

    def reads(self, name: str) -> bool:
        """Return whether the template's text has a variable or field of this name."""
        names = _REASONING if name in _REASONING else (name,)
        return any(re.search(rf"\b{re.escape(one)}\b", self.source) for one in names)

    @cached_property
    def takes_texts(self) -> bool:
        """Whether contents may be texts; templates of vision models may need lists of parts."""
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
    """A conversation in the form that its tokenizer's template accepts.

    Templates differ in three points: a content is a text or a list of parts, a tool call's
    arguments are an object or JSON text, and a message without content lacks it, has null or has
    an empty text. The first form that the template accepts is used. Objects are tried first,
    because a template that expects an object quotes a JSON text twice. A form that makes the
    template write `None` or `null` is used only where no other is accepted.

    Args:
        tokenizer: The tokenizer.
        messages: The messages, at least one.
        tools: JSON schemas of tools.
        options: Further variables of the template.

    Attributes:
        given: The messages of the record, unchanged.
        whole: All messages, rendered.

    Raises:
        InputError: The tokenizer has no template, or its template rejects the messages.
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
        self.given = messages
        self._messages: list[Message] = []
        self._renderings: dict[tuple[int, bool], Rendering | None] = {}
        self.whole = self._first_accepted()

    def __len__(self) -> int:
        """The number of messages."""
        return len(self._messages)

    def render(self, count: int, *, ask: bool = False) -> Rendering | None:
        """Render the first `count` messages; None where the template rejects them alone."""
        if count == len(self) and not ask:
            return self.whole
        # Cached: the search for turns renders the same prefixes repeatedly.
        if (count, ask) not in self._renderings:
            found = self._try_render(self._messages[:count], ask=ask)
            self._renderings[count, ask] = None if isinstance(found, Exception) else found
        return self._renderings[count, ask]

    def render_with(self, index: int, content: str, count: int) -> Rendering | None:
        """Render the first `count` messages with another text in message `index`."""
        messages = self._messages[:count]
        parts = not self.template.takes_texts
        messages[index] = {**messages[index], "content": _content(content, parts=parts)}
        found = self._try_render(messages)
        return None if isinstance(found, Exception) else found

    @property
    def unread(self) -> list[str]:
        """Names of message fields and variables that the template does not read."""
        names = {
            key
            for message in self._messages
            for key in message
            if key not in _NOT_FOR_TEMPLATES and (key, message["role"]) != ("name", "tool")
        }
        names |= set(self._options) | ({"tools"} if self._tools else set())
        return sorted(name for name in names if not self.template.reads(name))

    @property
    def unnamed_roles(self) -> list[str]:
        """Roles of the messages that the template does not name."""
        roles = {message["role"] for message in self._messages}.difference(ROLES)
        return sorted(role for role in roles if not self.template.reads(role))

    def _first_accepted(self) -> Rendering:
        accepted: list[tuple[Rendering, list[Message]]] = []
        refusal: Exception | None = None
        for messages in self._forms():
            found = self._try_render(messages)
            if isinstance(found, Exception):
                refusal = refusal or found
                continue
            accepted.append((found, messages))
            # A form with all contents present cannot write None or null for them.
            if all(message.get("content") is not None for message in messages):
                break
        if not accepted:
            raise InputError(f"the tokenizer's chat template refuses the messages: {refusal}")
        rendering, self._messages = min(accepted, key=lambda form: len(_NULL.findall(form[0].text)))
        return rendering

    def _forms(self) -> Iterator[list[Message]]:
        parts = not self.template.takes_texts
        has_calls = any(message.get("tool_calls") for message in self.given)
        has_empty = any(message.get("content") is None for message in self.given)
        for as_object, empty in itertools.product(
            (True, False) if has_calls else (True,),
            ("absent", "null", "text") if has_empty else ("absent",),
        ):
            yield [
                _converted(message, parts=parts, as_object=as_object, empty=empty)
                for message in self.given
            ]

    def _try_render(
        self, messages: Sequence[Message], *, ask: bool = False
    ) -> Rendering | Exception:
        tools, options = self._tools, self._options
        try:
            return self.template.render(messages, ask=ask, tools=tools, options=options)
        except Exception as error:  # a template is a program: it may raise anything
            return error


_templates: weakref.WeakKeyDictionary[Any, dict[str, ChatTemplate]] = weakref.WeakKeyDictionary()


def template_of(tokenizer: Any, *, has_tools: bool) -> ChatTemplate:
    """Return the template for conversations with or without tools.

    Raises:
        InputError: The tokenizer has no template, or several without a default.
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
    # Cached by tokenizer: looking for the training variant renders several chats.
    known = _templates.setdefault(tokenizer, {})
    if source not in known:
        known[source] = ChatTemplate(tokenizer, source)
    return known[source]


def text_of(content: Any) -> str:
    """Return a message's content as text: its text parts joined, or "" where there is none."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def comparable(message: Message) -> Message:
    """Return a message without what may differ between records of the same texts.

    Its content is a text, arguments of tool calls are objects, and ids and `weight` are left out.
    """
    formed = _converted(message, parts=False, as_object=True, empty="text")
    kept = {name: value for name, value in formed.items() if name not in _IDS}
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [
            {name: value for name, value in call.items() if name not in _IDS}
            if isinstance(call, dict)
            else call
            for call in kept["tool_calls"]
        ]
    return kept


def _training_variant(tokenizer: Any, source: str) -> str | None:
    """Return TRL's training variant of a template; None where there is none or none is needed."""
    from trl import get_training_chat_template

    single = copy.copy(tokenizer)  # of several templates, TRL reads only the default
    single.chat_template = source
    try:
        variant: str | None = get_training_chat_template(single)
    except Exception:  # TRL has no variant; its test rendering may raise anything
        return None
    return variant


def _join_spans(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sort spans, join those that touch and drop empty ones."""
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


def _converted(message: Message, *, parts: bool, as_object: bool, empty: str) -> Message:
    """Return a message in one form, without null fields, as transformers does."""
    formed = {name: value for name, value in message.items() if value is not None}
    formed.pop("weight", None)  # selects the turns with loss; not part of the text
    if "content" in formed:
        formed["content"] = _content(text_of(formed["content"]), parts=parts)
    elif empty != "absent":
        formed["content"] = None if empty == "null" else _content("", parts=parts)
    if isinstance(formed.get("tool_calls"), list):
        formed["tool_calls"] = [
            _converted_call(call, as_object=as_object) for call in formed["tool_calls"]
        ]
    return formed


def _converted_call(call: Any, *, as_object: bool) -> Any:
    """Return a tool call with its arguments as an object or as JSON text, converted if possible."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _converted_call(call["function"], as_object=as_object)}
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
