import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    Qwen3NextConfig,
)

from molf.measure.generate import decode, generate_greedy, padding_id
from molf.measure.padding import generation_batches
from tiny_models import (
    byte_level_tokenizer,
    next_log_probs,
    piece_tokenizer,
    tiny_llama,
    tiny_qwen2,
)

CONTEXTS = [[7, 8, 9, 10, 11], [3], [400, 5, 6], [12, 13, 14, 15, 16, 17, 18, 19], [20, 21]]


def one_by_one(model, context, steps, ends):
    ids = list(context)
    for _ in range(steps):
        with torch.no_grad():
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in ends:
            break
        ids.append(token)
    return ids[len(context) :]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_answers_are_those_of_one_by_one(batch_size, side):
    model, tokenizer = tiny_llama(), byte_level_tokenizer()
    tokenizer.padding_side = side
    found = generate_greedy(model, tokenizer, CONTEXTS, max_new_tokens=9, batch_size=batch_size)
    # Both the tokenizer's EOS (0) and the model's (2) end an answer.
    assert found == [one_by_one(model, context, 9, {0, 2}) for context in CONTEXTS]


def test_an_answer_ends_before_its_end_token():
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    free = generate_greedy(model, tokenizer, CONTEXTS, max_new_tokens=8, batch_size=8)
    stop = free[0][3]
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[stop])
    try:
        found = generate_greedy(model, tokenizer, CONTEXTS, max_new_tokens=8, batch_size=8)
    finally:
        model.generation_config = own
    assert found[0] == free[0][: free[0].index(stop)]
    assert found == [one_by_one(model, context, 8, {0, stop}) for context in CONTEXTS]


def test_the_models_own_sampling_is_put_aside_and_given_back():
    model, tokenizer = tiny_llama(), byte_level_tokenizer()
    plain = generate_greedy(model, tokenizer, CONTEXTS, max_new_tokens=6, batch_size=8)
    own = model.generation_config
    sampling = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        repetition_penalty=50.0,
        suppress_tokens=plain[0][:1],
        eos_token_id=2,
    )
    model.generation_config = sampling
    try:
        assert generate_greedy(model, tokenizer, CONTEXTS, max_new_tokens=6, batch_size=8) == plain
        assert model.generation_config is sampling
    finally:
        model.generation_config = own


def test_a_batch_stops_when_all_its_answers_have_ended():
    model, tokenizer = tiny_llama(), byte_level_tokenizer()
    context = CONTEXTS[0]
    first = one_by_one(model, context, 2, set())
    tokenizer_end = tokenizer.eos_token_id
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[first[1], tokenizer_end])
    try:
        generate_greedy(model, tokenizer, [context], max_new_tokens=50, batch_size=1)
    finally:
        hook.remove()
        model.generation_config = own
    assert len(calls) == 2


