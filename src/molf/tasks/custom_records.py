"""Records of the custom task: their formats, and their conversion to samples."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molf.data.chat_template import INSTEAD_OF_CONTENT, ROLES, Message
from molf.data.conversations import Conversation, Instruction, learned_turns
from molf.data.fields import (
    filled_text,
    list_value,
    object_value,
    optional_text,
    text_value,
)
from molf.data.files import present_fields
from molf.data.json_records import DuplicateKeyError, Record, unique_json
from molf.data.records import Part
from molf.data.sample_store import SampleStore
from molf.data.samples import PlainText, PromptCompletion, Sample
from molf.errors import InputError
from molf.tasks.questions import UnusableRecordError

_NEEDED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""The fields of each format, in the order in which a record is compared with them."""

_OPTIONAL = {
    "messages": ("tools", "chat_template_kwargs"),
    "sharegpt": ("tools", "chat_template_kwargs"),
    "prompt-completion": (),
    "alpaca": ("input", "system"),
    "text": (),
}

NO_TURN = "no assistant message to learn"
NO_TEXT = "an empty text"

_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}

_TEMPLATE_ARGUMENTS = (
    "messages",
    "conversation",
    "conversations",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
    "tokenize",
    "return_dict",
)
"""Template arguments that the training sets itself: `chat_template_kwargs` must not have them."""


@dataclass(frozen=True)
class CustomData:
    """The samples of one source or split.

    Attributes:
        records: Number of all records.
        samples: The samples by 0-based record index.
        left_out: Number of records without a sample, by reason.
        formats: The formats of the files, each once, in the order of reading.
        weights: Indices of the records of each file, with the weight of its source.
    """

    records: int
    samples: Mapping[int, Sample]
    left_out: Counter[str]
    formats: tuple[str, ...] = ()
    weights: tuple[tuple[range, float], ...] = ()


def parse_parts(parts: Sequence[Part], source: str, fixed: str | None = None) -> CustomData:
    """Convert the records of one split to samples; each file has one format.

    Args:
        parts: The records by file.
        source: The source, for messages.
        fixed: The format of all records; None to recognise that of each file by its first record.

    Raises:
        InputError: A record has another format than the first of its file, or a field of the wrong
            kind; or no record can be used.

    Warns:
        UserWarning: Fields of the records are not read, or records are left out.
    """
    samples = SampleStore()
    left_out: Counter[str] = Counter()
    unread: dict[str, None] = {}  # used as an ordered set
    formats: dict[str, None] = {}
    weights = []
    count = 0
    for part in parts:
        name, position = fixed, -1
        for position, record in enumerate(part.records):
            where = f"{part.place}, record {position}"
            if _is_empty_text(record, name, fixed):
                left_out[NO_TEXT] += 1
                continue
            name = name or format_of(record, where)
            if fixed is None:
                _check_format(record, name, part.place, position)
            index = count + position
            try:
                sample = parse_sample(record, name, index, where)
            except UnusableRecordError as error:
                left_out[str(error)] += 1
                continue
            samples.add(sample)
            read = read_fields(sample, name)
            unread |= dict.fromkeys(x for x in present_fields(record) if x not in read)
        formats |= dict.fromkeys(filter(None, [name]))
        weights.append((range(count, count + position + 1), part.weight))
        count += position + 1
    if not samples:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in left_out.items())
        raise InputError(f"{source}: none of the {count} records can be used ({reasons}).")
    for reason, number in left_out.items():
        warnings.warn(
            f"{source}: {number} of {count} records are left out: {reason}.", stacklevel=4
        )
    if unread:
        warnings.warn(f"{source}: fields that are not read: {', '.join(unread)}.", stacklevel=4)
    return CustomData(count, samples, left_out, tuple(formats), tuple(weights))


def format_of(record: Record, where: str) -> str:
    """Return the first format whose fields a record has.

    Raises:
        InputError: It has those of no format.
    """
    found = _found_format(record)
    if found is None:
        present = present_fields(record)
        raise InputError(
            f"{where}: needs prompt and completion, messages, conversations, instruction and "
            f"output, or text (it has: {', '.join(present) or 'none'})."
        )
    return found


def _found_format(record: Record) -> str | None:
    for name, needed in _NEEDED.items():
        if all(record.get(one) is not None for one in needed):
            return name
    return None


