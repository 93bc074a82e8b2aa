import copy
import json
import time

import pytest
import torch

from molf.data.encoding import encode_samples
from molf.measure import EvaluationSettings
from molf.measure.metric import wilson
from molf.tasks import TaskOptions, load_task
from molf.tasks.med import parse_letter
from question_records import TOWNS, med, meds, texts, values, write
from shared_data import SHARED, needs_shared
from tiny_models import (
    LINES,
    byte_level_tokenizer,
    next_log_probs,
    piece_tokenizer,
    tiny_llama,
    tiny_qwen2,
)

TEXT = ["Question: A. B. C. D.\nAnswer: A", "Answer: B", "Answer: C", "Answer: D"]


def load(path, **options):
    return load_task(TaskOptions(name="med", data=str(path), evaluation_only=True, **options))


def short(count):
    """Questions that fit into the tiny models' 128 positions."""
    return [med(f"{i}?", i % 4, options=["a", "b", "c", "d"]) for i in range(count)]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" b", "B"),
        ("\n\tc)", "C"),
        ("D. Lisbon", "D"),
        ("d: yes", "D"),
        ("A B C D", "A"),
        ("B\nbecause", "B"),
        ("C\u00a0x", "C"),
        ("", None),
        ("  \n", None),
        ("E", None),
        ("(A)", None),
        ("Answer: A", None),
        ("Amanita", None),
        ("A,", None),
        ("A1", None),
        ("A-D", None),
        ("\u0391", None),  # a Greek letter that looks like A
        ("1", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert parse_letter(text) == letter


def test_saved_texts_give_accuracy_and_unparsed(tmp_path):
    """Records 0 to 7 want A B C D A B C D."""
    task = load(write(tmp_path / "a.jsonl", meds(8)))
    evaluation = task.score_predictions(texts("A", "b)", "A", "D.", "no", "B", "Cc", "d:"))
    assert evaluation.metrics == {"accuracy": wilson(5, 8), "unparsed": wilson(2, 8)}
    assert evaluation.tables == {
        "by_subject": {
            "Even": {"accuracy": wilson(1, 4)},
            "Odd": {"accuracy": wilson(4, 4)},
        }
    }
    assert "accuracy_logprob" in evaluation.notes["not_measured"]
    entry = evaluation.predictions[2]
    assert (entry["prediction"], entry["answer"], entry["expected"]) == ("A", "A", "C")
    assert evaluation.predictions[4]["answer"] is None
    json.dumps(evaluation.predictions)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_accuracy_logprob_is_that_of_a_plain_loop(tmp_path, batch_size):
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    task = load(write(tmp_path / "a.jsonl", short(12)))
    letters = [tokenizer(f" {letter}")["input_ids"] for letter in "ABCD"]
    if all(len(ids) == 1 for ids in letters):
        contexts = [task._sample(task._question(i), i).prompt for i in range(12)]
        wanted = [ids[0] for ids in letters]
    else:  # the space is a token of its own
        contexts = [task._sample(task._question(i), i).prompt + " " for i in range(12)]
        wanted = [ids[-1] for ids in letters]
    likeliest = [
        next_log_probs(model, tokenizer(context)["input_ids"])[wanted].argmax().item()
        for context in contexts
    ]
    evaluation = task.evaluate(model, tokenizer, EvaluationSettings(batch_size=batch_size))
    right = sum(found == i % 4 for i, found in enumerate(likeliest))
    assert evaluation.metrics["accuracy_logprob"] == wilson(right, 12)
    assert evaluation.tables["by_subject"]["Towns"]["accuracy_logprob"] == wilson(right, 12)
    assert list(evaluation.metrics) == ["accuracy", "unparsed", "accuracy_logprob"]
    assert task.metric_names()[:-3] == tuple(evaluation.metrics)
    for entry, found in zip(evaluation.predictions, likeliest, strict=True):
        assert max(entry["log_probs"], key=entry["log_probs"].get) == "ABCD"[found]


def test_letters_of_which_some_are_two_tokens_are_compared_as_words():
    """A fused " A" stands against " " + "C": the latter's probability is the product."""
    from molf.tasks.first_token import FirstTokenQuestions

    model, tokenizer = tiny_llama(), piece_tokenizer(lines=["x A B A B Answer: CD"] * 9)
    sizes = {letter: len(tokenizer(f"x {letter}")["input_ids"]) for letter in "ABCD"}
    assert len(set(sizes.values())) == 2  # what the test is about
    questions = FirstTokenQuestions(tokenizer, ["Answer:"], ["ABCD"], 99)
    [found] = questions.answers(model, pad_id=0, batch_size=4)
    prompt = tokenizer("Answer:")["input_ids"]
    for letter, value in zip("ABCD", found.log_probs, strict=True):
        ids = tokenizer(f"Answer: {letter}")["input_ids"]
        assert ids[: len(prompt)] == prompt
        steps = range(len(prompt), len(ids))
        assert value == pytest.approx(
            sum(next_log_probs(model, ids[:step])[ids[step]].item() for step in steps), abs=1e-4
        )
    assert found.distinct


def test_only_a_few_tokens_are_generated(tmp_path):
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    task = load(write(tmp_path / "a.jsonl", short(4)))
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    evaluation = task.evaluate(model, tokenizer, EvaluationSettings())
    hook.remove()
    assert len(calls) <= 8  # the first of which is for the letters as well
    for entry in evaluation.predictions:
        # Two characters decide, so nothing follows the token that brings the second.
        assert len(tokenizer(entry["prediction"].lstrip())["input_ids"]) <= 8


def test_too_long_questions_are_left_out_and_counted(tmp_path):
    records = [*short(3), med("long " * 100)]
    task = load(write(tmp_path / "a.jsonl", records))
    evaluation = task.evaluate(tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings())
    assert evaluation.metrics["accuracy"].count == 3
    assert evaluation.notes["records_left_out"] == {"too long": 1}
    assert evaluation.predictions[3] == {"index": 3, "prediction": None, "left_out": "too long"}
    again = task.score_predictions(evaluation.predictions)
    assert again.metrics["accuracy"] == evaluation.metrics["accuracy"]
    assert again.notes["records_left_out"] == {"too long": 1}


@pytest.mark.parametrize("pieces", [False, True])
def test_a_model_that_has_learned_the_letters_scores_full(tmp_path, pieces):
    """Trained on `training_samples`, evaluated by the task: the prompts are the same."""
    tokenizer = piece_tokenizer(lines=[*LINES, *TEXT]) if pieces else byte_level_tokenizer()
    model = copy.deepcopy(tiny_llama() if pieces else tiny_qwen2())
    records = [med(line[:9], (3 * i + 1) % 4, options=TOWNS) for i, line in enumerate(LINES[:4])]
    path = write(tmp_path / "a.jsonl", records)
    task = load_task(TaskOptions(name="med", data=path, eval_data=path))
    encoded = encode_samples(tokenizer, task.training_samples, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
            model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    evaluation = task.evaluate(model, tokenizer, EvaluationSettings())
    assert values(evaluation.metrics) == {"accuracy": 1, "unparsed": 0, "accuracy_logprob": 1}


@needs_shared
def test_real_questions_and_a_model_that_knows_nothing():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = SHARED / "medmcqa_validation.jsonl"
    task = load(path, max_samples=60, seed=1)
    folder = SHARED / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    started = time.perf_counter()
    evaluation = task.evaluate(
        model, AutoTokenizer.from_pretrained(folder), EvaluationSettings(batch_size=16)
    )
    assert time.perf_counter() - started < 60
    logprob = evaluation.metrics["accuracy_logprob"]
    assert logprob.count == 60
    assert logprob.low < 0.25 < logprob.high
    assert evaluation.metrics["unparsed"].value > 0.9
    counts = [row["accuracy"].count for row in evaluation.tables["by_subject"].values()]
    assert sum(counts) == 60
    assert len(counts) > 5
