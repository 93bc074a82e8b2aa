"""Records of the custom task, in the layouts that TRL reads."""

from __future__ import annotations

from typing import Any

from molf.data.chat_template import Message
from molf.data.conversations import Conversation, learned_turns
from molf.data.fields import filled_text, list_value, object_value, text_value
from molf.data.files import DuplicateKeyError, Record, present_fields, unique_json
from molf.data.samples import PromptCompletion, Sample
from molf.errors import InputError
from molf.tasks.questions import UnusableRecordError

NO_TURN = "no assistant message to learn"

_INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "thinking", "reasoning")

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


def parse_sample(record: Record, index: int, where: str) -> Sample:
    """Check a record and convert it to a sample.

    Args:
        record: {"prompt": text, "completion": text}, {"prompt": messages, "completion": messages}
            or {"messages": messages}. A message is {"role": text, "content": text or text parts};
            an assistant message may have `tool_calls` in place of a content, and `weight` 0 where
            it carries no loss. Beside messages, `tools` (a list of JSON schemas, or its JSON text)
            and `chat_template_kwargs` (an object) go to the chat template. ShareGPT's
            {"conversations": [{"from": speaker, "value": text}]} is read as messages.
        index: 0-based record of the data file.
        where: The source and number of the record, for messages.

    Raises:
        InputError: The record has none of these layouts, or a field of the wrong kind.
        UnusableRecordError: No text of the record carries loss.
    """
    present = present_fields(record)
    if "messages" in present:
        messages = _messages(record["messages"], f"{where}: messages")
        return _conversation(record, messages, 0, index, where)
    if "conversations" in present:
        turns = _from_sharegpt(record["conversations"], f"{where}: conversations")
        messages = _messages(turns, f"{where}: conversations")
        return _conversation(record, messages, 0, index, where)
    if "prompt" not in present or "completion" not in present:
        raise InputError(
            f"{where}: needs prompt and completion, messages, or conversations "
            f"(it has: {', '.join(present) or 'none'})."
        )
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


def read_fields(sample: Sample, record: Record) -> set[str]:
    """Return the names of the fields that the sample of a record uses."""
    if isinstance(sample, PromptCompletion):
        return {"prompt", "completion"}
    layouts = (("messages",), ("conversations",), ("prompt", "completion"))
    layout = next(names for names in layouts if record.get(names[0]) is not None)
    return {*layout, "tools", "chat_template_kwargs"}


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
        filled_text(message["role"], f"{at}.role")
        # Parquet gives each message the keys of all others, with null as the value.
        message = {key: entry for key, entry in message.items() if entry is not None}
        if message.get("content") is not None:
            _check_content(message["content"], f"{at}.content")
        elif message["role"] != "tool" and not any(map(message.get, _INSTEAD_OF_CONTENT)):
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
        raise UnusableRecordError(NO_TURN)
    # Messages after the last turn with loss have no effect on the training.
    return Conversation(tuple(messages[: learned[-1] + 1]), context, index, tools, options)
