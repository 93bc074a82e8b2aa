import json
import math

import pyarrow
import pyarrow.parquet
import pytest

from molf.data import encoding
from molf.data.encoding import encode_samples
from molf.data.samples import EMPTY
from molf.errors import InputError
from molf.job.evaluated_data import warn_of_trained_records
from molf.measure import EvaluationSettings
from molf.measure.generate import decode, generate_greedy
from molf.measure.tokens import tokenize
from molf.tasks import TaskOptions, answers, load_task
from tiny_models import (
    CHATML,
    LINES,
    byte_level_tokenizer,
    next_log_probs,
    tiny_qwen2,
)

TURNS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Paris."}]


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def pairs(count, tag=""):
    return [
        {"prompt": f"{tag}{i}: What is it?", "completion": f" It is {i}."} for i in range(count)
    ]


def load(path, **options):
    return load_task(TaskOptions(name="custom", data=path, **options))


def records_of(samples):
    return [sample.record for sample in samples]


def evaluated(task):
    evaluation = task.evaluate(
        tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings(max_new_tokens=1)
    )
    assert task.metric_names()[:-3] == tuple(evaluation.metrics)
    return [entry["index"] for entry in evaluation.predictions]


def test_a_share_is_held_out_by_the_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(40))
    task = load(path)
    trained, held_out = records_of(task.training_samples), evaluated(task)
    assert len(held_out) == 4
    assert sorted(trained + held_out) == list(range(40))
    assert records_of(load(path).training_samples) == trained
    assert evaluated(load(path, seed=5)) != held_out
    assert "4 records held out" in task.description()["evaluated_on"]


def test_max_samples_bounds_training_and_held_out_records_together(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(40))
    task = load(path, max_samples=20)
    assert (len(task.training_samples), task.evaluation_count) == (18, 2)
    assert len(set(records_of(task.training_samples)) | set(evaluated(task))) == 20
    task = load(write(tmp_path / "b.jsonl", pairs(6000)))
    assert (len(task.training_samples), task.evaluation_count) == (5500, 500)
    task = load(path, max_samples=2)
    assert (len(task.training_samples), task.evaluation_count) == (1, 1)
    with pytest.raises(InputError, match="none is left to evaluate on"):
        load(path, max_samples=1)


def test_splits_of_the_data_are_used(tmp_path):
    write(tmp_path / "d" / "train.jsonl", pairs(5))
    write(tmp_path / "d" / "validation.jsonl", pairs(3, "v"))
    task = load(str(tmp_path / "d"))
    assert (len(task.training_samples), evaluated(task)) == (5, [0, 1, 2])
    assert "validation split" in task.description()["evaluated_on"]
    write(tmp_path / "d" / "test.jsonl", pairs(2, "t"))
    assert load(str(tmp_path / "d")).evaluation_count == 2
    (tmp_path / "d" / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"no training records \(only test, validation\)"):
        load(str(tmp_path / "d"))
    assert load(str(tmp_path / "d"), evaluation_only=True).evaluation_count == 2


