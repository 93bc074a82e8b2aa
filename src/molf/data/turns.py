"""Search for the assistant's turns in a rendered conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from molf.data.chat_template import Chat, text_of
from molf.data.samples import Span
from molf.errors import InputError


@dataclass(frozen=True)
class Turns:
    """The turns that carry loss.

    Attributes:
        text: The rendered conversation, up to the end of its last turn.
        spans: The parts of the text that carry loss, in order.
        answer_start: Start of the last turn; the text before it is the prompt.
        rewritten: Number of other turns that are not found in the text.
        prompt_differs: Whether the text before the last turn differs from the template's prompt for
            generation.
    """

    text: str
    spans: tuple[Span, ...]
    answer_start: int
    rewritten: int
    prompt_differs: bool


def find_turns(tokenizer: Any, chat: Chat, learned: Sequence[int]) -> Turns:
    """Find turns by the template's marks, or else by comparing renderings.

    A turn is the text that the model generates for it: it starts after the generation prompt and
    ends with the template's end-of-turn text.

    Args:
        tokenizer: The tokenizer.
        chat: The conversation; its last message is the last of `learned`.
        learned: Indices of the assistant messages that carry loss, in order.

    Raises:
        InputError: The last turn cannot be found.
    """
    # Marks first: a comparison fails where the template rewrites earlier turns.
    finder = _Finder(tokenizer, chat)
    turns = finder.marked(learned) or finder.compared(learned)
    if turns is None:
        raise InputError(
            "the last assistant turn cannot be found in the conversation as the tokenizer's chat "
            "template writes it. Use records with prompt and completion texts, or another template."
        )
    return turns


class _Finder:
    """Finds the turns of one conversation in either way."""

    def __init__(self, tokenizer: Any, chat: Chat) -> None:
        self._chat = chat
        self._whole = chat.whole.text
        self._eos = tokenizer.eos_token or ""
        # The longest first: one token may be the beginning of another.
        self._tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    def marked(self, learned: Sequence[int]) -> Turns | None:
        """Find the turns by `{% generation %}` marks; None where the marks do not fit."""
        owned = self._marks_by_turn()
        if owned is None or not all(
            self._contain_text(owned.get(turn), turn)
            and not self._are_of_earlier_turns(owned[turn], turn)
            for turn in learned
        ):
            return None
        last = learned[-1]
        text, rest = self._whole, self._whole[owned[last][-1][1] :]
        # The end-of-turn text belongs to the turn, even where the template's mark ends before it.
        ending = rest.strip()
        spans: list[Span] = []
        starts = {}
        for turn in learned:
            found = [*owned[turn]]
            found[0] = (self._after_prompt(turn, *found[0]), found[0][1])
            found[-1] = (found[-1][0], self._with_ending(found[-1][1], ending))
            starts[turn] = found[0][0]
            spans += found
        if not ending:
            text = text[: spans[-1][1]]
        spans = [(start, self._without_space(text, end)) for start, end in spans]
        return Turns(text[: spans[-1][1]], tuple(spans), starts[last], 0, self._prompt_differs())

    def _marks_by_turn(self) -> dict[int, list[Span]] | None:
        """Return the marks of each assistant message; None where they cannot be assigned."""
        marks = self._chat.whole.marks
        if not marks:
            return None
        messages = enumerate(self._chat.given)
        turns = [index for index, message in messages if message["role"] == "assistant"]
        if len(turns) == len(marks):
            return {turn: [mark] for turn, mark in zip(turns, marks, strict=True)}
        # A turn may have several marks: those that its message adds to the previous rendering.
        owned: dict[int, list[Span]] = {}
        before = 0
        for turn in turns:
            upto = self._chat.render(turn + 1)
            if upto is None or upto.marks is None or not before <= len(upto.marks) <= len(marks):
                return None
            owned[turn] = list(marks[before : len(upto.marks)])
            before = len(upto.marks)
        return owned if before == len(marks) else None

    def _contain_text(self, marks: Sequence[Span] | None, turn: int) -> bool:
        """Return whether marks contain a message's text, where the template writes it."""
        if not marks:
            return False
        text = self._text(turn)
        marked = "".join(self._whole[start:end] for start, end in marks)
        return text in marked or text not in self._whole

    def _are_of_earlier_turns(self, marks: Sequence[Span], turn: int) -> bool:
        """Return whether marks end in the text before a turn, and so belong to earlier messages."""
        before = self._chat.render(turn, ask=True) if turn else None
        return before is not None and marks[0][1] < _common_length(before.text, self._whole)

    def _after_prompt(self, turn: int, start: int, end: int) -> int:
        """Return the start of a marked turn, after the generation prompt."""
        before = self._chat.render(turn, ask=True) if turn else None
        if before is None:
            return start
        shared = self._to_boundary(_common_length(before.text, self._whole), of=before.text)
        return shared if start < shared < end else start

    def _with_ending(self, end: int, ending: str) -> int:
        """Return the end of a marked turn, including end-of-turn text after the mark."""
        for text in (ending, self._eos):
            if text and self._whole[end:].lstrip().startswith(text):
                return self._whole.index(text, end) + len(text)
        return end

    def compared(self, learned: Sequence[int]) -> Turns | None:
        """Find the turns as the text that each adds to the rendering of the messages before it."""
        found = [self._found_by_added_text(turn) for turn in learned]
        if found[-1] is None:
            return None
        spans = tuple(span for span in found if span is not None)
        text = self._whole[: spans[-1][1]]
        return Turns(text, spans, spans[-1][0], found.count(None), self._prompt_differs())

    def _prompt_differs(self) -> bool:
        asked = self._chat.render(len(self._chat) - 1, ask=True) if len(self._chat) > 1 else None
        return asked is not None and not self._whole.startswith(asked.text)

    def _found_by_added_text(self, turn: int) -> Span | None:
        """Find a turn in the whole text; None where the template renders it differently there."""
        is_last = turn + 1 == len(self._chat)
        before = self._chat.render(turn, ask=True) if turn else None
        upto = self._chat.whole if is_last else self._chat.render(turn + 1)
        if before is None or upto is None:
            return self._found_by_other_text(turn)
        shared = _common_length(before.text, self._whole)
        plain = self._chat.render(turn)
        # Length of the earlier messages in `before`; the rest of it is the generation prompt.
        history = len(
            before.text
            if plain is None
            else before.text[: _common_length(before.text, plain.text)].rstrip()
        )
        if shared < history:
            return self._found_by_other_text(turn)
        start = max(self._to_boundary(shared, of=before.text), history)
        end = self._to_boundary(_common_length(upto.text, self._whole), of=upto.text)
        # After the shared text, only another end-of-turn text may follow in `upto`.
        if end <= start or not self._is_ending(upto.text[end:]):
            return self._found_by_other_text(turn)
        end = self._closed(turn, start, end, upto.text[end:])
        return (start, self._without_space(self._whole, end))

    def _found_by_other_text(self, turn: int) -> Span | None:
        """Find a turn by rendering it with another text; add its end-of-turn text."""
        if not self._text(turn):  # the turn may have other parts, such as a tool call
            return None
        span = self._changed_part(turn, len(self._chat))
        alone = self._changed_part(turn, turn + 1)
        upto = self._chat.render(turn + 1)
        if span is None or alone is None or upto is None:
            return None
        start, end = span
        if turn + 1 == len(self._chat):
            return (start, self._without_space(self._whole, len(self._whole)))
        ending = upto.text[alone[1] :]
        shared = end + _common_length(self._whole[end:], ending)
        cut = self._to_boundary(shared, of=self._whole[:end] + ending)
        cut = max(cut, end)
        cut = self._closed(turn, start, cut, ending[cut - end :])
        return (start, self._without_space(self._whole, cut))

    def _text(self, turn: int) -> str:
        """Return the text of a message, without white space around it."""
        return text_of(self._chat.given[turn].get("content")).strip()

    def _changed_part(self, turn: int, count: int) -> Span | None:
        """Find a message's text in the rendering of `count` messages; None where it is missing.

        The place of an empty text is found too.
        """
        text = self._text(turn)
        # The first and last characters must differ, so that the comparison finds the whole text.
        ends = {*text[:1], *text[-1:]}
        other = next(word for word in ("xq", "jz", "mk") if not ends & set(word))
        rendering = self._chat.render(count)
        changed = self._chat.render_with(turn, other, count)
        if rendering is None or changed is None or other not in changed.text:
            return None
        start = _common_length(rendering.text, changed.text)
        end = start + len(rendering.text) - len(changed.text) + len(other)
        if end < start:  # the template writes more beside another text
            return None
        return (start, end) if rendering.text[start:end].strip() == text else None

    def _closed(self, turn: int, start: int, end: int, last_ending: str) -> int:
        """Return a turn's end after its end-of-turn token, where the last turn has another token.

        Args:
            turn: The message.
            start: Start of the turn.
            end: End of the text that is the same where no message follows.
            last_ending: The text after `end` where no message follows.
        """
        here = next((t for t in self._tokens if self._whole.startswith(t, end)), "")
        if not here or not last_ending.strip():
            return end
        # A token before the text, as the last one of a header, does not end the turn.
        text = self._changed_part(turn, len(self._chat))
        written = self._whole[start if text is None else text[1] : end].rstrip()
        return end if any(map(written.endswith, self._tokens)) else end + len(here)

    def _is_ending(self, text: str) -> bool:
        """Return whether a text consists of the tokenizer's added tokens and white space."""
        for token in self._tokens:
            text = text.replace(token, "")
        return not text.strip()

    def _to_boundary(self, position: int, of: str | None = None) -> int:
        """Move the position of a difference back to a boundary of tokens or words.

        Different tokens may share their first characters, such as `<|`.

        Args:
            position: Length of the common prefix of the whole rendering and `of`.
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
        before = self._whole[:position]
        return max(last, len(before) - len(re.split(r"\s", before)[-1]))

    def _without_space(self, text: str, end: int) -> int:
        """Return the end of a turn, without white space after an EOS token.

        Generation stops at EOS, so the model never generates that white space.
        """
        stripped = text[:end].rstrip()
        return len(stripped) if self._eos and stripped.endswith(self._eos) else end


def _common_length(text: str, other: str) -> int:
    """Return the length of the longest common prefix of two texts."""
    low, high = 0, min(len(text), len(other))
    while low < high:  # bisection: slices compare faster than characters in a loop
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[low:middle] == other[low:middle] else (low, middle - 1)
    return low
