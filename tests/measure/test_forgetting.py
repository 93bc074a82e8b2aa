import pytest

from molf.errors import InputError
from molf.measure import default_plain_text, read_plain_text
from molf.measure.forgetting import forgetting_loss
from tiny_models import (
    LINES,
    byte_level_tokenizer,
    next_log_probs,
    piece_tokenizer,
    tiny_llama,
    tiny_qwen2,
)

TEXT = " ".join(LINES[:4])


def by_hand(model, ids, window, bos):
    """Every token once: windows of `window` tokens with BOS, else the last token, in front."""
    losses, step = [], window - 1
    start = 0 if bos else 1
    while start < len(ids):
        context = bos or ids[start - 1 : start]
        losses += [
            -next_log_probs(model, context + ids[start:i])[ids[i]].item()
            for i in range(start, min(start + step, len(ids)))
        ]
        start += step
    return losses


def test_without_bos_every_token_but_the_first_is_predicted_once():
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    losses = by_hand(model, ids, 20, [])
    assert len(losses) == len(ids) - 1
    metric = forgetting_loss(model, tokenizer, TEXT, 20, 4)
    assert metric.value == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert metric.count == -(-len(losses) // 19)
    assert metric.low < metric.value < metric.high


def test_with_bos_every_window_starts_with_it():
    model, tokenizer = tiny_llama(), piece_tokenizer()
    bos, *ids = tokenizer(TEXT)["input_ids"]
    losses = by_hand(model, ids, 20, [bos])
    assert len(losses) == len(ids)
    metric = forgetting_loss(model, tokenizer, TEXT, 20, 4)
    assert metric.value == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_the_batch_size_does_not_matter():
    model, tokenizer = tiny_llama(), piece_tokenizer()
    one = forgetting_loss(model, tokenizer, TEXT, 16, 1)
    many = forgetting_loss(model, tokenizer, TEXT, 16, 64)
    assert (one.value, one.low, one.high) == pytest.approx((many.value, many.low, many.high))


def test_a_text_without_a_token_to_predict_is_refused():
    with pytest.raises(InputError, match="too short"):
        forgetting_loss(tiny_qwen2(), byte_level_tokenizer(), "a")


def test_the_shipped_text_is_plain_english_of_some_length():
    text = default_plain_text()
    assert 1500 <= len(text.split()) <= 2500
    assert all(len(paragraph) < 2000 for paragraph in text.split("\n\n"))


def test_a_users_text_is_read_as_utf8(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Grüße aus dem Café", encoding="utf-8")
    assert read_plain_text(path) == "Grüße aus dem Café"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9", "is not UTF-8"), (b" \n", "is empty"), (None, "No such file")],
)
def test_an_unusable_text_file_is_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_plain_text(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
