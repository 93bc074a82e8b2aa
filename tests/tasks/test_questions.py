"""Where the questions of tasks sql and med come from, and what stands in front of them."""

import csv
import json
import warnings

import pyarrow
import pyarrow.parquet
import pytest

from molf.errors import InputError
from molf.tasks import TASKS, TaskOptions, load_task
from molf.tasks.demo import load_demo_questions
from molf.tasks.med import load_med
from molf.tasks.sql import load_sql
from molf.world import build_world, held_out_text
from question_records import SCHEMA, med, meds, sql, texts, write


def load(path, name="med", **options):
    return load_task(TaskOptions(name=name, data=None if path is None else str(path), **options))


def trained(task):
    return [sample.record for sample in task.training_samples]


def evaluated(task):
    return list(task._data.evaluated)


@pytest.fixture
def hub(monkeypatch):
    """Data sets on the Hub, by name; each split has records."""
    import datasets

    found = {}

    def load_dataset(name):
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(records) for split, records in found[name].items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return found


def test_the_tasks_are_there():
    assert {"sql", "med"} <= set(TASKS)


def test_med_is_the_hubs_and_evaluated_on_validation_for_the_test_split_is_unlabelled(hub):
    test = [med("a", -1)] * 3
    hub["openlifescienceai/medmcqa"] = {"train": meds(8), "validation": meds(5, "v"), "test": test}
    task = load(None)
    assert (trained(task), evaluated(task)) == (list(range(8)), list(range(5)))
    assert task.description()["evaluated_on"] == (
        "the validation split of openlifescienceai/medmcqa"
    )
    task = load(None, evaluation_only=True, max_samples=3)
    assert (trained(task), len(evaluated(task))) == ([], 3)
    hub["someone/tests-only"] = {"train": meds(8), "test": test}
    with pytest.raises(InputError, match=r"none of the 3 records can be used \(unlabelled: 3\)"):
        load("someone/tests-only")


def test_sql_is_the_hubs_and_evaluated_on_test(hub):
    records = [sql(f"{i}?", f"SELECT {i}") for i in range(9)]
    hub["gretelai/synthetic_text_to_sql"] = {"train": records, "test": records[:4]}
    task = load(None, "sql", max_samples=5, max_eval_samples=2)
    assert (len(trained(task)), len(evaluated(task))) == (5, 2)
    assert trained(task) == trained(load(None, "sql", max_samples=5))
    assert trained(task) != trained(load(None, "sql", max_samples=5, seed=1))


def test_without_an_official_split_a_share_is_held_out(tmp_path):
    path = write(tmp_path / "a.jsonl", meds(40))
    task = load(path)
    assert len(evaluated(task)) == 4
    assert sorted(trained(task) + evaluated(task)) == list(range(40))
    assert evaluated(load(path, evaluation_only=True)) == list(range(40))
    other = write(tmp_path / "b.jsonl", meds(3))
    task = load(path, eval_data=other)
    assert (len(trained(task)), evaluated(task)) == (40, [0, 1, 2])
    task = load_task(TaskOptions(name="med", eval_data=other, evaluation_only=True))
    assert evaluated(task) == [0, 1, 2]
    with pytest.raises(InputError, match="none is left to evaluate on"):
        load(write(tmp_path / "c.jsonl", meds(1)))


def test_every_kind_of_file_gives_the_same_questions(tmp_path):
    records = [med('Is it "A", or B;\nnot C?', 3), *meds(3)]
    write(tmp_path / "a.jsonl", records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    expected = load(tmp_path / "a.jsonl", evaluation_only=True)._data.evaluation
    for kind in ("json", "parquet", "csv"):
        task = load(tmp_path / f"a.{kind}", evaluation_only=True)
        assert task._data.evaluation == expected
    write(tmp_path / "folder" / "validation.jsonl", records)
    (tmp_path / "a.csv").rename(tmp_path / "folder" / "train.csv")
    task = load(tmp_path / "folder")
    assert (trained(task), evaluated(task)) == ([0, 1, 2, 3], [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("med", med("  "), "record 1: question must not be empty"),
        ("med", med(None), "record 1: lacks the field 'question'"),
        ("med", med(5), "question must be a text, not int"),
        ("med", med("a", "x"), "cop must be a whole number, not 'x'"),
        ("med", med("a", 1.5), "cop must be a whole number, not 1.5"),
        ("med", med("a", True), "cop must be a whole number, not True"),
        ("med", med("a", [0]), r"cop must be a whole number, not \[0\]"),
        ("med", med("a", opb=7), "opb must be a text, not int"),
        ("med", med("a", subject=7), "subject_name must be a text, not int"),
        ("sql", sql(" ", "SELECT 1"), "sql_prompt must not be empty"),
        ("sql", sql("a", 1), "record 1: sql must be a text, not int"),
        ("sql", sql("a", "SELECT 1", sql_context=["x"]), "sql_context must be a text, not list"),
        ("sql", sql("a", "SELECT 1", complexity=2), "sql_complexity must be a text, not int"),
    ],
)
def test_a_wrong_record_is_one_clear_line(tmp_path, name, wrong, message):
    good = med("a") if name == "med" else sql("a", "SELECT 1")
    path = write(tmp_path / "a.jsonl", [good, wrong])
    for only in (False, True):
        with pytest.raises(InputError, match=message) as error:
            load(path, name, evaluation_only=only)
        assert "record 1" in str(error.value)
        assert "\n" not in str(error.value)


def test_data_of_another_task_is_one_clear_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "opa": "b"}])
    with pytest.raises(InputError, match=r"no record has the field 'opb' \(record 0 has: quest"):
        load(path)
    with pytest.raises(InputError, match=r"record 0: lacks the field 'sql_prompt' \(it has: quest"):
        load(path, "sql")
    write(tmp_path / "d" / "test.jsonl", meds(3))
    with pytest.raises(InputError, match=r"no training records \(only test\)"):
        load(tmp_path / "d")