def test_other_records_can_be_evaluated(tmp_path):
    data, other = write(tmp_path / "a.jsonl", pairs(9)), write(tmp_path / "b.jsonl", pairs(4))
    task = load(data, eval_data=other, max_eval_samples=3)
    assert (len(task.training_samples), task.evaluation_count) == (9, 3)
    task = load(data, evaluation_only=True)
    assert (task.training_samples, evaluated(task)) == ([], list(range(9)))
    task = load_task(TaskOptions(name="custom", eval_data=other, evaluation_only=True))
    assert evaluated(task) == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_loss_is_that_of_a_plain_loop_over_completion_tokens(tmp_path, batch_size):
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    records = [{"prompt": line[:15], "completion": line[15:]} for line in LINES[:4]]
    task = load(write(tmp_path / "a.jsonl", records), evaluation_only=True)
    encoded = encode_samples(tokenizer, [task._data.samples[i] for i in range(4)], 128)
    losses = [
        [-next_log_probs(model, ids[:i])[ids[i]].item() for i in range(len(ids)) if labels[i] >= 0]
        for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True)
    ]
    evaluation = task.evaluate(model, tokenizer, EvaluationSettings(batch_size=batch_size))
    tokens = [loss for row in losses for loss in row]
    metric = evaluation.metrics["loss"]
    assert metric.value == pytest.approx(sum(tokens) / len(tokens), abs=1e-4)
    assert metric.count == 4
    perplexity = evaluation.metrics["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(metric.value))
    assert perplexity.high == pytest.approx(math.exp(metric.high))
    for entry, row in zip(evaluation.predictions, losses, strict=True):
        assert entry["loss"] == pytest.approx(sum(row) / len(row), abs=1e-4)


def test_exact_match_is_a_greedy_answer_equal_after_trimming(tmp_path):
    model, tokenizer = tiny_qwen2(), byte_level_tokenizer()
    prompts = [line[:15] for line in LINES[:3]]
    contexts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers = generate_greedy(model, tokenizer, contexts, max_new_tokens=3, batch_size=1)
    texts = [decode(tokenizer, answer) for answer in answers]
    records = [
        {"prompt": prompts[0], "completion": texts[0] + "  "},
        {"prompt": prompts[1], "completion": texts[1]},
        {"prompt": prompts[2], "completion": texts[2] + "x"},
    ]
    task = load(write(tmp_path / "a.jsonl", records), evaluation_only=True)
    evaluation = task.evaluate(model, tokenizer, EvaluationSettings(max_new_tokens=3))
    found = [entry["prediction"].strip() for entry in evaluation.predictions]
    assert found == [text.strip() for text in texts]
    assert evaluation.metrics["exact_match"].value == pytest.approx(2 / 3)
    for entry in evaluation.predictions:
        entry["prediction"] = f"\n {entry['prediction']} \n"
    again = task.score_predictions(evaluation.predictions)
    assert again.metrics == {"exact_match": evaluation.metrics["exact_match"]}
    assert "loss" in again.notes["not_measured"]


def test_records_are_tokenized_once(tmp_path, monkeypatch):
    texts = []

    def counted(tokenizer, some, **options):
        texts.extend(some)
        return tokenize(tokenizer, some, **options)

    for module in (encoding, answers):
        monkeypatch.setattr(module, "tokenize", counted)
    task = load(write(tmp_path / "a.jsonl", pairs(9)), evaluation_only=True)
    task.evaluate(tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings(max_new_tokens=2))
    assert len(texts) == len(set(texts)) == 9


def test_too_long_records_are_left_out_and_counted(tmp_path):
    records = [*pairs(3), {"prompt": "x" * 300, "completion": "y"}]
    task = load(write(tmp_path / "a.jsonl", records), evaluation_only=True)
    evaluation = task.evaluate(tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings())
    assert evaluation.notes["records_too_long"] == 1
    assert evaluation.metrics["loss"].count == 3
    assert evaluation.predictions[3] == {"index": 3, "prediction": None, "left_out": "too long"}
    again = task.score_predictions(evaluation.predictions)
    assert again.metrics["exact_match"] == evaluation.metrics["exact_match"]


def test_saved_texts_of_a_run_can_be_scored_with_its_options(tmp_path):
    """The run held a share out; an evaluation alone takes all records, or that share."""
    path = write(tmp_path / "a.jsonl", pairs(40))
    options = {"max_samples": 30, "seed": 3}
    run = load(path, **options)
    settings = EvaluationSettings(max_new_tokens=1)
    saved = run.evaluate(tiny_qwen2(), byte_level_tokenizer(), settings).predictions
    evaluation = load(path, **options, evaluation_only=True).score_predictions(saved)
    assert [entry["index"] for entry in evaluation.predictions] == [e["index"] for e in saved]
    with pytest.raises(InputError, match="lack record"):
        load(path, seed=4, evaluation_only=True).score_predictions(saved)
    # Beyond what was drawn nothing is scored.
    texts = [{"index": index, "prediction": ""} for index in range(40)]
    few = load(path, max_samples=7, evaluation_only=True)
    assert few.score_predictions(texts).metrics["exact_match"].count == 7


def test_conversations_are_evaluated_on_the_last_turn(tmp_path):
    records = [
        {"messages": [*TURNS, *TURNS]},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {
            "conversations": [
                {"from": "human", "value": "Where?"},
                {"from": "gpt", "value": "In Paris."},
            ]
        },
        {"messages": [*TURNS, {"role": "user", "content": "Thanks"}]},  # nothing answers this
    ]
    files = [write(tmp_path / f"{i}.jsonl", [record]) for i, record in enumerate(records)]
    task = load(",".join(files), evaluation_only=True)
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"
    evaluation = task.evaluate(tiny_qwen2(), tokenizer, EvaluationSettings())
    prompts = [entry["prompt"] for entry in evaluation.predictions]
    asked = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [asked + "In Paris.<|im_end|>\n" + asked, asked, asked, asked]
    assert [entry["expected"] for entry in evaluation.predictions] == ["In Paris."] * 4
    with pytest.raises(InputError, match="the tokenizer has none"):
        task.evaluate(tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings())


def test_nulls_of_parquet_are_no_fields(tmp_path):
    records = [
        {"messages": [{**turn, "tool_calls": None} for turn in TURNS], "prompt": None},
        {"prompt": "a", "completion": "b", "messages": None},
    ]
    files = [write(tmp_path / f"{i}.jsonl", [record]) for i, record in enumerate(records)]
    task = load(",".join(files), evaluation_only=True)
    samples = task._data.samples
    assert [sample.answer for sample in samples.values()] == ["In Paris.", "b"]
    assert all("tool_calls" not in message for message in samples[0].messages)


def test_values_of_parquet_that_json_has_not_are_compared(tmp_path):
    def times(seconds):
        at = pyarrow.array([seconds, seconds], pyarrow.timestamp("s")).to_pylist()
        return [{**turn, "at": time} for turn, time in zip(TURNS, at, strict=True)]

    path = tmp_path / "a.parquet"
    records = [{"messages": times(number // 2)} for number in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    task = load(str(path))
    contents = [sample.content for sample in task._read.samples.values()]
    assert contents[::2] == contents[1::2]  # equal records are on the same side
    assert len(set(contents)) == 20
    assert task.evaluation_count == 4


def test_a_text_of_one_token_has_no_loss(tmp_path):
    """Such as the end token between the documents of a corpus, for a tokenizer without BOS."""
    tokenizer = byte_level_tokenizer()
    records = [{"text": text} for text in (tokenizer.eos_token, *LINES[:3])]
    task = load(write(tmp_path / "a.jsonl", records), evaluation_only=True)
    given = tiny_qwen2(), tokenizer, EvaluationSettings()
    found = task.evaluate(*given)
    assert [entry["loss"] is None for entry in found.predictions] == [True, False, False, False]
    other = load(write(tmp_path / "b.jsonl", records[1:]), evaluation_only=True).evaluate(*given)
    assert found.metrics["loss"].value == other.metrics["loss"].value


def test_results_of_tools_and_reasoning_need_no_content(tmp_path):
    turns = [
        {"role": "user", "content": "Go!"},
        {"role": "assistant", "content": None, "reasoning_content": "Well."},
        {"role": "tool", "content": None, "name": "go"},
        {"role": "assistant", "content": "Gone."},
    ]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    (sample,) = load(path, evaluation_only=True)._data.samples.values()
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }}{{ m.content }};{% endfor %}"
    )
    rendered = sample.render(tokenizer)
    assert rendered.text == "user: Go!;assistant: Well.;tool: ;assistant: Gone.;"


TWICE = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": '{"city": "a", "city": "b"}'}}],
    }
]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"texts": "x"},
            r"needs prompt and completion, messages, .*, or text \(it has: texts\)",
        ),
        ({"prompt": "x", "completion": None}, r"needs prompt and completion.*\(it has: prompt\)"),
        ({"prompt": "x", "completion": 5}, "completion must be a text, not int"),
        ({"prompt": " ", "completion": "x"}, "prompt must not be empty"),
        ({"prompt": TURNS, "completion": "x"}, "must be both texts or both messages"),
        ({"messages": "x"}, "messages must be a list, not str"),
        ({"messages": ["x"]}, r"messages\[0\] must be an object, not str"),
        (
            {"messages": TURNS, "tools": '[{"type": "function", "type": "x"}]'},
            "tools: the key 'type' comes twice",
        ),
        ({"messages": TWICE}, "arguments: the key 'city' comes twice"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] lacks a content, and has no tool_calls"),
        ({"messages": [{**TURNS[1], "weight": 2}]}, r"messages\[0\].weight must be 0 or 1, not 2"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            r"content\[0\] is of the type 'image'. Only text can be trained on",
        ),
        ({"messages": TURNS, "tools": "[{"}, "tools is a text that is not JSON"),
        ({"messages": TURNS, "tools": {"a": 1}}, "tools must be a list, not dict"),
        ({"messages": TURNS, "chat_template_kwargs": [1]}, "kwargs must be an object, not list"),
        (
            {"messages": TURNS, "chat_template_kwargs": {"add_generation_prompt": True}},
            "add_generation_prompt cannot be set",
        ),
        ({"messages": [{"role": 1, "content": "x"}]}, r"messages\[0\].role must be a text"),
        (
            {"messages": [{"role": "user", "content": [1]}]},
            r"\.content\[0\] must be an object, not int",
        ),
    ],
)
def test_a_wrong_record_is_one_clear_line(tmp_path, wrong, message):
    right = [{"messages": TURNS}] * 2 if "messages" in wrong else pairs(2)
    path = write(tmp_path / "a.jsonl", [*right, wrong])
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert f"{path}, record 2" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "nothing",
    [
        {"messages": TURNS[:1]},
        {"messages": []},
        {"prompt": TURNS, "completion": TURNS[:1]},
        {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]},
    ],
)
def test_a_conversation_without_a_turn_to_learn_is_left_out_and_counted(tmp_path, nothing):
    right = pairs(5)
    if "messages" in nothing:
        right = [
            {"messages": [{"role": "user", "content": r["prompt"]}, *TURNS[1:]]} for r in right
        ]
    path = write(tmp_path / "a.jsonl", [*right[:3], nothing, *right[3:]])
    with pytest.warns(UserWarning, match="1 of 6 records are left out: no assistant message to"):
        task = load(path)
    read = task.data_records()
    assert (read.count, list(read.samples)) == (6, [0, 1, 2, 4, 5])
    assert read.left_out == {"no assistant message to learn": 1}
    assert 3 not in (*read.trained_on, *read.held_out)
    assert task.description()["training_records_left_out"] == read.left_out
    with pytest.raises(InputError, match="none of the 1 records can be used"):
        load(write(tmp_path / "b.jsonl", [nothing]))