def test_without_a_pad_token_eos_fills_and_is_masked():
    model, tokenizer = tiny_llama(), byte_level_tokenizer(pad=False)
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    found = generate_greedy(model, tokenizer, CONTEXTS, max_new_tokens=5, batch_size=8)
    assert found == [one_by_one(model, context, 5, {0, 2}) for context in CONTEXTS]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_stay_within_the_models_positions(batch_size):
    """An answer has the room that its own context leaves, whatever it is batched with."""
    model, tokenizer = tiny_llama(), byte_level_tokenizer()
    long = [5 + i for i in range(126)]
    contexts = [long, [9], long[:121], [11, 12]]
    found = generate_greedy(model, tokenizer, contexts, max_new_tokens=10, batch_size=batch_size)
    rooms = [2, 10, 7, 10]
    assert found == [
        one_by_one(model, context, room, {0, 2})
        for context, room in zip(contexts, rooms, strict=True)
    ]
    with pytest.raises(ValueError, match="128 positions"):
        generate_greedy(model, tokenizer, [[*long, 1, 2]], max_new_tokens=1, batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_answer_stops_when_its_text_says_so(batch_size):
    model, tokenizer = tiny_llama(), byte_level_tokenizer()
    free = generate_greedy(model, tokenizer, CONTEXTS, max_new_tokens=12, batch_size=8)
    lengths = [3, 1, 7, 5, 2]
    seen = []
    calls = []

    def stop(index, text):
        seen.append(index)
        count = seen.count(index)
        assert text == decode(tokenizer, free[index][:count])
        return count == lengths[index]

    hook = model.register_forward_hook(lambda *_: calls.append(1))
    found = generate_greedy(
        model, tokenizer, CONTEXTS, max_new_tokens=12, batch_size=batch_size, stop=stop
    )
    hook.remove()
    ends = [min(length, len(free[i])) for i, length in enumerate(lengths)]
    assert found == [answer[:end] for answer, end in zip(free, ends, strict=True)]
    # Asked once per token, and no answer is asked about once it has ended.
    assert len(seen) == sum(ends)
    if batch_size == 8:
        assert len(calls) == max(ends)


SMALL = {"vocab_size": 512, "eos_token_id": 0, "bos_token_id": None, "initializer_range": 0.3}
GEMMA = Gemma3TextConfig(
    **SMALL,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    sliding_window=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
RECURRENT = Qwen3NextConfig(
    **SMALL,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    max_position_embeddings=128,
)
ARCHITECTURES = {
    "llama": tiny_llama,
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "sliding windows": GEMMA,
    "recurrent layers": RECURRENT,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_that_have_ended_leave_the_batch(name):
    torch.manual_seed(1)
    architecture = ARCHITECTURES[name]
    if callable(architecture):
        model = architecture()
    else:
        model = AutoModelForCausalLM.from_config(architecture).eval()
    contexts = [[5 + i, 9, 30 + 2 * i, *range(40, 40 + i % 5)] for i in range(12)]
    lengths = {index: 1 + (5 * index) % 12 for index in range(12)}
    tokenizer, seen, shapes = byte_level_tokenizer(), [], []

    def stop(index, text):
        seen.append(index)
        return seen.count(index) == lengths[index]

    assert generation_batches(model, tokenizer.pad_token_id) == "any"  # asked once
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = generate_greedy(model, tokenizer, contexts, max_new_tokens=20, batch_size=12, stop=stop)
    hook.remove()
    ends = {0, 2} if name == "llama" else {0}
    expected = [one_by_one(model, c, lengths[i], ends) for i, c in enumerate(contexts)]
    assert found == expected
    rows = [shape[0] for shape in shapes]
    assert len(rows) == max(lengths.values())  # steps
    assert rows == sorted(rows, reverse=True)
    tokens = sum(map(len, expected))
    assert sum(rows) <= 2 * tokens
    assert sum(rows) < 0.8 * len(rows) * 12
    columns = [shape[1] for shape in shapes[1:]]
    assert set(columns) == {1} or name == "recurrent layers"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_first_logits_are_shown_once(batch_size):
    model, tokenizer = tiny_llama(), byte_level_tokenizer()
    shown = {}

    class Reader:
        def read(self, batch, logits):
            return list(logits.log_softmax(-1))

        def store(self, index, result):
            assert index not in shown
            shown[index] = result

    generate_greedy(
        model, tokenizer, CONTEXTS, max_new_tokens=4, batch_size=batch_size, first_logits=Reader()
    )
    for index, context in enumerate(CONTEXTS):
        assert torch.allclose(shown[index], next_log_probs(model, context), atol=1e-5)


def test_out_of_memory_halves_the_batch(monkeypatch):
    model, tokenizer = tiny_llama(), byte_level_tokenizer()
    expected = generate_greedy(model, tokenizer, CONTEXTS, max_new_tokens=4, batch_size=1)
    generate = model.generate

    def small_memory(**inputs):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("too big")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", small_memory)
    found = generate_greedy(model, tokenizer, CONTEXTS, max_new_tokens=4, batch_size=5)
    assert found == expected


def test_nothing_to_generate():
    assert (
        generate_greedy(tiny_llama(), piece_tokenizer(), [], max_new_tokens=1, batch_size=1) == []
    )


def test_special_tokens_are_not_text():
    tokenizer = byte_level_tokenizer()
    ids = tokenizer(" Paris is , large")["input_ids"]
    assert decode(tokenizer, [*ids, tokenizer.eos_token_id]) == " Paris is , large"