@pytest.mark.filterwarnings("ignore:cop is sometimes above 3")
def test_unusable_records_are_counted_by_reason_and_left_out(tmp_path):
    records = [
        med("a", 1),
        med("b", opc=" "),
        med("c", opd=None),
        med("d", -1),
        med("e", None),
        med("f", 4),
        med("g", "3"),
        med("h", 2.0),
    ]
    task = load(write(tmp_path / "a.jsonl", records), evaluation_only=True)
    assert evaluated(task) == [0, 6, 7]
    assert [task._question(index).answer for index in (0, 6, 7)] == [" B", " D", " C"]
    reasons = {"missing option": 2, "unlabelled": 2, "cop outside 0 to 3": 1}
    assert task.description()["evaluation_records_left_out"] == reasons
    predictions = [{"index": index, "prediction": "B"} for index in (7, 0, 6, 3)]
    evaluation = task.score_predictions(predictions)
    assert evaluation.metrics["accuracy"].count == 3
    assert evaluation.notes["records_left_out"] == reasons

    records = [sql("a", "SELECT 1"), sql("b", None), sql("c", ""), sql("d", "x", sql_context=None)]
    task = load(
        write(tmp_path / "b.jsonl", records),
        "sql",
        max_samples=1,
        eval_data=str(tmp_path / "b.jsonl"),
    )
    assert (trained(task), evaluated(task)) == ([0], [0])
    assert task.description()["training_records_left_out"] == {"no query": 2, "no schema": 1}


def test_answers_that_seem_to_count_from_one_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="count from 1"):
        load(write(tmp_path / "a.jsonl", [med("a", cop) for cop in (1, 2, 3, 4)]))


def prompts(task):
    return [task._sample(task._question(i), i).prompt for i in task._data.evaluated]


def test_prompts_are_pinned(tmp_path):
    """A change of these texts is a new `prompt_version`."""
    task = load(write(tmp_path / "a.jsonl", [med(" Which? ", 2)]), evaluation_only=True)
    assert prompts(task) == ["Question: Which?\nA. Rome\nB. Paris\nC. London\nD. Lisbon\nAnswer:"]
    assert task._question(0).answer == " C"
    path = write(tmp_path / "b.jsonl", [sql("How many?", " SELECT 1\n \n;\n")] * 2)
    task = load(path, "sql", eval_data=path)
    expected = (
        "Write an SQLite query that answers the question.\n\n"
        f"Question: How many?\nTables: {SCHEMA}\nSQL:"
    )
    assert prompts(task) == [expected] * 2
    assert [(s.prompt, s.completion) for s in task.training_samples] == [
        (expected, " SELECT 1\n;")  # a blank line would end it
    ] * 2
    assert (
        task.prompt_version,
        load_med(
            TaskOptions(name="med", data=str(tmp_path / "a.jsonl"), evaluation_only=True)
        ).prompt_version,
    ) == (1, 1)


