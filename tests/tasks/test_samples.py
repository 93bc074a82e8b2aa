import pytest

from molf.data.conversations import Conversation
from molf.data.encoding import encode_samples, generation_contexts, tokenize_samples
from molf.errors import InputError
from tiny_models import CHATML, byte_level_tokenizer, piece_tokenizer

TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is Paris?"},
    {"role": "assistant", "content": "In France."},
    {"role": "user", "content": "And Rome?"},
    {"role": "assistant", "content": "In Italy."},
)


def contexts_of(tokenizer, samples):
    return generation_contexts(tokenizer, tokenize_samples(tokenizer, samples))


def chat_tokenizer(template=CHATML, eos="<|im_end|>"):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    tokenizer.eos_token = eos
    return tokenizer


def labelled(tokenizer, sample):
    """The stretches of text that carry loss."""
    encoded = encode_samples(tokenizer, [sample], 1000)
    stretches, open_stretch = [], False
    for label in encoded.labels[0]:
        if label == -100:
            open_stretch = False
            continue
        if not open_stretch:
            stretches.append([])
        stretches[-1].append(label)
        open_stretch = True
    return [tokenizer.decode(stretch) for stretch in stretches], encoded.input_ids[0]


def test_the_assistants_turns_and_their_ends_carry_the_loss():
    tokenizer = chat_tokenizer()
    found, ids = labelled(tokenizer, Conversation(TALK, 0, 0))
    assert found == ["In France.<|im_end|>", "In Italy.<|im_end|>"]
    whole = tokenizer.apply_chat_template(list(TALK), tokenize=False)
    assert tokenizer.decode(ids) == whole.rstrip("\n")


def test_turns_of_the_prompt_carry_none():
    found, _ = labelled(chat_tokenizer(), Conversation(TALK, 3, 0))
    assert found == ["In Italy.<|im_end|>"]


def test_eos_follows_only_where_the_template_does_not_end_with_it():
    _, ids = labelled(chat_tokenizer(), Conversation(TALK, 0, 0))
    assert ids[-1] == chat_tokenizer().eos_token_id
    assert ids[-2] != chat_tokenizer().eos_token_id
    other = chat_tokenizer(eos="<|end|>")
    found, ids = labelled(other, Conversation(TALK, 0, 0))
    assert found == ["In France.<|im_end|>\n", "In Italy.<|im_end|>\n<|end|>"]


def test_the_answer_is_generated_after_the_generation_prompt():
    tokenizer = chat_tokenizer()
    [context] = generation_contexts(
        tokenizer, tokenize_samples(tokenizer, [Conversation(TALK, 0, 0)])
    )
    asked = tokenizer.apply_chat_template(
        list(TALK[:-1]), tokenize=False, add_generation_prompt=True
    )
    assert context.prompt == asked
    assert tokenizer.decode(context.ids) == asked


def test_a_bos_in_the_template_is_not_doubled():
    tokenizer = piece_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    found, ids = labelled(tokenizer, Conversation(TALK, 0, 0))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert [text.split("<")[0] for text in found] == ["In France.", "In Italy."]
    [context] = generation_contexts(
        tokenizer, tokenize_samples(tokenizer, [Conversation(TALK, 0, 0)])
    )
    assert context.ids.count(tokenizer.bos_token_id) == 1


def test_no_bos_is_added_before_a_conversation():
    """As in transformers' own tokens of a conversation, which engines and `molf chat` have too."""
    tokenizer = piece_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("Paris").input_ids[0] == bos
    for split in (False, True):  # with a control token in the user's text
        tokenizer.split_special_tokens = split
        talk = ({"role": "user", "content": "</s> Where?" if split else "Where?"}, *TALK[2:])
        encoded = encode_samples(tokenizer, [Conversation(talk, 0, 0)], 1000)
        [context] = contexts_of(tokenizer, [Conversation(talk, 0, 0)])
        assert bos not in encoded.input_ids[0] + context.ids
    tokenizer.split_special_tokens = False
    asked = tokenizer.apply_chat_template(
        list(TALK[:-1]), add_generation_prompt=True, return_dict=False
    )
    [context] = contexts_of(tokenizer, [Conversation(TALK, 0, 0)])
    assert context.ids == asked
    [ids] = encode_samples(tokenizer, [Conversation(TALK, 0, 0)], 1000).input_ids
    whole = tokenizer.apply_chat_template(list(TALK), return_dict=False)
    assert ids[-1] == eos
    assert ids[:-1] == whole[: len(ids) - 1]


THINKING = (  # like templates that drop the reasoning of all turns but the last
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_turn_that_the_template_rewrites_is_learned_as_it_is_written():
    found, _ = labelled(chat_tokenizer(THINKING), Conversation(TALK, 0, 0))
    assert found == ["In France.<|im_end|>", "<think></think>In Italy.<|im_end|>"]


def test_a_turn_that_cannot_be_found_carries_no_loss_and_a_warning_says_why():
    hidden = THINKING.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last or message['role'] != 'assistant' else '...' }}",
    )
    with pytest.warns(UserWarning, match="1 of 1 examples: an earlier assistant turn carries no"):
        found, _ = labelled(chat_tokenizer(hidden), Conversation(TALK, 0, 0))
    assert found == ["<think></think>In Italy.<|im_end|>"]


def test_a_last_turn_that_the_template_does_not_write_is_refused():
    silent = CHATML.replace("{{ message['content'] }}", "{{ message['content'] if loop.first }}")
    silent = silent.replace("{% for message in messages %}", "{% for message in messages[:1] %}")
    with pytest.raises(InputError, match=r"Record 7: .*cannot be found"):
        Conversation(TALK, 0, 7).render(chat_tokenizer(silent))


def test_another_generation_prompt_than_the_turn_begins_with_is_named():
    template = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
    with pytest.warns(UserWarning, match="does not begin with the chat template's generation"):
        found, _ = labelled(chat_tokenizer(template), Conversation(TALK, 0, 0))
    assert found == ["In France.<|im_end|>", "In Italy.<|im_end|>"]


@pytest.mark.parametrize(
    ("role", "named"), [("Assistant", False), ("function_call", False), ("observation", True)]
)
def test_roles_that_the_template_does_not_name_are_named(role, named):
    """The template writes the role of any message, and only those of the assistant are learned."""
    tokenizer = chat_tokenizer("{# system user assistant observation #}" + CHATML)
    talk = (*TALK[:2], {"role": role, "content": "Rome?"}, *TALK[3:])
    [(_, rendered)] = tokenize_samples(tokenizer, [Conversation(talk, 0, 0)])
    fault = f"does not name the role '{role}', of which no message carries loss"
    assert any(fault in one for one in rendered.faults) is not named
    [(_, rendered)] = tokenize_samples(tokenizer, [Conversation(TALK, 0, 0)])
    assert not rendered.faults


def test_a_tokenizer_without_chat_template_is_refused():
    with pytest.raises(InputError, match=r"Record 3: .*chat template, and the tokenizer has none"):
        Conversation(TALK, 0, 3).render(byte_level_tokenizer())


def test_what_the_template_refuses_is_reported():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"Record 3: .*refuses the messages: roles must alternate"):
        Conversation(TALK, 0, 3).render(chat_tokenizer(template))
