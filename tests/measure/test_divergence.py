"""KL(base || model), compared with a direct float64 computation with both models in memory."""

import copy
import json
import math

import pytest
import torch

from molf.errors import InputError
from molf.measure import EvaluationSettings, default_plain_text, divergence, evaluate
from molf.measure.divergence import BaseLogits, Logits, kl_metrics, read_base
from molf.measure.spread import spread
from molf.tasks import TaskOptions, load_task
from molf.world import BASE_PATH
from tiny_models import LINES, byte_level_tokenizer, piece_tokenizer, tiny_llama, tiny_qwen2

TEXT = " ".join(LINES[:5])
SETTINGS = EvaluationSettings(max_length=100, batch_size=4)
SEVERAL = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20, 21], [22, 23]]


class Prompts:
    """Token rows in the place of a task's prompts."""

    def __init__(self, rows):
        self.rows = rows

    def prompts(self, tokenizer, most):
        return spread(self.rows, most)


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"prompt": line[:20], "completion": line[20:]} for line in LINES[:5]]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return load_task(TaskOptions(name="custom", data=str(path), evaluation_only=True))


def tuned(model, seed=1):
    """A copy with other weights near those of the model."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return other


@torch.no_grad()
def directly(base, model, rows, kept):
    """The mean over the last positions of each row, one row at a time, with both in memory."""
    total, count = 0.0, 0
    for row, positions in zip(rows, kept, strict=True):
        p, q = (m(torch.tensor([row])).logits[0].double().log_softmax(-1) for m in (base, model))
        kl = (p.exp() * (p - q)).sum(-1)[-positions:]
        total, count = total + kl.sum().item(), count + len(kl)
    return total / count


@pytest.mark.parametrize(
    ("make", "tokenizer"), [(tiny_llama, piece_tokenizer), (tiny_qwen2, byte_level_tokenizer)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_it_is_the_divergence_of_whole_distributions(make, tokenizer, dtype, batch_size):
    base = copy.deepcopy(make()).to(dtype)
    model = tuned(base)
    settings = EvaluationSettings(max_length=100, batch_size=batch_size)
    read = read_base(base, tokenizer(), Prompts(SEVERAL), TEXT, settings)
    assert {logits.dtype for logits in read.neutral.logits} == {dtype}  # stored without rounding
    assert read.task.rows == SEVERAL
    # Batches sum in another order than single rows, and bfloat16 rounds the logits afterwards.
    close = {"rel": 1e-5} if dtype == torch.float32 else {"rel": 0.05}
    for name, side in (("kl_neutral", read.neutral), ("kl_task", read.task)):
        metric = kl_metrics(model, read, settings)[name]
        kept = [len(row) for row in side.rows]
        assert [len(logits) for logits in side.logits] == kept
        assert metric.value == pytest.approx(directly(base, model, side.rows, kept), **close)
        assert metric.value > 0.01
        assert metric.count == len(side.rows)
        assert metric.low < metric.value < metric.high
        if dtype == torch.float32:  # the other direction differs by less than bfloat16 rounds
            assert metric.value != pytest.approx(directly(model, base, side.rows, kept), **close)


def test_bfloat16_is_exact_where_the_batches_are_equal():
    base = copy.deepcopy(tiny_llama()).to(torch.bfloat16)
    model, settings = tuned(base), EvaluationSettings(batch_size=1)
    read = read_base(base, piece_tokenizer(), Prompts(SEVERAL), TEXT, settings)
    expected = directly(base, model, SEVERAL, [len(row) for row in SEVERAL])
    found = kl_metrics(model, read, settings)["kl_task"].value
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_no_divergence_from_itself(task, dtype):
    model = copy.deepcopy(tiny_qwen2()).to(dtype)
    read = read_base(model, byte_level_tokenizer(), task, TEXT, SETTINGS)
    for metric in kl_metrics(copy.deepcopy(model), read, SETTINGS).values():
        assert (metric.value, metric.low, metric.high) == (0, 0, 0)


def test_the_direction_and_the_unit():
    def metric(p, q):
        side = Logits([[0]], [torch.tensor([p]).log()])
        model = tiny_qwen2()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                divergence, "last_logits", lambda *_: torch.tensor([[q]], dtype=torch.float64).log()
            )
            return kl_metrics(model, BaseLogits(side, side, 0))["kl_neutral"].value

    assert metric([0.9, 0.1], [0.5, 0.5]) == pytest.approx(
        0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6
    )
    assert metric([0.5, 0.5], [0.9, 0.1]) == pytest.approx(
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), rel=1e-6
    )
    # A token of the base's probability 0 adds nothing.
    assert metric([1.0, 0.0], [0.5, 0.5]) == pytest.approx(math.log(2), rel=1e-6)
    assert metric([0.9, 0.1, 0.0], [0.5, 0.5, 0.0]) == pytest.approx(metric([0.9, 0.1], [0.5, 0.5]))


def test_the_prompts_are_those_of_training_and_end_before_the_answer(task):
    tokenizer = byte_level_tokenizer()
    read = read_base(tiny_qwen2(), tokenizer, task, TEXT, SETTINGS)
    texts = [tokenizer.decode(row) for row in read.task.rows]
    assert len(texts) == 5
    for text, line in zip(texts, LINES[:5], strict=True):
        assert line[:20].startswith(text)
        assert len(text) > 12  # a token across the end belongs to the answer
    whole = tokenizer.decode([token for row in read.neutral.rows for token in row[1:]])
    assert whole in TEXT


@pytest.mark.parametrize("name", ["demo-fact", "demo-med", "demo-sql"])
def test_the_prompts_of_a_task_are_those_of_its_evaluated_records(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    task = load_task(TaskOptions(name=name, evaluation_only=True, max_samples=40))
    samples, prompts = task.evaluated_samples(7), task.prompts(tokenizer, 7)
    assert len({sample.prompt for sample in samples}) == len(prompts) == 7
    for sample, ids in zip(samples, prompts, strict=True):
        assert tokenizer.decode(ids) == sample.prompt
    assert len(task.prompts(tokenizer, 100)) == task.evaluation_count


def test_rows_are_spread_and_bounded(monkeypatch):
    rows = [[i % 500] * 30 for i in range(200)]
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    read = read_base(model, tokenizer, Prompts(rows), default_plain_text(), SETTINGS)
    assert [row[0] for row in read.task.rows][:3] == [0, 15, 31]  # of 64 prompts, 12 are read
    assert len(read.task.rows) == 12
    assert len(read.neutral.rows) == 12
    assert {len(row) for row in read.neutral.rows} == {32}
    # Of long prompts the last positions are compared, as many of each.
    monkeypatch.setattr(divergence, "_POSITIONS", 80)
    long = [[i + j for j in range(90)] for i in range(10)]
    read = read_base(model, tokenizer, Prompts(long), TEXT, SETTINGS)
    assert [len(logits) for logits in read.task.logits] == [10] * 8
    other = tuned(model)
    expected = directly(model, other, read.task.rows, [10] * 8)
    found = kl_metrics(other, read, SETTINGS)["kl_task"]
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert read.task.nbytes == 80 * 512 * 4


def test_prompts_that_are_too_long_are_left_out():
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    settings = EvaluationSettings(max_length=20)
    read = read_base(model, tokenizer, Prompts([[5] * 21, [6] * 20]), TEXT, settings)
    assert read.task.rows == [[6] * 20]
    read = read_base(model, tokenizer, Prompts([[5] * 21]), TEXT, settings)
    assert list(kl_metrics(model, read, settings)) == ["kl_neutral"]


def test_a_neutral_text_is_read_once(task):
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    first = read_base(model, tokenizer, task, TEXT, SETTINGS)
    shown = []
    again = read_base(
        *(model, tokenizer, task, TEXT, SETTINGS),
        progress=lambda what, done, total: shown.append(what),
        neutral=first.neutral,
    )
    assert again.neutral is first.neutral
    assert set(shown) == {"prompts"}


def test_it_joins_an_evaluation(task):
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    read = read_base(model, tokenizer, task, TEXT, SETTINGS)
    found = evaluate(tuned(model), tokenizer, task, TEXT, SETTINGS, base=read).metrics
    assert list(found)[-3:] == ["forgetting_loss", "kl_neutral", "kl_task"]
    plain = evaluate(tuned(model), tokenizer, task, TEXT, SETTINGS).metrics
    assert {name: found[name].value for name in plain} == {
        name: metric.value for name, metric in plain.items()
    }


def test_a_base_that_does_not_fit_is_refused_before_the_evaluation(task):
    tokenizer = byte_level_tokenizer()
    read = read_base(tiny_qwen2(vocab_size=520), tokenizer, task, TEXT, SETTINGS)
    shown = []
    with pytest.raises(InputError, match="The base predicts 520 tokens, and the model 512") as one:
        evaluate(
            *(tiny_qwen2(), tokenizer, task, TEXT, SETTINGS),
            progress=lambda what, done, total: shown.append(what),
            base=read,
        )
    assert "\n" not in str(one.value)
    assert shown == []
    read = read_base(tiny_qwen2(), tokenizer, Prompts([[5] * 100]), TEXT, SETTINGS)
    short = copy.deepcopy(tiny_qwen2())
    short.config.max_position_embeddings = 64
    with pytest.raises(InputError, match=r"has 64 positions.* 100 tokens. Give --max_length 64"):
        kl_metrics(short, read, SETTINGS)


def test_a_diverged_model_is_reported(task):
    model = tuned(tiny_qwen2())
    read = read_base(tiny_qwen2(), byte_level_tokenizer(), task, TEXT, SETTINGS)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        kl_metrics(model, read, SETTINGS)