def _is_empty_text(record: Record, name: str | None, fixed: str | None) -> bool:
    """Return whether a record of the format `text` has null, as in an empty cell of CSV.

    Args:
        record: The record.
        name: The format of its file; None before the first record with one.
        fixed: The format of all records; None for that of each file.
    """
    if name not in (None, "text") or record.get("text", "") is not None:
        return False
    return fixed is not None or _found_format(record) is None


def _check_format(record: Record, name: str, place: str, position: int) -> None:
    """Reject a record whose format is not that of the first record of its file."""
    found = _found_format(record)
    if found is None:
        format_of(record, f"{place}, record {position}")
    elif found != name:
        raise InputError(
            f"{place}, record {position} has the format {found} "
            f"({', '.join(_NEEDED[found])}), and record 0 the format {name} "
            f"({', '.join(_NEEDED[name])}). Give a file for each format, or one of them with "
            "--format."
        )


def parse_sample(record: Record, name: str, index: int, where: str) -> Sample:
    """Check a record and convert it to a sample.

    Args:
        record: Of the format `messages` {"messages": messages}; `prompt-completion` {"prompt":
            text, "completion": text} or messages in place of both texts; `sharegpt`
            {"conversations": [{"from": speaker, "value": text}]}; `alpaca` {"instruction": text,
            "output": text}, and perhaps `input` and `system`; `text` {"text": text}. A message is
            {"role": text, "content": text or text parts}; an assistant message may have
            `tool_calls` in place of a content, and `weight` 0 where it carries no loss. Beside
            messages, `tools` (a list of JSON schemas, or its JSON text) and `chat_template_kwargs`
            (an object) go to the chat template.
        name: One of `molf.tasks.options.FORMATS`.
        index: 0-based record of the data.
        where: The file and number of the record, for messages.

    Raises:
        InputError: The record lacks a field, or a field is of the wrong kind.
        UnusableRecordError: No text of the record carries loss.
    """
    for one in _NEEDED[name]:
        if record.get(one) is None:
            raise InputError(
                f"{where}: lacks the field {one!r} of the format {name} "
                f"(it has: {', '.join(present_fields(record)) or 'none'})."
            )
    if name == "messages":
        messages = _messages(record["messages"], f"{where}: messages")
        return _conversation(record, messages, 0, index, where)
    if name == "sharegpt":
        turns = _from_sharegpt(record["conversations"], f"{where}: conversations")
        messages = _messages(turns, f"{where}: conversations")
        return _conversation(record, messages, 0, index, where)
    if name == "alpaca":
        return _instruction(record, index, where)
    if name == "text":
        text = text_value(record["text"], f"{where}: text")
        if not text.strip():  # such as the blank lines of a document
            raise UnusableRecordError(NO_TEXT)
        return PlainText(text, index)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _messages(prompt, f"{where}: prompt")
        answer = _messages(completion, f"{where}: completion")
        return _conversation(record, context + answer, len(context), index, where)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise InputError(f"{where}: prompt and completion must be both texts or both messages.")
    return PromptCompletion(
        filled_text(prompt, f"{where}: prompt"),
        text_value(completion, f"{where}: completion"),
        index,
    )


def read_fields(sample: Sample, name: str) -> set[str]:
    """Return the names of the fields that the sample of a record of a format uses."""
    optional = _OPTIONAL["messages" if isinstance(sample, Conversation) else name]
    return {*_NEEDED[name], *optional}


def _instruction(record: Record, index: int, where: str) -> Instruction:
    """Convert an Alpaca record: the input follows the instruction."""
    instruction = filled_text(record["instruction"], f"{where}: instruction").strip()
    output = text_value(record["output"], f"{where}: output")
    given = optional_text(record.get("input"), f"{where}: input")
    system = optional_text(record.get("system"), f"{where}: system")
    asked = f"{instruction}\n\n{given}" if given else instruction
    messages: list[Message] = [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": asked},
        {"role": "assistant", "content": output},
    ]
    headings = [("Instruction", instruction), *([("Input", given)] if given else [])]
    prompt = "".join(f"### {title}:\n{text}\n\n" for title, text in headings)
    prompt = f"{system}\n\n{prompt}### Response:\n" if system else f"{prompt}### Response:\n"
    return Instruction(
        Conversation(tuple(messages), len(messages) - 1, index),
        PromptCompletion(prompt, output, index),
    )