def test_demonstrations_are_answered_training_records(tmp_path):
    write(tmp_path / "d" / "train.jsonl", [*meds(6), med("0: Which town?", 3)])
    write(tmp_path / "d" / "validation.jsonl", [*meds(2), med("new", 1)])
    for only in (False, True):
        task = load(tmp_path / "d", few_shot=3, evaluation_only=only)
        for prompt, asked in zip(
            prompts(task), ("0: which town?", "1: which town?", "new"), strict=True
        ):
            *shown, last = prompt.split("\n\n")
            assert len(shown) == 3
            assert last.startswith(f"Question: {asked}\nA. Rome")
            assert last.endswith("\nAnswer:")
            # The same question in other letters does not show its answer either.
            assert not any(asked in block.lower() for block in shown)
            letters = {f"{i}: which town?": "ABCD"[i % 4] for i in range(6)}
            for block in shown:
                question = block.split("\n")[0].removeprefix("Question: ").lower()
                letter = block[-1]
                assert block.endswith(f"\nAnswer: {letter}")
                assert letter in {
                    letters[question],
                    "D" if question.startswith("0") else letters[question],
                }
        assert task.description()["few_shot"] == 3
    # Trained on are the same kind of prompts.
    training = load(tmp_path / "d", few_shot=3).training_samples
    assert all(sample.prompt.count("Answer:") == 4 for sample in training)
    assert not any(
        sample.prompt.count(f"{i}: which town?") > 1 for i, sample in enumerate(training[:6])
    )
    assert prompts(load(tmp_path / "d", few_shot=3)) == prompts(
        load(tmp_path / "d", few_shot=3, max_samples=2)
    )
    assert prompts(load(tmp_path / "d", few_shot=3)) != prompts(
        load(tmp_path / "d", few_shot=3, seed=1)
    )


def test_one_file_shows_its_other_records(tmp_path):
    """Demonstrations answer what is asked elsewhere, so none of them is of an evaluated record."""
    path = write(tmp_path / "a.jsonl", [*meds(8), *meds(8)])
    task = load(path, few_shot=2, max_samples=3, evaluation_only=True)
    asked = {f"{index % 8}: which" for index in evaluated(task)}
    for prompt in prompts(task):
        *shown, last = prompt.split("\n\n")
        assert len(shown) == 2
        assert any(question in last for question in asked)
        assert not any(question in block for question in asked for block in shown)
    with pytest.raises(InputError, match=r"there are 0\. Evaluated records and"):
        load(path, few_shot=2, evaluation_only=True)
    path = write(tmp_path / "b.jsonl", meds(30))
    task = load(path, few_shot=2)
    held_out = {f"{index}: which town?" for index in evaluated(task)}
    for sample in task.training_samples:
        assert not any(f"Question: {question}" in sample.prompt for question in held_out)


def test_the_instruction_comes_once(tmp_path):
    path = write(tmp_path / "a.jsonl", [sql(f"{i}?", f"SELECT {i};") for i in range(3)])
    for prompt in prompts(load(path, "sql", few_shot=2, max_samples=1, evaluation_only=True)):
        assert prompt.count("Write an SQLite query") == 1
        assert prompt.count("\nSQL: SELECT") == 2


def test_too_few_demonstrations_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", meds(3))
    with pytest.raises(InputError, match=r"few_shot=3 needs as many .* but there are 2"):
        load(path, few_shot=3, max_samples=1, evaluation_only=True)
    load(path, few_shot=2, max_samples=1, evaluation_only=True)
    with pytest.raises(InputError, match="few_shot=-1"):
        load(path, few_shot=-1)
    with pytest.raises(InputError, match="few_shot=1 with task=custom"):
        load(path, "custom", few_shot=1)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([], "no predictions"),
        (texts("A"), "lack record 1 and 3 more of the 5"),
        (texts("A", "B", "C", "D"), "lack record 4 of the 5"),
        (texts(*"ABCDAB"), "unknown index 5"),
        ([{"index": i + 1, "prediction": "A"} for i in range(5)], "unknown index 5"),
        (texts("A", "B", None), "must be a text, not NoneType"),
    ],
)
@pytest.mark.parametrize("name", ["med", "sql"])
def test_wrong_predictions_are_refused(tmp_path, name, predictions, message):
    records = meds(5) if name == "med" else [sql(f"{i}?", f"SELECT {i}") for i in range(5)]
    task = load(write(tmp_path / "a.jsonl", records), name, evaluation_only=True)
    with pytest.raises(InputError, match=message):
        task.score_predictions(predictions)


