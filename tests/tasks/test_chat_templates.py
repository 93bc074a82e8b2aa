"""All chat templates that TRL ships: every assistant turn is learned, and nothing else."""

import re
from pathlib import Path

import pytest
import trl

from molf.data import chat_template
from molf.data.conversations import Conversation
from molf.data.encoding import encode_samples
from molf.errors import InputError
from molf.measure.tokens import IGNORED
from tiny_models import byte_level_tokenizer

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


@pytest.mark.parametrize("marks", [True, False])
def test_the_end_of_an_empty_earlier_answer_is_learned(marks, monkeypatch):
    """gpt-oss ends earlier turns and the last one by different tokens, after a header's token."""
    if not marks:
        monkeypatch.setattr(chat_template, "_training_variant", lambda tokenizer, source: None)
    for answer in ("It is blue.", ""):
        talk = (TALK[0], {**TALK[1], "content": answer}, *TALK[2:])
        rendered = Conversation(talk, 0, 0).render(tokenizer_of("gptoss"))
        assert [rendered.text[start:end] for start, end in rendered.spans] == [
            f"<|channel|>final<|message|>{answer}<|end|>",
            "<|channel|>final<|message|>Rather green.<|return|>",
        ]


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


def test_marks_round_other_messages_are_not_the_assistants():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talk = tuple({"role": role, "content": "same"} for role in ("user", "assistant") * 2)
    rendered = Conversation(talk, 0, 0).render(tokenizer)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["same;", "same;"]


@pytest.mark.parametrize(
    ("role", "written", "is_named"),
    [
        ("observation", "", True),
        ("tool", "", True),
        ("tool", "{{ m.content }}", False),
        ("tool", "{{ m.content | tojson }}", False),
    ],
)
def test_a_lost_text_of_any_role_is_named(role, written, is_named):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }};"
        f"{{% else %}}{written}{{% endif %}}{{% endfor %}}"
    )
    talk = (TALK[0], {"role": role, "content": 'So "warm"\nDär'}, TALK[1])
    rendered = Conversation(talk, 0, 0).render(tokenizer)
    assert any("leaves out text" in fault for fault in rendered.faults) is is_named


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("place", ["tools", "tool_calls", "reasoning_content"])
def test_control_tokens_in_fields_beside_the_content_are_counted(place, split):
    tokenizer = tokenizer_of("qwen3")
    tokenizer.split_special_tokens = split
    value = f"Looks{tokenizer.eos_token}out"
    function = {"name": "weather", "description": value if place == "tools" else ""}
    answer = {"role": "assistant", "content": "Yes."}
    if place == "tool_calls":
        answer["tool_calls"] = [{"function": {"name": "weather", "arguments": {"city": value}}}]
    if place == "reasoning_content":
        answer["reasoning_content"] = value
    tools = ({"type": "function", "function": function},)
    with pytest.warns(UserWarning, match="1 of 1 examples: the text spells out control tokens"):
        learned, rest = texts_of(tokenizer, Conversation((TALK[0], answer), 0, 0, tools))
    assert value in learned + rest
    encoded = encode_samples(tokenizer, [Conversation((TALK[0], answer), 0, 0, tools)], 10_000)
    assert encoded.input_ids[0].count(tokenizer.eos_token_id) == (1 if split else 2)


def test_several_templates_without_a_default_are_refused_by_name():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(InputError, match=r"none is its default one \(they are: rag, tool_use\)"):
        Conversation(TALK, 0, 0).render(tokenizer)


def test_the_generation_prompt_inside_a_mark_carries_no_loss():
    """The training variant of DeepSeek-R1's template marks the token that asks for the answer."""
    rendered = Conversation(TALK, 0, 0).render(tokenizer_of("deepseek_r1_distill"))
    header = "<\uff5cAssistant\uff5c>"
    assert rendered.text[: rendered.answer_start].endswith(header)
    assert all(header not in rendered.text[start:end] for start, end in rendered.spans)
