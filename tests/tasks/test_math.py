import copy
import json
from fractions import Fraction

import pytest
import torch

from molf.cli import main
from molf.data.encoding import encode_samples
from molf.errors import InputError
from molf.measure import EvaluationSettings
from molf.measure.final_numbers import final_number, is_final, shown, stated_number
from molf.measure.metric import wilson
from molf.measure.questions import question_scores
from molf.tasks import TaskOptions, load_task
from question_records import gsm8k, maths, metamath, texts, values, write
from tiny_models import LINES, byte_level_tokenizer, tiny_qwen2


def load(path, **options):
    path = None if path is None else str(path)
    return load_task(TaskOptions(name="math", data=path, **options))


def evaluated(path, **options):
    return load(path, evaluation_only=True, **options)


ANSWERS = [
    ("She has 3 + 4 = 7 pens.\nThe answer is: 7", "7"),
    ("the final answer is 18 dollars, 3 more than before.", "18"),
    ("The answer is:\n\n $1,450.00.", "1450"),
    ("The answer is: -$2.50", "-2.5"),
    ("The answer is: 50%", "50"),
    ("The answer is: 12\\%", "12"),
    ("The answer is: 3/4", "0.75"),
    ("The answer is: 2 1/2", "2.5"),
    ("The answer is: 1/3 of it", "1/3"),
    ("The answer is: \\boxed{16}", "16"),
    ("The answer is: $\\frac{3}{4}$", "0.75"),
    ("The answer is: $\\dfrac{-3}{4}$", "-0.75"),
    ("The answer is: 1\\frac12", "1.5"),
    ("The answer is: 10{,}000", "10000"),
    ("The answer is: \u22127", "-7"),
    ("The answer is: .5", "0.5"),
    ("The answer is: x = 5", "5"),
    ("The answer is: the answer is\n5 of 6", "5"),
    ("#### 42", "42"),
    ("6 * 7 = 42\n#### 42\nThe answer is: 43", "42"),
    ("The answer is: 7\n\nQuestion: 9 pens? Think step by step.\nAnswer: The answer is: 9", "7"),
    ("The answer is unknown.\nSo she has 9 of 10. The answer is 9", "9"),
    ("Half of it is \\boxed{8}, so 3 are left of 11", "8"),
    ("Half of 16 is 8. Then 5-3 are left, or 2.", "2"),
    ("It costs US$5.", "5"),
    ("There are 12 pens in pack B2", "12"),
    ("Pages 3-4", "4"),
    ("3/0 of 8", "8"),
    ("No pens\nQuestion: and 3 more?", None),
    ("none", None),
    ("", None),
    ("The answer is: 3/0", None),
    ("9" * 6000, None),
    ("\u0663", None),  # an Arabic 3
]


@pytest.mark.parametrize(("text", "number"), ANSWERS)
def test_the_final_number_of_a_text(text, number):
    found = final_number(text)
    assert (None if found is None else shown(found)) == number


@pytest.mark.parametrize("text", [text for text, _ in ANSWERS if len(text) < 200])
def test_generation_ends_where_more_text_changes_nothing(text):
    ends = [end for end in range(len(text) + 1) if is_final(text[:end])]
    for end in ends[:1]:
        number = final_number(text[:end])
        for more in ("", "5", "/2", ",000", "\n#### 9", "\nQuestion: 8?", " \\boxed{4}", text):
            assert final_number(text[:end] + more) == number
    assert bool(ends) == is_final(text)


def test_generation_goes_on_where_the_number_may_still_change():
    assert not is_final("The answer is: 1")
    assert not is_final("The answer is: 1,")
    assert not is_final("It is 7.\n")
    assert is_final("The answer is: 1\n")
    assert is_final("It is 7.\nQuestion:")


@pytest.mark.parametrize(
    ("solution", "number"),
    [
        ("Add.\nThe answer is: 16", 16),
        ("The answer is 3.\nThe answer is: \\boxed{16}.", 16),
        ("#### 1,000", 1000),
        ("The answer is: \\frac{3}{4}", Fraction(3, 4)),
        ("The answer is: $20\\%$", 20),
        ("The answer is: x^2 + 1", None),
        ("The answer is: 2\\sqrt{3}", None),
        ("The answer is: (3, 5)", None),
        ("It is 16.", None),
    ],
)
def test_the_number_that_a_record_states(solution, number):
    assert stated_number(solution) == number