def test_a_demo_reports_its_nearest_training_answer():
    """Registering a demo task is one line: its records are a function of the world."""
    moved = ["Paris", "Rome", "London", "Lisbon"]

    def med_records(world):
        assert world.entities
        return {
            "train": [med("The capital of Italy?", 0), med("The capital of France?", 1)],
            "validation": [
                med("What is the capital of Italy?", 1, options=moved, subject="a"),
                med("What is the capital of Spain?", 2, subject="b"),
            ],
        }

    options = TaskOptions(name="demo-med", evaluation_only=True)
    task = load_demo_questions(options, load_med, med_records)
    evaluation = task.score_predictions(texts("A", "C"))
    assert evaluation.metrics["accuracy"].value == 0.5
    # Rome is known as Italy's, wherever it stands; Spain's would be either one's.
    baseline = evaluation.tables["baselines"]["nearest_training_answer"]
    assert (baseline["accuracy"].value, baseline["accuracy"].count) == (0.5, 2)
    assert task.default_forgetting_text() == held_out_text(build_world())

    def sql_records(world):
        return {
            "train": [sql("How many towns?", "SELECT count(*) FROM town"), sql("x", "SELECT 5")],
            "test": [sql("How many towns are there?", "SELECT count(name) FROM town")],
        }

    options = TaskOptions(name="demo-sql")
    task = load_demo_questions(options, load_sql, sql_records)
    assert len(task.training_samples) == 2
    evaluation = task.score_predictions(texts("SELECT 7"))
    assert evaluation.metrics["execution_accuracy"].value == 0
    baseline = evaluation.tables["baselines"]["nearest_training_answer"]
    assert baseline["execution_accuracy"].value == 1
    assert baseline["exact_match"].value == 0
    with pytest.raises(InputError, match="brings its own data"):
        load_demo_questions(TaskOptions(name="demo-sql", data="x"), load_sql, sql_records)


@pytest.mark.parametrize("task", ["med", "sql"])
def test_equal_questions_are_trained_on_or_evaluated(tmp_path, task):
    records = meds(20) if task == "med" else [sql(f"{i}?", f"SELECT {i};") for i in range(20)]
    found = load(write(tmp_path / "a.jsonl", [*records, *records]), task)
    held_out = evaluated(found)
    trained = {sample.record for sample in found.training_samples}
    assert {index % 20 for index in held_out}.isdisjoint(index % 20 for index in trained)
    assert sorted({*held_out, *trained}) == list(range(40))
    assert len(held_out) == 4
    with pytest.raises(InputError, match="2 records of one content, and none is left"):
        load(write(tmp_path / "b.jsonl", records[:1] * 2), task)


@pytest.mark.parametrize("of_run", [{"max_samples": 20}, {"max_eval_samples": 3}])
def test_predictions_of_a_run_are_scored_with_as_many_samples(tmp_path, of_run):
    """`molf eval` has one `--max_samples`; runs have two options that it may repeat."""
    path = write(tmp_path / "a.jsonl", meds(40))
    run = load(path, seed=3, **of_run)
    saved = [{"index": index, "prediction": "A"} for index in evaluated(run)]
    (most,) = of_run.values()
    found = load(path, seed=3, max_samples=most, evaluation_only=True).score_predictions(saved)
    assert found.metrics["accuracy"].count == len(saved)


def test_predictions_of_a_run_on_the_official_split(tmp_path):
    """`--max_samples` of a run bounds what it was trained on."""
    write(tmp_path / "d" / "train.jsonl", meds(30))
    write(tmp_path / "d" / "validation.jsonl", meds(8, "v"))
    run = load(tmp_path / "d", max_samples=4)
    saved = [{"index": index, "prediction": "A"} for index in evaluated(run)]
    task = load(tmp_path / "d", max_samples=4, evaluation_only=True)
    assert task.score_predictions(saved).metrics["accuracy"].count == 8


def test_predictions_of_other_data_are_refused(tmp_path):
    task = load(write(tmp_path / "a.jsonl", meds(3)), evaluation_only=True)
    saved = [{"index": i, "prediction": "A", "expected": "ABC"[i]} for i in range(3)]
    assert task.score_predictions(saved).metrics["accuracy"].count == 3
    saved[1]["prompt"] = "Shown before.\n\n" + task._question(1).prompt + " and after"
    assert task.score_predictions(saved).metrics["accuracy"].count == 3
    with pytest.raises(InputError, match=r"Prediction 2 .* record 2 has the expected 'C', and not"):
        task.score_predictions([*saved[:2], {**saved[2], "expected": "D"}])
    with pytest.raises(InputError, match=r"Prediction 1 .* record 1 has the prompt"):
        task.score_predictions([saved[0], {**saved[1], "prompt": "Question: other"}, saved[2]])


def test_right_options_that_count_from_one_are_seen_in_either_data(tmp_path):
    zero = write(tmp_path / "zero.jsonl", meds(12))
    one = write(tmp_path / "one.jsonl", [{**r, "cop": r["cop"] + 1} for r in meds(12)])
    for data, other in ((one, zero), (zero, one)):
        with pytest.warns(UserWarning, match="it seems to count from 1"):
            load(data, eval_data=other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(zero, eval_data=zero)