def test_other_names_of_the_assistant_are_told(tmp_path):
    talk = [{"role": "user", "content": "Where?"}, {"role": "model", "content": "In Paris."}]
    fault = r"can be used \(no assistant message to learn \(roles: 'model'\): 2\)"
    with pytest.raises(InputError, match=fault):
        load(write(tmp_path / "a.jsonl", [{"messages": talk}] * 2))


def test_fields_that_are_not_read_are_named_once(tmp_path):
    records = [{**record, "source": "web", "id": i} for i, record in enumerate(pairs(9))]
    with pytest.warns(UserWarning, match="fields that are not read: source, id") as caught:
        load(write(tmp_path / "a.jsonl", records))
    assert len(caught) == 1
    both = [{**record, "messages": TURNS} for record in pairs(9)]
    with pytest.warns(UserWarning, match="not read: prompt, completion"):
        load(write(tmp_path / "b.jsonl", both[:1]), preview=True)


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_answer_expected_is_what_the_template_writes(tmp_path, monkeypatch):
    """A model that repeats its training exactly gets 1, whatever the template puts around."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = THINKING, "<|im_end|>"
    records = [{"messages": TURNS}, {"messages": [TURNS[0], {**TURNS[1], "content": "x" * 70}]}]
    task = load(write(tmp_path / "a.jsonl", records), evaluation_only=True)
    asked = {}

    def perfect(model, tokenizer, contexts, max_new_tokens, *args, **kwargs):
        asked["tokens"] = max_new_tokens
        ids = [context.text.ids[-context.answer_tokens :] for context in contexts]
        assert all(len(answer) < max_new_tokens for answer in ids)
        return [decode(tokenizer, answer) for answer in ids]

    monkeypatch.setattr("molf.tasks.custom.generate_answers", perfect)
    evaluation = task.evaluate(tiny_qwen2(), tokenizer, EvaluationSettings())
    assert evaluation.metrics["exact_match"].value == 1
    expected = [entry["expected"] for entry in evaluation.predictions]
    assert expected[0] == "<think>\n\n</think>\n\nIn Paris."
    # Without the model: what the predictions say is expected must end in the record's answer.
    again = task.score_predictions(evaluation.predictions)
    assert again.metrics["exact_match"].value == 1
    with pytest.raises(InputError, match="record 1 was made on other data"):
        task.score_predictions(
            [evaluation.predictions[0], {**evaluation.predictions[0], "index": 1}]
        )


def test_data_is_needed():
    for only in (False, True):
        with pytest.raises(InputError, match="task custom needs data"):
            load(None, evaluation_only=only)


@pytest.mark.parametrize("chat", [False, True])
def test_equal_records_are_trained_on_or_evaluated(tmp_path, chat):
    records = pairs(20)
    if chat:
        records = [
            {"messages": [{"role": "user", "content": r["prompt"]}, *TURNS[1:]]} for r in records
        ]
    records = [{**record, "id": i} for i, record in enumerate([*records, *records, *records])]
    task = load(write(tmp_path / "a.jsonl", records))
    trained, held_out = records_of(task.training_samples), task._evaluated
    assert {index % 20 for index in held_out}.isdisjoint(index % 20 for index in trained)
    assert sorted([*trained, *held_out]) == list(range(60))
    assert len(held_out) == 6
    # What a run held out is known again.
    saved = [{"index": index, "prediction": ""} for index in held_out]
    again = load(str(tmp_path / "a.jsonl"), evaluation_only=True).score_predictions(saved)
    assert again.metrics["exact_match"].count == 6
    with pytest.raises(InputError, match="3 records of one content, and none is left to evaluate"):
        load(write(tmp_path / "b.jsonl", records[::20]))


def called(arguments, number):
    function = {"name": "weather", "arguments": arguments}
    call = {"type": "function", "id": f"call-{number}", "function": function}
    result = {"role": "tool", "content": "Warm.", "tool_call_id": f"call-{number}"}
    return [TURNS[0], {"role": "assistant", "tool_calls": [call]}, result, TURNS[1]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": TURNS}, {"prompt": TURNS[:1], "completion": TURNS[1:]}),
        ({"messages": TURNS}, {"instruction": "Where?", "output": "In Paris."}),
        ({"messages": TURNS}, {"messages": [{**TURNS[0], "id": "7"}, {**TURNS[1], "weight": 1}]}),
        (
            {"messages": TURNS},
            {"messages": [{**TURNS[0], "content": [{"type": "text", "text": "Where?"}]}, TURNS[1]]},
        ),
        ({"messages": called({"city": "Rome"}, 1)}, {"messages": called('{"city": "Rome"}', 2)}),
        (
            {"messages": [*TURNS, *TURNS]},
            {"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]},
        ),
    ],
)
def test_the_same_texts_in_two_forms_are_one_content(tmp_path, one, other):
    """Else one of them is trained on and the other one measured."""
    files = [write(tmp_path / f"{i}.jsonl", [record]) for i, record in enumerate((one, other))]
    with pytest.warns(UserWarning, match="1 of 1 evaluated records are also trained on"):
        warn_of_trained_records(load(files[0], eval_data=files[1]))
    with pytest.raises(InputError, match="2 records of one content, and none is left to evaluate"):
        load(",".join(files))


def test_other_calls_and_results_are_another_content(tmp_path):
    talks = [called({"city": "Rome"}, 1), called({"city": "Oslo"}, 1)]
    talks.append([*talks[0][:2], {**talks[0][2], "content": "Cold."}, TURNS[1]])
    path = write(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    samples = load(path, evaluation_only=True)._data.samples
    assert len({sample.content for sample in samples.values()}) == 3


@pytest.mark.parametrize(
    ("record", "is_empty"),
    [
        ({"prompt": "a", "completion": ""}, True),
        ({"prompt": "a", "completion": " \n"}, True),
        ({"prompt": "a", "completion": " b"}, False),
        ({"instruction": "a", "output": ""}, True),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, True),
        ({"messages": [TURNS[0], {"role": "assistant", "content": ""}, *TURNS]}, True),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": "", "weight": 0}, *TURNS]},
            False,
        ),
        ({"messages": called({"city": "Rome"}, 1)[:2]}, False),
    ],
)
def test_an_empty_answer_is_named(tmp_path, record, is_empty):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls }}"
        "<|im_end|>\n{% endfor %}"
    )
    task = load(write(tmp_path / "a.jsonl", [record]), evaluation_only=True)
    [sample] = task._data.samples.values()
    assert (EMPTY in sample.render(tokenizer).faults) is is_empty


@pytest.mark.parametrize(
    ("wrong", "name"), [({"prompt": "another"}, "prompt"), ({"expected": "x"}, "expected")]
)
def test_predictions_of_other_data_are_refused(tmp_path, wrong, name):
    task = load(write(tmp_path / "a.jsonl", pairs(3)), evaluation_only=True)
    saved = task.evaluate(
        tiny_qwen2(), byte_level_tokenizer(), EvaluationSettings(max_new_tokens=1)
    ).predictions
    task.score_predictions(saved)
    with pytest.raises(InputError, match=f"Prediction 1 was made on .*: record 1 has the {name}"):
        task.score_predictions([saved[0], {**saved[1], **wrong}, saved[2]])
