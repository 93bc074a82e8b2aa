"""Where in a rendered conversation the assistant's turns are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from molf.errors import InputError
from molf.tasks.chat_template import Chat, text_of
from molf.tasks.samples import Span


@dataclass(frozen=True)
class Turns:
    """The turns that carry loss.

    Attributes:
        text: The rendered conversation, up to the end of its last turn.
        spans: The parts of the text that carry loss, in order.
        answer_start: Where the last turn starts: everything before it is the prompt.
        rewritten: How many other turns could not be found in the text.
        prompt_differs: Whether the last turn begins otherwise than the template's generation prompt
            lets it begin.
    """

    text: str
    spans: tuple[Span, ...]
    answer_start: int
    rewritten: int
    prompt_differs: bool


def find_turns(tokenizer: Any, chat: Chat, learned: Sequence[int]) -> Turns:
    """Find turns by the template's marks, or else by comparing renderings.

    A turn is what the model writes when it is asked for one: it starts behind the generation
    prompt, and ends with the template's end of turn.

    Args:
        tokenizer: The tokenizer.
        chat: The conversation; its last message is the last of `learned`.
        learned: Indices of the assistant messages that carry loss, in order.

    Raises:
        InputError: The last turn cannot be found.
    """
    finder = _Finder(tokenizer, chat)
    turns = finder.marked(learned) or finder.compared(learned)
    if turns is None:
        raise InputError(
            "the last assistant turn cannot be found in the conversation as the tokenizer's chat "
            "template writes it. Use records with prompt and completion texts, or another template."
        )
    return turns


class _Finder:
    """What both ways of finding turns need of one conversation."""

    def __init__(self, tokenizer: Any, chat: Chat) -> None:
        self._chat = chat
        self._whole = chat.whole.text
        self._eos = tokenizer.eos_token or ""
        self._tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    def marked(self, learned: Sequence[int]) -> Turns | None:
        """The turns by the template's `{% generation %}` marks; None where these do not fit."""
        owned = self._owned_marks()
        if owned is None or not all(
            self._holds(owned.get(turn), turn) and not self._precede(owned[turn], turn)
            for turn in learned
        ):
            return None
        last = learned[-1]
        text, rest = self._whole, self._whole[owned[last][-1][1] :]
        # The end of turn belongs to the turn, also where a template sets its mark before it.
        ending = rest.strip()
        spans: list[Span] = []
        starts = {}
        for turn in learned:
            found = [*owned[turn]]
            found[0] = (self._behind_prompt(turn, *found[0]), found[0][1])
            found[-1] = (found[-1][0], self._with_ending(found[-1][1], ending))
            starts[turn] = found[0][0]
            spans += found
        if not ending:
            text = text[: spans[-1][1]]
        spans = [(start, self._without_space(text, end)) for start, end in spans]
        return Turns(text[: spans[-1][1]], tuple(spans), starts[last], 0, self._prompt_differs())

    def _owned_marks(self) -> dict[int, list[Span]] | None:
        """The marks of each assistant message."""
        marks = self._chat.whole.marks
        if not marks:
            return None
        turns = self._chat.assistants
        if len(turns) == len(marks):
            return {turn: [mark] for turn, mark in zip(turns, marks, strict=True)}
        # A turn may have several: those that its message adds to the rendering of the ones before.
        owned: dict[int, list[Span]] = {}
        before = 0
        for turn in turns:
            upto = self._chat.render(turn + 1)
            if upto is None or upto.marks is None or not before <= len(upto.marks) <= len(marks):
                return None
            owned[turn] = list(marks[before : len(upto.marks)])
            before = len(upto.marks)
        return owned if before == len(marks) else None

    def _holds(self, marks: Sequence[Span] | None, turn: int) -> bool:
        """Whether marks hold a message's text, wherever the template writes it."""
        if not marks:
            return False
        text = text_of(self._chat.given(turn).get("content")).strip()
        marked = "".join(self._whole[start:end] for start, end in marks)
        return text in marked or text not in self._whole

    def _precede(self, marks: Sequence[Span], turn: int) -> bool:
        """Whether marks begin in the text of the messages before a turn: they are of these."""
        before = self._chat.render(turn, ask=True) if turn else None
        return before is not None and marks[0][1] < _shared(before.text, self._whole)

    def _behind_prompt(self, turn: int, start: int, end: int) -> int:
        """The start of a marked turn without what the generation prompt already says of it."""
        before = self._chat.render(turn, ask=True) if turn else None
        if before is None:
            return start
        shared = self._snapped(_shared(before.text, self._whole), of=before.text)
        return shared if start < shared < end else start

    def _with_ending(self, end: int, ending: str) -> int:
        """The end of a marked turn, with the end-of-turn text that a mark may leave out."""
        for text in (ending, self._eos):
            if text and self._whole[end:].lstrip().startswith(text):
                return self._whole.index(text, end) + len(text)
        return end

    def compared(self, learned: Sequence[int]) -> Turns | None:
        """The turns by what each adds to the rendering of the messages before it."""
        found = [self._added(turn) for turn in learned]
        if found[-1] is None:
            return None
        spans = tuple(span for span in found if span is not None)
        text = self._whole[: spans[-1][1]]
        return Turns(text, spans, spans[-1][0], found.count(None), self._prompt_differs())

    def _prompt_differs(self) -> bool:
        asked = self._chat.render(len(self._chat) - 1, ask=True) if len(self._chat) > 1 else None
        return asked is not None and not self._whole.startswith(asked.text)

    def _added(self, turn: int) -> Span | None:
        """Where a turn is in the whole; None where the template wrote it differently there."""
        is_last = turn + 1 == len(self._chat)
        before = self._chat.render(turn, ask=True) if turn else None
        upto = self._chat.whole if is_last else self._chat.render(turn + 1)
        if before is None or upto is None:
            return self._replaced(turn)
        shared = _shared(before.text, self._whole)
        plain = self._chat.render(turn)
        # Up to here, `before` is the earlier messages; the rest of it is the generation prompt.
        history = len(
            before.text
            if plain is None
            else before.text[: _shared(before.text, plain.text)].rstrip()
        )
        if shared < history:
            return self._replaced(turn)
        start = max(self._snapped(shared, of=before.text), history)
        end = self._snapped(_shared(upto.text, self._whole), of=upto.text)
        # What follows the last message alone may be another end of turn; no other text.
        if end <= start or not self._is_ending(upto.text[end:]):
            return self._replaced(turn)
        end = self._closed(start, end, upto.text[end:])
        return (start, self._without_space(self._whole, end))

    def _replaced(self, turn: int) -> Span | None:
        """A turn by what changes in the rendering when its text does, and the end of turn."""
        text = text_of(self._chat.given(turn).get("content")).strip()
        span = self._changed(turn, text, len(self._chat))
        alone = self._changed(turn, text, turn + 1)
        upto = self._chat.render(turn + 1)
        if span is None or alone is None or upto is None:
            return None
        start, end = span
        if turn + 1 == len(self._chat):
            return (start, self._without_space(self._whole, len(self._whole)))
        ending = upto.text[alone[1] :]
        shared = end + _shared(self._whole[end:], ending)
        cut = self._snapped(shared, of=self._whole[:end] + ending)
        cut = max(cut, end)
        cut = self._closed(start, cut, ending[cut - end :])
        return (start, self._without_space(self._whole, cut))

    def _changed(self, turn: int, text: str, count: int) -> Span | None:
        """Where `text` is in the rendering of `count` messages; None where it is not written."""
        if not text:
            return None
        # The other text must share neither its first nor its last character with this one.
        other = next(word for word in ("xq", "jz", "mk") if not {text[0], text[-1]} & set(word))
        rendering = self._chat.render(count)
        changed = self._chat.render_with(turn, other, count)
        if rendering is None or changed is None or other not in changed.text:
            return None
        start = _shared(rendering.text, changed.text)
        end = start + len(rendering.text) - len(changed.text) + len(other)
        return (start, end) if rendering.text[start:end].strip() == text else None

    def _closed(self, start: int, end: int, last_ending: str) -> int:
        """The end of a turn, behind its end-of-turn token where that differs from the last turn's.

        Args:
            start: Where the turn starts.
            end: Up to where it is the same as when no message follows.
            last_ending: What follows there when no message does.
        """
        here = next((t for t in self._tokens if self._whole.startswith(t, end)), "")
        is_open = not any(self._whole[start:end].rstrip().endswith(t) for t in self._tokens)
        return end + len(here) if is_open and last_ending.strip() else end

    def _is_ending(self, text: str) -> bool:
        """Whether a text holds nothing but tokens of the tokenizer's own and white space."""
        for token in self._tokens:
            text = text.replace(token, "")
        return not text.strip()

    def _snapped(self, position: int, of: str | None = None) -> int:
        """Where two texts begin to differ, moved back to where both may be cut.

        They may share the first characters of what differs, such as `<|` of two tokens.

        Args:
            position: How many characters the whole rendering and `of` share at their start.
            of: The other text; None if the whole is compared with itself.
        """
        texts = [self._whole, *([] if of is None else [of])]
        if any(position >= len(text) for text in texts):
            return position
        last = 0
        for token in self._tokens:
            for text in texts:
                start = text.find(token, max(0, position - len(token) + 1))
                if 0 <= start < position < start + len(token):
                    return start
            start = self._whole.rfind(token, 0, position)
            last = max(last, start + len(token) if start >= 0 else 0)
        if last == position or any(text[position].isspace() for text in texts):
            return position
        return max(last, len(self._whole[:position]) - len(_last_word(self._whole[:position])))

    def _without_space(self, text: str, end: int) -> int:
        """The end of a turn without the white space that follows an EOS token.

        Nothing is ever generated there.
        """
        stripped = text[:end].rstrip()
        return len(stripped) if self._eos and stripped.endswith(self._eos) else end


def _shared(text: str, other: str) -> int:
    """How many characters two texts share at their start."""
    low, high = 0, min(len(text), len(other))
    while low < high:  # comparing halves is faster than comparing characters in Python
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _last_word(text: str) -> str:
    """The characters behind a text's last white space."""
    found = re.search(r"\S*\Z", text)
    return found[0] if found else ""