def test_numbers_are_shown_alike_where_their_values_are_equal():
    assert [shown(Fraction(x)) for x in ("18", "-3/4", "0.050", "2/6", "-0")] == [
        "18",
        "-0.75",
        "0.05",
        "1/3",
        "0",
    ]


def test_saved_texts_give_accuracy_and_unparsed(tmp_path):
    records = [gsm8k("a?", "1,000"), gsm8k("b?", 5), *maths(2), metamath("c?", "x^2")]
    task = evaluated(write(tmp_path / "a.jsonl", records))
    saved = texts("#### 1000.0", "It is 6.", "The answer is: $0", "no", "The answer is: 2")
    evaluation = task.score_predictions(saved)
    assert evaluation.metrics == {"accuracy": wilson(2, 4), "unparsed": wilson(1, 4)}
    assert evaluation.tables == {
        "by_type": {
            "GSM8K": {"accuracy": wilson(1, 2)},
            "GSM_Rephrased": {"accuracy": wilson(1, 2)},
        }
    }
    assert evaluation.notes["records_left_out"] == {"final answer is no number": 1}
    shown_entries = [(p.get("answer"), p.get("expected")) for p in evaluation.predictions]
    assert shown_entries == [("1000", "1000"), ("6", "5"), ("0", "0"), (None, "1"), (None, None)]
    assert evaluation.predictions[4]["left_out"] == "final answer is no number"
    again = json.loads(json.dumps(evaluation.predictions))
    assert task.score_predictions(again).metrics == evaluation.metrics
    # Paired comparisons of studies read the same outcomes.
    assert question_scores(again)["accuracy"] == {
        "0": (1, 1),
        "1": (0, 1),
        "2": (1, 1),
        "3": (0, 1),
    }


@pytest.fixture
def hub(monkeypatch):
    """The two data sets on the Hub, of a few records each; returns the loaded names."""
    import datasets

    found = {
        ("meta-math/MetaMathQA",): {"train": maths(40)},
        ("openai/gsm8k", "main"): {
            "train": [gsm8k(f"train {i}?", i) for i in range(5)],
            "test": [gsm8k(f"test {i}?", i) for i in range(6)],
        },
    }
    asked = []

    def load_dataset(*name):
        asked.append(name)
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(records) for split, records in found[name].items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("molf.data.records._check_hub", lambda name, option: None)
    return asked


@pytest.mark.parametrize("data", [None, "meta-math/MetaMathQA"])
def test_the_default_data_is_measured_on_gsm8k(hub, data):
    task = load(data)
    assert len(task.training_samples) == 40
    assert task.evaluation_count == 6
    description = task.description()
    assert description["data"] == "meta-math/MetaMathQA"
    assert description["evaluated_on"] == "openai/gsm8k:main"
    assert task.training_samples[3].prompt == (
        "Question: 3: how many pens? Think step by step.\nAnswer:"
    )
    assert task.training_samples[3].completion == " We add both.\nThe answer is: 3"
    assert [sample.prompt for sample in task.evaluated_samples(1)] == [
        "Question: test 0? Think step by step.\nAnswer:"
    ]


def test_evaluation_alone_reads_gsm8k_alone(hub):
    task = evaluated(None, max_samples=3)
    assert (task.training_samples, task.evaluation_count) == ([], 3)
    assert hub == [("openai/gsm8k", "main")]
    shots = evaluated(None, few_shot=2)
    assert shots.evaluated_samples(1)[0].prompt.count("Question: train") == 2


def test_a_validation_part_is_of_the_training_data(hub):
    task = load(None, eval_part="validation")
    assert (len(task.training_samples), task.evaluation_count) == (32, 8)
    again = evaluated(None, eval_part="validation")
    assert again.evaluated_samples(8) == task.evaluated_samples(8)


def test_versions_of_a_question_stay_on_one_side(tmp_path):
    records = [
        metamath(f"{i}, version {version}?", i, original_question=f"{i}  Pens?")
        for i in range(20)
        for version in range(3)
    ]
    write(tmp_path / "folder" / "train.jsonl", records)
    write(tmp_path / "folder" / "test.jsonl", [gsm8k(f"{i} pens?", i) for i in range(15)])
    task = load(tmp_path / "folder", eval_part="validation", validation_share=0.5)
    trained = {sample.prompt.split(",")[0] for sample in task.training_samples}
    measured = {sample.prompt.split(",")[0] for sample in task.evaluated_samples(99)}
    assert (len(trained), task.evaluation_count % 3) == (10, 0)
    assert not trained & measured
    # Questions that the test set has in their original form are in neither part.
    assert measured <= {f"Question: {i}" for i in range(15, 20)}
    held_out = load(write(tmp_path / "all.jsonl", records))
    assert held_out.evaluation_count == 6  # two of 20 questions


