"""Models that take padding into account are measured as one by one, whatever the batch size."""

import warnings

import pytest
import torch

from molf.measure.generate import generate_greedy
from molf.measure.likelihood import next_token_log_probs, sequence_losses
from molf.measure.padding import generation_batches, logits_batches, right_padding_counts
from tiny_models import byte_level_tokenizer, tiny_llama, tiny_qwen2

ROWS = [[7, 8, 9, 10, 11], [3, 4], [400, 5, 6], [12, 13, 14, 15, 16], [20, 21], [30, 31, 32]]
_COMMON = {"vocab_size": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}


def make(name):
    """A random model whose weights are large enough for padding to show."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "intermediate_size": 48}
    bart = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    mamba = {"state_size": 8, **sizes}
    kinds = {
        "Rwkv": {"attention_hidden_size": 32, "intermediate_size": 48, **sizes},
        "Bart": {**bart, "decoder_ffn_dim": 48, "max_position_embeddings": 128},
        "Roberta": {**heads, **sizes, "is_decoder": True, "max_position_embeddings": 130},
        "Mamba": mamba,
        "FalconMamba": mamba,
        "Llama": {**heads, **sizes, "max_position_embeddings": 128},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_COMMON, **kinds[name])
    return _with_large_weights(transformers.AutoModelForCausalLM.from_config(config).eval())


def _with_large_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def model_of():
    made = {}
    return lambda name: made.setdefault(name, make(name))


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("Rwkv", ("equal", "single")),  # rows mix in its cached state
        ("Bart", ("equal", None)),
        ("Roberta", ("equal", "any")),
        ("Mamba", ("any", "any")),
        ("FalconMamba", ("any", "any")),
        ("Llama", ("any", "any")),
    ],
)
def test_models_are_asked(name, batches):
    model = make(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # known the second time
            assert logits_batches(model, 1) == batches[0]
            assert batches[1] is None or generation_batches(model, 1) == batches[1]
    said = [str(one.message) for one in caught if "rest of a batch" in str(one.message)]
    assert len(said) == sum(one in ("equal", "single") for one in batches)
    assert right_padding_counts(model, 1) is False


@pytest.mark.filterwarnings("ignore:.*depends on the rest of a batch")
@pytest.mark.parametrize("name", ["Rwkv", "Bart", "Roberta", "Mamba", "Llama"])
def test_metrics_are_those_of_one_by_one(model_of, name):
    model = model_of(name)
    wanted = [[1, 2, 300]] * len(ROWS)

    def measured(size):
        probabilities = next_token_log_probs(model, ROWS, wanted, pad_id=1, batch_size=size)
        losses = sequence_losses(model, ROWS, ROWS, pad_id=1, batch_size=size)
        return torch.tensor(probabilities), torch.tensor([loss for loss, _ in losses])

    torch.testing.assert_close(measured(8), measured(1), rtol=1e-4, atol=1e-4)
    # And these are what the model is trained on.
    row = torch.tensor(ROWS[0])
    with torch.no_grad():
        logits = model(row[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    assert measured(8)[1][0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*depends on the rest of a batch")
@pytest.mark.parametrize("name", ["Rwkv", "Mamba", "Llama"])
def test_answers_are_those_of_one_by_one(model_of, name):
    tokenizer = byte_level_tokenizer()
    answers = [
        generate_greedy(model_of(name), tokenizer, ROWS, max_new_tokens=8, batch_size=size)
        for size in (1, 8)
    ]
    assert answers[0] == answers[1]


def test_rounded_weights_do_not_make_a_model_one_of_these():
    for model in (tiny_llama(), tiny_qwen2()):
        half = type(model)(model.config)
        half.load_state_dict(model.state_dict())
        half.to(torch.bfloat16).eval()
        assert logits_batches(half, 1) == generation_batches(half, 1) == "any"


def test_no_model_is_asked_where_nothing_is_padded(monkeypatch):
    from molf.measure import likelihood

    def fail(model, pad_id):
        raise AssertionError("asked")

    monkeypatch.setattr(likelihood, "logits_batches", fail)
    same = [[1, 2, 3], [4, 5, 6]]
    sequence_losses(tiny_llama(), same, same, pad_id=0, batch_size=8)
    sequence_losses(tiny_llama(), ROWS, ROWS, pad_id=0, batch_size=1)


def test_padding_after_a_text_counts_for_few():
    """ProphetNet's decoder is one of them."""
    from transformers import AutoModelForCausalLM, ProphetNetConfig

    torch.manual_seed(0)
    config = ProphetNetConfig(
        vocab_size=512,
        hidden_size=32,
        decoder_ffn_dim=32,
        num_decoder_layers=2,
        num_decoder_attention_heads=2,
        max_position_embeddings=128,
        is_decoder=True,
    )
    model = _with_large_weights(AutoModelForCausalLM.from_config(config).eval())
    assert right_padding_counts(model, 0)
