"""All chat templates that TRL ships: every assistant turn is learned, and nothing else."""

import re
from pathlib import Path

import pytest
import trl
from tiny_models import byte_level_tokenizer

from molf.tasks import chat_template
from molf.tasks.conversations import Conversation
from molf.tasks.encoding import IGNORED, encode_samples

_FOLDER = Path(trl.__file__).parent / "chat_templates"
ORIGINALS = sorted(
    path.stem for path in _FOLDER.glob("*.jinja") if not path.stem.endswith("_training")
)
TALK = (
    {"role": "user", "content": "What is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "user", "content": "And the grass?"},
    {"role": "assistant", "content": "Rather green."},
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Looks out",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where"}},
            },
        },
    },
)


def tokenizer_of(name, *, knows_tokens=True):
    source = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = byte_level_tokenizer(bos=True)
    if knows_tokens:
        found = sorted(set(re.findall(r"<\|?[\w/\uff5c\u2581]+\|?>", source)))
        tokenizer.add_special_tokens({"additional_special_tokens": found})
    tokenizer.chat_template = source
    return tokenizer


def texts_of(tokenizer, sample):
    """The text with loss, and the text without."""
    encoded = encode_samples(tokenizer, [sample], 10_000)
    ids, labels = encoded.input_ids[0], encoded.labels[0]
    return [
        tokenizer.decode([i for i, x in zip(ids, labels, strict=True) if (x == IGNORED) is without])
        for without in (False, True)
    ]


def test_there_are_templates():
    assert len(ORIGINALS) >= 41


@pytest.mark.parametrize("knows_tokens", [True, False])
@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("name", ORIGINALS)
def test_both_turns_are_learned(name, marks, knows_tokens, monkeypatch):
    """By TRL's marks where it knows the template, and by comparing renderings elsewhere."""
    if not marks:
        monkeypatch.setattr(chat_template, "_training_variant", lambda tokenizer, source: None)
    tokenizer = tokenizer_of(name, knows_tokens=knows_tokens)
    for count in (2, 4):
        learned, rest = texts_of(tokenizer, Conversation(TALK[:count], 0, 0))
        for message in TALK[:count]:
            assert (message["content"] in learned) is (message["role"] == "assistant")
            assert (message["content"] in rest) is (message["role"] == "user")
    excluded = ({**TALK[1], "weight": 0}, *TALK[2:])
    for talk, context in (((TALK[0], *excluded), 0), (TALK, 2)):
        learned, rest = texts_of(tokenizer, Conversation(talk, context, 0))
        assert ("It is blue." in learned, "It is blue." in rest) == (False, True)
        assert "Rather green." in learned


REFUSE_SYSTEM_OR_TOOLS = ("cohere", "cohere2", "gemma", "gemma3", "llava_next")


@pytest.mark.parametrize("name", [n for n in ORIGINALS if n not in REFUSE_SYSTEM_OR_TOOLS])
def test_tool_calls_are_written_or_their_loss_is_named(name):
    talk = (
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "Sunny"},
        {"role": "assistant", "content": "It is sunny."},
    )
    tokenizer = tokenizer_of(name)
    rendered = Conversation(talk, 0, 0, TOOLS).render(tokenizer)
    learned = "".join(rendered.text[start:end] for start, end in rendered.spans)
    assert "It is sunny." in learned
    assert "None" not in rendered.text
    assert "null" not in rendered.text
    assert '\\"city' not in rendered.text  # arguments are not quoted twice
    is_named = any("leaves out" in x or "not read tool_calls" in x for x in rendered.faults)
    assert ("Rome" in learned) is not is_named


GREET = (
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And the sky?"},
    {"role": "assistant", "content": "Rather blue."},
)


@pytest.mark.parametrize(
    "name", [n for n in ORIGINALS if n not in ("cohere", "cohere2", "gemma", "gemma3")]
)
def test_a_conversation_may_begin_with_the_assistant(name):
    learned, rest = texts_of(tokenizer_of(name), Conversation(GREET, 0, 0))
    assert "Hello!" in learned
    assert "Rather blue." in learned
    assert "And the sky?" in rest