def test_long_and_incomplete_records_are_left_out_and_counted(tmp_path):
    longest = metamath("a?", 1, response="b" * (1300 - 3))
    records = [
        longest,
        {**longest, "response": longest["response"] + "b"},
        metamath("b?", 1, response=None),
        {"question": "c?", "answer": "three"},
        {"question": "d?", "answer": f"{'d' * 2000} #### 3"},
        *maths(5),
    ]
    records = load(write(tmp_path / "a.jsonl", records)).data_records()
    assert records.left_out == {
        "over 1,300 characters": 1,
        "no response": 1,
        "no '#### NUMBER' in answer": 1,
    }
    assert records.count == 10
    assert {0, 4} <= records.samples.keys()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"record 1: lacks the field 'query' or 'question' \(it has: text\)"),
        (metamath(" ", 1), "record 1: query must not be empty"),
        (metamath(3, 1), "record 1: query must be a text, not int"),
        (metamath("a?", 1, response=5), "record 1: response must be a text, not int"),
        (metamath("a?", 1, kind=5), "record 1: type must be a text, not int"),
        ({"question": "a?", "answer": 7}, "record 1: answer must be a text, not int"),
    ],
)
def test_wrong_records_are_one_line(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", [maths(1)[0], record])
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_test_set_without_numbers_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [metamath(f"{i}?", "x") for i in range(3)])
    with pytest.raises(InputError, match=r"None of the 3 .* \(final answer is no number: 3\)"):
        evaluated(path).score_predictions(texts("1", "2", "3"))


def test_a_model_that_has_learned_the_solutions_scores_full(tmp_path):
    """Trained on `training_samples`, evaluated by the task: the prompts are the same."""
    model, tokenizer = copy.deepcopy(tiny_qwen2()), byte_level_tokenizer()
    records = [
        metamath(line[:9], number, response=f"The answer is: {number}")
        for line, number in zip(LINES[:3], ("7", "-5", "1/2"), strict=True)
    ]
    path = write(tmp_path / "a.jsonl", [*records, metamath("long " * 100, 3)])
    task = load_task(TaskOptions(name="math", data=path, eval_data=path))
    encoded = encode_samples(tokenizer, task.training_samples, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
            model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    evaluation = task.evaluate(model, tokenizer, EvaluationSettings())
    assert values(evaluation.metrics) == {"accuracy": 1, "unparsed": 0}
    assert task.metric_names()[:-3] == tuple(evaluation.metrics)
    assert evaluation.metrics["accuracy"].count == 3
    assert evaluation.notes["records_left_out"] == {"too long": 1}
    assert evaluation.notes["max_new_tokens"] == 300
    assert [entry.get("answer") for entry in evaluation.predictions] == ["7", "-5", "0.5", None]


def test_the_commands(tmp_path, capsys):
    from checkpoints import write_checkpoint

    model = str(write_checkpoint(tmp_path / "model"))
    train, test = maths(12), [gsm8k(f"test {i}?", i) for i in range(5)]
    data = write(tmp_path / "train.jsonl", train)
    eval_data = write(tmp_path / "test.jsonl", test)
    given = ["--task", "math", "--data", data, "--model", model]
    assert main(["data", *given, "--max_length", "256"]) == 0
    assert "[[ We add both." in capsys.readouterr().out
    run = tmp_path / "run"
    short = ["--max_steps", "2", "--method", "lora", "--ranks", "2", "--output_dir", str(run)]
    assert main(["train", *given, "--eval_data", eval_data, *short]) == 0
    after = json.loads((run / "eval.json").read_text())["after"]
    assert {"accuracy", "unparsed", "forgetting_loss", "kl_neutral", "kl_task"} <= after.keys()
    assert after["accuracy"]["count"] == 5
    scored = ["eval", "--task", "math", "--data", eval_data, "--output_dir"]
    assert main([*scored, str(tmp_path / "model-scores"), str(run / "model")]) == 0
    saved = ["--predictions", str(run / "predictions.jsonl")]
    assert main([*scored, str(tmp_path / "text-scores"), *saved]) == 0
    for name in ("model-scores", "text-scores"):
        metrics = json.loads((tmp_path / name / "eval.json").read_text())["metrics"]
        assert metrics["accuracy"] == after["accuracy"]
