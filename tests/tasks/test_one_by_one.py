"""`fact` and `med` as one would measure them: one record at a time, nothing shared or saved."""

import copy
import json

import pytest
import torch

from molf.measure import EvaluationSettings
from molf.measure.generate import padding_id
from molf.measure.padding import generation_batches, logits_batches
from molf.tasks import TaskOptions, load_task
from molf.tasks.med import parse_letter
from question_records import med, write
from shared_data import SHARED, needs_shared
from tiny_models import (
    byte_level_tokenizer,
    next_log_probs,
    piece_tokenizer,
    tiny_llama,
    tiny_qwen2,
)

QUESTIONS = [med(f"{i}?", i % 4, options=["a", "b", "c", "d"]) for i in range(9)]
NAMES = ["Anna", "Bruno", "Paris is Rome", "A man"]


def request(subject, new, true):
    return {
        "requested_rewrite": {
            "prompt": "The home of {} is",
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": true},
        },
        "paraphrase_prompts": [f"{subject} lives in"],
        "neighborhood_prompts": ["The sky is", f"{subject} and Lisbon are"],
    }


FACTS = [request(name, "Rome", "a large bridge") for name in NAMES]
FACTS += [request(name, "Paris", "English") for name in [*NAMES, "Anna"]]  # one prompt comes twice


def made(pieces):
    if pieces:
        return tiny_llama(), piece_tokenizer(merges=pieces == "merged")
    return tiny_qwen2(), byte_level_tokenizer()


def loaded(name):
    from molf.job.model.loading import load_model

    checkpoint = load_model(str(SHARED / name))
    return checkpoint.model.eval(), checkpoint.tokenizer


def likelihoods(model, tokenizer, prompt, targets):
    """Log-probability of each target's first token, from the context that all targets share."""
    texts = [tokenizer(f"{prompt} {t}", return_offsets_mapping=True) for t in targets]
    rows = [text["input_ids"] for text in texts]
    stops = [
        next(i for i, (_, end) in enumerate(text["offset_mapping"]) if end > len(prompt) + 1)
        for text in texts
    ]
    shared = next(i for i in range(999) if i == min(stops) or len({row[i] for row in rows}) > 1)
    return [
        sum(next_log_probs(model, row[:i])[row[i]].item() for i in range(shared, stop + 1))
        for row, stop in zip(rows, stops, strict=True)
    ]


def greedy(model, tokenizer, text, start, tokens):
    """Greedy text after the tokens of `text` that end before its character `start`."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = [
        token
        for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if end <= start
    ]
    new = []
    for _ in range(tokens):
        with torch.no_grad():
            token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_fact(model, tokenizer, records, evaluation):
    for record, found in zip(records, evaluation.predictions, strict=True):
        rewrite = record["requested_rewrite"]
        prompt = rewrite["prompt"].format(rewrite["subject"])
        new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        for kind, prompts in (
            ("rewrite", [prompt]),
            ("paraphrase", record["paraphrase_prompts"]),
            ("neighbourhood", record["neighborhood_prompts"]),
        ):
            for asked, answer in zip(prompts, found[kind], strict=True):
                expected = torch.tensor(likelihoods(model, tokenizer, asked, (new, true))).exp()
                assert [answer["p_new"], answer["p_true"]] == pytest.approx(
                    expected.tolist(), rel=1e-3, abs=1e-7
                )
        text = greedy(model, tokenizer, f"{prompt} {new}", len(prompt), 12)
        assert text.startswith(found["prediction"])
        for target in (new, true):
            assert found["prediction"].strip().startswith(target) == text.strip().startswith(target)


def check_med(model, tokenizer, evaluation):
    for found in evaluation.predictions:
        prompt = found["prompt"]
        expected = likelihoods(model, tokenizer, prompt, "ABCD")
        assert list(found["log_probs"].values()) == pytest.approx(expected, abs=1e-4)
        text = greedy(model, tokenizer, f"{prompt} {found['expected']}", len(prompt), 8)
        assert text.lstrip().startswith(found["prediction"].lstrip())
        assert found["answer"] == parse_letter(text)


@pytest.mark.parametrize("pieces", ["", "merged", "single"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_fact(tmp_path, pieces, batch_size):
    model, tokenizer = made(pieces)
    path = write(tmp_path / "facts.jsonl", FACTS)
    task = load_task(TaskOptions(name="fact", eval_data=path, evaluation_only=True))
    settings = EvaluationSettings(batch_size=batch_size, max_new_tokens=12)
    check_fact(model, tokenizer, FACTS, task.evaluate(model, tokenizer, settings))


@pytest.mark.parametrize("pieces", ["", "merged", "single"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_med(tmp_path, pieces, batch_size):
    model, tokenizer = made(pieces)
    path = write(tmp_path / "questions.jsonl", QUESTIONS)
    task = load_task(TaskOptions(name="med", data=path, evaluation_only=True))
    check_med(
        model,
        tokenizer,
        task.evaluate(model, tokenizer, EvaluationSettings(batch_size=batch_size)),
    )


@needs_shared
@pytest.mark.parametrize("name", ["factlm", "stories260k"])
def test_real_checkpoints(tmp_path, name):
    model, tokenizer = loaded(name)
    lines = (SHARED / "counterfact.jsonl").read_text().splitlines()[:12]
    records = [json.loads(line) for line in lines]
    path = write(tmp_path / "facts.jsonl", records)
    task = load_task(TaskOptions(name="fact", eval_data=path, evaluation_only=True))
    settings = EvaluationSettings(max_new_tokens=12)
    check_fact(model, tokenizer, records, task.evaluate(model, tokenizer, settings))
    task = load_task(
        TaskOptions(
            name="med",
            data=str(SHARED / "medmcqa_validation.jsonl"),
            max_eval_samples=8,
            evaluation_only=True,
        )
    )
    check_med(model, tokenizer, task.evaluate(model, tokenizer, EvaluationSettings()))


@pytest.mark.parametrize("name", ["fact", "med"])
def test_no_text_is_tokenized_twice_and_no_context_is_evaluated_twice(tmp_path, name):
    model, tokenizer = copy.deepcopy(tiny_qwen2()), byte_level_tokenizer()
    path = write(tmp_path / "data.jsonl", {"fact": FACTS[:4], "med": QUESTIONS}[name])
    task = load_task(TaskOptions(name=name, eval_data=path, evaluation_only=True))
    texts, rows = [], []

    class Spy:
        """Notes what is tokenized."""

        def __getattr__(self, attribute):
            return getattr(tokenizer, attribute)

        def __call__(self, given, **options):
            texts.extend(given)
            return tokenizer(given, **options)

    def note(_, args, kwargs):
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():  # a prompt, no further token of an answer
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            rows.extend(tuple(i[m.bool()].tolist()) for i, m in zip(ids, mask, strict=True))

    for ask in (logits_batches, generation_batches):  # once for each model
        ask(model, padding_id(tokenizer))
    model.register_forward_pre_hook(note, with_kwargs=True)
    task.evaluate(model, Spy(), EvaluationSettings(batch_size=2))
    assert len(texts) == len(set(texts))
    assert len(rows) == len(set(rows)) >= 9
