"""Records of the custom task, in the layouts that TRL reads."""

from __future__ import annotations

from typing import Any

from molf.errors import InputError
from molf.tasks.fields import filled_text, list_value, object_value, text_value
from molf.tasks.files import Record, present_fields
from molf.tasks.samples import Conversation, Message, PromptCompletion, Sample


def parse_sample(record: Record, index: int, where: str) -> Sample:
    """Check a record and make it a sample.

    Args:
        record: {"prompt": text, "completion": text}, {"prompt": messages, "completion": messages}
            or {"messages": messages}; a message is {"role": text, "content": text}.
        index: 0-based record of the data file.
        where: The source and number of the record, for messages.

    Raises:
        InputError: The record has neither layout, or a field of the wrong kind.
    """
    present = present_fields(record)
    if "messages" in present:
        return _conversation(_messages(record["messages"], f"{where}: messages"), 0, index, where)
    if "prompt" not in present or "completion" not in present:
        raise InputError(
            f"{where}: needs prompt and completion, or messages "
            f"(it has: {', '.join(present) or 'none'})."
        )
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _messages(prompt, f"{where}: prompt")
        answer = _messages(completion, f"{where}: completion")
        return _conversation(context + answer, len(context), index, where)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise InputError(f"{where}: prompt and completion must be both texts or both messages.")
    return PromptCompletion(
        filled_text(prompt, f"{where}: prompt"),
        text_value(completion, f"{where}: completion"),
        index,
    )


def _messages(value: Any, where: str) -> list[Message]:
    messages = []
    for position, item in enumerate(list_value(value, where)):
        message = object_value(item, f"{where}[{position}]", ("role", "content"))
        filled_text(message["role"], f"{where}[{position}].role")
        text_value(message["content"], f"{where}[{position}].content")
        # Parquet fills every key that any message has with null.
        messages.append({key: entry for key, entry in message.items() if entry is not None})
    return messages


def _conversation(messages: list[Message], context: int, index: int, where: str) -> Conversation:
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[-1] < context:
        raise InputError(f"{where}: has no message of the role assistant to learn from.")
    if turns[0] == 0:
        raise InputError(f"{where}: the first message is the assistant's; it answers nothing.")
    return Conversation(tuple(messages[: turns[-1] + 1]), context, index)