def _from_sharegpt(value: Any, where: str) -> list[Any]:
    """Convert ShareGPT's turns to messages; keep turns that already are messages."""
    turns = []
    for position, item in enumerate(list_value(value, where)):
        turn = object_value(item, f"{where}[{position}]", ())
        if "from" in turn and "value" in turn:
            speaker = turn["from"]
            named = {key: entry for key, entry in turn.items() if key not in ("from", "value")}
            role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
            turn = {**named, "role": role, "content": turn["value"]}
        turns.append(turn)
    return turns


def _messages(value: Any, where: str) -> list[Message]:
    messages = []
    for position, item in enumerate(list_value(value, where)):
        at = f"{where}[{position}]"
        message = object_value(item, at, ("role",))
        message["role"] = sys.intern(filled_text(message["role"], f"{at}.role"))
        # Parquet gives each message the keys of all others, with null as the value.
        if None in message.values():
            message = {key: entry for key, entry in message.items() if entry is not None}
        if message.get("content") is not None:
            _check_content(message["content"], f"{at}.content")
        elif message["role"] != "tool" and not any(map(message.get, INSTEAD_OF_CONTENT)):
            raise InputError(f"{at} lacks a content, and has no tool_calls.")
        if message.get("tool_calls") is not None:
            for call in list_value(message["tool_calls"], f"{at}.tool_calls"):
                _check_arguments(call, f"{at}.tool_calls")
        if message.get("weight", 1) not in (0, 1) or isinstance(message.get("weight"), bool):
            raise InputError(f"{at}.weight must be 0 or 1, not {message['weight']!r:.100}.")
        messages.append(message)
    return messages


def _check_content(value: Any, where: str) -> None:
    if not isinstance(value, list):
        text_value(value, where)
        return
    for position, part in enumerate(value):
        at = f"{where}[{position}]"
        kind = object_value(part, at, ("type",))["type"]
        if kind != "text":
            raise InputError(f"{at} is of the type {kind!r:.100}. Only text can be trained on.")
        text_value(part.get("text"), f"{at}.text")


def _check_arguments(call: Any, where: str) -> None:
    """Reject a tool call whose arguments are the JSON text of an object with a duplicate key."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str):
        _json(arguments, f"{where}: arguments")


def _json(text: str, where: str) -> Any:
    """Parse a text as JSON; return the text itself where it is not JSON.

    Raises:
        InputError: An object in it has a duplicate key.
    """
    try:
        return unique_json(text)
    except DuplicateKeyError as error:
        raise InputError(
            f"{where}: the key {error.args[0]!r:.100} comes twice in one object."
        ) from error
    except ValueError:
        return text


def _tools(value: Any, where: str) -> tuple[Any, ...] | None:
    """Return the JSON schemas of tools; None for an empty list, as in TRL."""
    if isinstance(value, str):
        value = _json(value, where)
        if isinstance(value, str):
            raise InputError(f"{where} is a text that is not JSON of a list.")
    if value is None:
        return None
    tools = list_value(value, where)
    for position, tool in enumerate(tools):
        object_value(tool, f"{where}[{position}]", ())
    return tuple(tools) or None


def _template_options(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    options = object_value(value, where, ())
    for name in options:
        if name in _TEMPLATE_ARGUMENTS:
            raise InputError(f"{where}: {name} cannot be set; the training decides it.")
    return {name: entry for name, entry in options.items() if entry is not None}


def _conversation(
    record: Record, messages: list[Message], context: int, index: int, where: str
) -> Conversation:
    tools = _tools(record.get("tools"), f"{where}: tools")
    options = _template_options(
        record.get("chat_template_kwargs"), f"{where}: chat_template_kwargs"
    )
    learned = learned_turns(messages, context)
    if not learned:
        roles = dict.fromkeys(message["role"] for message in messages)
        # Such as `gpt` or `model` in place of `assistant`, which would leave out every record.
        others = [f"{role!r:.30}" for role in roles if role not in ROLES]
        raise UnusableRecordError(f"{NO_TURN} (roles: {', '.join(others)})" if others else NO_TURN)
    # Messages after the last turn with loss have no effect on the training.
    return Conversation(tuple(messages[: learned[-1] + 1]), context, index, tools, options)
