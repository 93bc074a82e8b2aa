import random

import pytest

from molf.data.encoding import (
    _carry_loss,
    encode_samples,
    generation_contexts,
    tokenize_samples,
)
from molf.data.samples import PromptCompletion
from molf.errors import InputError
from molf.measure.tokens import tokenize
from tiny_models import LINES, byte_level_tokenizer, piece_tokenizer

PAIRS = [
    ("The capital of France is", " Paris"),
    ("What is two plus two?\nAnswer: ", "Four."),  # the space merges with the answer
    ("The sky is blu", "e. The sky"),  # cut within a word
    ("Grüße aus dem Café 🙂", "🙃 é"),  # characters of several tokens each
    ("Paris, Rome", ""),
    ("", " Paris is the largest."),
]


def contexts_of(tokenizer, samples):
    return generation_contexts(tokenizer, tokenize_samples(tokenizer, samples))


def samples(pairs=PAIRS):
    return [PromptCompletion(prompt, completion, i) for i, (prompt, completion) in enumerate(pairs)]


TOKENIZERS = [
    byte_level_tokenizer(),
    byte_level_tokenizer(trim_offsets=True),
    byte_level_tokenizer(bos=True),
    piece_tokenizer(),
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_ids_are_the_tokenizers_own_with_eos_once_at_the_end(tokenizer):
    encoded = encode_samples(tokenizer, samples(), 100)
    for (prompt, completion), ids in zip(PAIRS, encoded.input_ids, strict=True):
        assert ids == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("tokenizer", TOKENIZERS[:3])
def test_labels_decode_to_completion_and_eos(tokenizer):
    encoded = encode_samples(tokenizer, samples(), 100)
    for (prompt, completion), ids, labels in zip(
        PAIRS, encoded.input_ids, encoded.labels, strict=True
    ):
        carrying = [label for label in labels if label != -100]
        assert carrying == ids[len(ids) - len(carrying) :]  # one stretch, at the end
        assert carrying[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(carrying[:-1])
        # A token that reaches over the boundary brings the prompt's end along, and nothing else.
        assert text.endswith(completion)
        assert prompt.endswith(text.removesuffix(completion))
        first = tokenizer.decode(carrying[:1])
        assert len(text) - len(completion) < max(len(first), 1)


def test_labels_are_exact_where_no_token_reaches_over():
    for tokenizer in TOKENIZERS:
        [labels] = encode_samples(tokenizer, samples(PAIRS[:1]), 100).labels
        carrying = [label for label in labels if label != -100]
        assert tokenizer.decode(carrying[:-1]).strip() == "Paris"
        assert tokenizer.decode(carrying).strip() == "Paris" + tokenizer.eos_token


def test_a_token_over_the_boundary_belongs_to_the_completion():
    tokenizer = byte_level_tokenizer()
    assert len(tokenizer(" Paris")["input_ids"]) == 1
    [labels] = encode_samples(tokenizer, [PromptCompletion("is ", "Paris", 0)], 100).labels
    merged = tokenizer(" Paris")["input_ids"]
    assert [label for label in labels if label != -100] == [*merged, tokenizer.eos_token_id]


def test_too_long_samples_are_left_out_whole_and_counted():
    tokenizer = byte_level_tokenizer()
    lengths = [len(tokenizer(p + c)["input_ids"]) + 1 for p, c in PAIRS]
    limit = sorted(lengths)[2]
    encoded = encode_samples(tokenizer, samples(), limit)
    assert list(encoded.kept) == [i for i, length in enumerate(lengths) if length <= limit]
    assert [len(ids) for ids in encoded.input_ids] == [lengths[i] for i in encoded.kept]
    assert encoded.left_out == len(PAIRS) - len(encoded.kept) > 0
    assert encoded.longest == max(lengths)
    with pytest.raises(InputError, match=rf"All 6 samples .*max_length=2 .*has {max(lengths)}"):
        encode_samples(tokenizer, samples(), 2)


def test_eos_is_never_doubled():
    tokenizer = byte_level_tokenizer()
    [ids] = encode_samples(tokenizer, samples([("Paris", " Rome<|end|>")]), 100).input_ids
    assert ids.count(tokenizer.eos_token_id) == 1


def test_an_eos_that_the_tokenizer_adds_is_not_doubled_either():
    from tokenizers import processors

    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    assert tokenizer("Paris")["input_ids"][-1] == 0
    [ids] = encode_samples(tokenizer, samples([("Paris", " Rome")]), 100).input_ids
    assert ids.count(0) == 1


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_prompt_in_evaluation_has_the_tokens_it_has_in_training(tokenizer):
    encoded = encode_samples(tokenizer, samples(), 100)
    contexts = contexts_of(tokenizer, samples())
    for context, ids, labels in zip(contexts[:5], encoded.input_ids, encoded.labels, strict=False):
        unlabelled = sum(label == -100 for label in labels)
        assert context.ids == ids[:unlabelled]
        assert context.prompt.endswith(context.missing)


def test_what_the_context_lacks_of_the_prompt_is_told():
    tokenizer = byte_level_tokenizer()
    [context] = generation_contexts(
        tokenizer, tokenize_samples(tokenizer, [PromptCompletion("is ", "Paris", 0)])
    )
    assert context.ids == tokenizer("is")["input_ids"]
    assert (context.prompt, context.missing) == ("is ", " ")


def test_a_prompt_inside_the_completions_first_token_is_asked_on_its_own():
    tokenizer = byte_level_tokenizer()
    assert len(tokenizer("is")["input_ids"]) == 1
    [context] = generation_contexts(
        tokenizer, tokenize_samples(tokenizer, [PromptCompletion("i", "s", 0)])
    )
    assert context.ids == tokenizer("i")["input_ids"]


def test_a_bos_in_the_text_takes_the_place_of_the_tokenizers():
    tokenizer = piece_tokenizer()
    for text in (LINES[0], "<s>" + LINES[0]):
        [found] = tokenize(tokenizer, [text])
        assert (found.prefix + found.ids).count(tokenizer.bos_token_id) == 1
        assert (found.prefix + found.ids)[0] == tokenizer.bos_token_id


def test_a_tokenizers_stored_truncation_is_not_applied():
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    [found] = tokenize(tokenizer, [LINES[0]])
    assert tokenizer.decode(found.ids) == LINES[0]


def test_unusable_tokenizers_are_refused():
    with pytest.raises(InputError, match="has no EOS token"):
        encode_samples(byte_level_tokenizer(eos=False), samples(), 100)

    class Slow:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(InputError, match=r"some/model .*slow tokenizer"):
        encode_samples(Slow(), samples(), 100)


def test_tokens_of_many_spans_carry_loss_as_by_comparison_with_each():
    draw = random.Random(3)
    for _ in range(200):
        ends = sorted(draw.choices(range(1, 60), k=draw.randint(1, 30)))
        starts = [max(0, end - draw.randint(0, 4)) for end in ends]
        cuts = sorted(draw.sample(range(60), 2 * draw.randint(0, 6)))
        spans = tuple(zip(cuts[::2], cuts[1::2], strict=True))
        expected = [
            any(low < end and (end <= high or start < high) for low, high in spans)
            for start, end in zip(starts, ends, strict=True)
        ]
        assert _carry_loss(starts, ends, spans) == expected
