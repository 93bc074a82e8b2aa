import pytest
import torch

from molf.errors import InputError
from molf.measure.inference import pad_left
from molf.measure.likelihood import next_token_log_probs, sequence_losses
from tiny_models import next_log_probs, tiny_llama, tiny_qwen2

ROWS = [[7, 8, 9, 10, 11], [3], [400, 5, 6], [12, 13, 14, 15, 16, 17, 18, 19], [20, 21]]


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_next_token_probabilities_are_those_of_one_by_one(make, batch_size):
    model = make()
    wanted = [[1, 2], [3], [], [4, 400, 5], [500]]
    found = next_token_log_probs(model, ROWS, wanted, pad_id=0, batch_size=batch_size)
    for row, tokens, values in zip(ROWS, wanted, found, strict=True):
        assert values == pytest.approx(next_log_probs(model, row)[tokens].tolist(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_sequence_losses_are_those_of_one_by_one(batch_size):
    model = tiny_llama()
    labels = [
        [-100, -100, 9, 10, 11],
        [3],  # nothing predicts a first token
        [400, 5, 6],
        [-100, 13, -100, 15, 16, -100, -100, 19],
        [-100, -100],
    ]
    found = sequence_losses(model, ROWS, labels, pad_id=0, batch_size=batch_size)
    for row, label, (total, count) in zip(ROWS, labels, found, strict=True):
        expected = [
            -next_log_probs(model, row[:i])[token].item()
            for i, token in enumerate(label)
            if i > 0 and token != -100
        ]
        assert count == len(expected)
        assert total == pytest.approx(sum(expected), abs=1e-4)


def test_the_loss_is_the_one_that_transformers_trains_on():
    model = tiny_qwen2()
    row = ROWS[3]
    labels = [-100, -100, -100, *row[3:]]
    with torch.no_grad():
        theirs = model(torch.tensor([row]), labels=torch.tensor([labels])).loss.item()
    [(total, count)] = sequence_losses(model, [row], [labels], pad_id=0, batch_size=1)
    assert total / count == pytest.approx(theirs, abs=1e-5)


def test_bfloat16_models_are_measured_in_float32():
    model = type(tiny_llama())(tiny_llama().config)
    model.load_state_dict(tiny_llama().state_dict())
    model = model.to(torch.bfloat16).eval()
    [values] = next_token_log_probs(model, [ROWS[0]], [list(range(512))], pad_id=0, batch_size=1)
    # In bfloat16, probabilities of 512 tokens would not sum to 1 so well.
    assert torch.tensor(values).double().exp().sum().item() == pytest.approx(1, abs=1e-4)
    with torch.no_grad():
        log_probs = model(torch.tensor([ROWS[0]])).logits[0].float().log_softmax(-1)
    expected = -sum(log_probs[i, token].item() for i, token in enumerate(ROWS[0][1:]))
    [(total, count)] = sequence_losses(model, [ROWS[0]], [ROWS[0]], pad_id=0, batch_size=1)
    assert count == 4
    assert total == pytest.approx(expected, rel=1e-5)


def test_a_broken_model_is_an_error_not_a_number():
    model = type(tiny_llama())(tiny_llama().config).eval()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        next_token_log_probs(model, [[1, 2]], [[3]], pad_id=0, batch_size=1)
    with pytest.raises(FloatingPointError, match="NaN"):
        sequence_losses(model, [[1, 2]], [[1, 2]], pad_id=0, batch_size=1)


def test_models_without_logits_to_keep_give_the_same():
    model = tiny_llama()

    class Plain(torch.nn.Module):
        """Forwards what older models take."""

        device, config = model.device, model.config

        def forward(self, input_ids, attention_mask=None, use_cache=None):
            return model(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    ours = sequence_losses(model, ROWS, ROWS, pad_id=0, batch_size=1)
    plain = sequence_losses(Plain(), ROWS, ROWS, pad_id=0, batch_size=1)
    assert [total for total, _ in plain] == pytest.approx([total for total, _ in ours])


def test_an_empty_prompt_is_padded_and_an_unknown_token_refused():
    model = tiny_llama()
    size = model.get_input_embeddings().weight.shape[0]
    assert pad_left(model, [[], [3, size - 1]], 0)["attention_mask"].tolist() == [[0, 0], [1, 1]]
    with pytest.raises(InputError, match=f"a token with id {size}, and the model has {size} embe"):
        pad_left(model, [[3], [4, size]], 0)
