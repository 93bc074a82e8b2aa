"""The validation part: fixed, and never among the records that are trained or tested."""

import json
from dataclasses import replace

import pytest

from molf.errors import InputError
from molf.tasks import TaskOptions, load_task
from molf.tasks.med import with_wrong_answers
from molf.tasks.med_questions import MedQuestion
from molf.tasks.validation import records_with_validation, with_validation
from molf.world import (
    build_world,
    counterfact_records,
    counterfact_validation_records,
    sql_groups,
)
from question_records import maths, med, meds, sql, write
from shared_data import SHARED, needs_shared


def load(name, data=None, **options):
    path = None if data is None else str(data)
    return load_task(TaskOptions(name=name, data=path, **options))


def trained(task):
    """The contents of the records that a task trains."""
    return {sample.content for sample in task.training_samples}


def measured(task):
    """The contents of the records that a task measures, as it would ask the model for them."""
    if task.name.endswith("fact"):
        requests = [task._evaluation[index] for index in measures(task)]
        return {(request.prompt, f" {request.target_new}") for request in requests}
    if task.name == "custom":
        return {task._data.samples[i].content for i in measures(task)}
    questions = [task._data.evaluation.questions[i] for i in measures(task)]
    return {task._sample(question, 0).content for question in questions}


def measures(task):
    return list(task._evaluated if hasattr(task, "_evaluated") else task._data.evaluated)


def facts(count, tag=""):
    return [
        {
            "requested_rewrite": {
                "prompt": "{} lives in",
                "subject": f"{tag}Anna {i}",
                "target_new": {"str": "Rome"},
                "target_true": {"str": "Paris"},
            },
            "paraphrase_prompts": [],
            "neighborhood_prompts": [],
        }
        for i in range(count)
    ]


def pairs(count, tag=""):
    return [{"prompt": f"{tag}{i}: what?", "completion": f" It is {i}."} for i in range(count)]


def sqls(count, tag=""):
    return [sql(f"{tag}{i}?", f"SELECT {i}") for i in range(count)]


RECORDS = {"med": meds, "sql": sqls, "math": maths, "custom": pairs}


@pytest.fixture
def folder(tmp_path):
    """A folder with training and test records of a task."""

    def make(name, count=40):
        write(tmp_path / name / "train.jsonl", RECORDS[name](count))
        write(tmp_path / name / "test.jsonl", RECORDS[name](9, "t"))
        return tmp_path / name

    return make


DEMOS = ("demo-fact", "demo-sql", "demo-forms", "demo-med")


@pytest.mark.parametrize("name", [*RECORDS, *DEMOS])
def test_validation_measures_records_that_no_test_run_measures(name, folder):
    data = folder(name) if name in RECORDS else None
    test, validation = (load(name, data, eval_part=part) for part in ("test", "validation"))
    assert not measured(validation) & measured(test)
    assert measured(validation)
    if name != "demo-fact":  # which measures the requests that it trains
        assert not measured(validation) & trained(validation)
        assert measured(validation) <= trained(test)
        assert trained(validation) < trained(test)
    assert validation.description()["eval_part"] == "validation"


@pytest.mark.parametrize("name", [*RECORDS, *DEMOS])
def test_the_part_is_the_same_for_all_seeds(name, folder):
    data = folder(name) if name in RECORDS else None
    first, second = (load(name, data, eval_part="validation", seed=seed) for seed in (1, 2))
    assert measured(first) == measured(second)
    assert trained(first) == trained(second)
    few = load(name, data, eval_part="validation", seed=1, max_samples=8, max_eval_samples=2)
    assert len(trained(few)) == 8
    assert len(measured(few)) == 2
    assert measured(few) <= measured(first)
    assert trained(few) <= trained(first)


@pytest.mark.parametrize("name", RECORDS)
def test_an_evaluation_measures_the_same_part(name, folder):
    data = folder(name)
    run = load(name, data, eval_part="validation", validation_share=0.3)
    again = load(name, data, eval_part="validation", validation_share=0.3, evaluation_only=True)
    assert measures(again) == measures(run)
    assert len(measures(run)) == 12
    assert trained(again) == set()


@pytest.mark.parametrize("name", RECORDS)
def test_a_file_without_test_records_is_refused(name, tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS[name](40))
    with pytest.raises(InputError, match="its test records are held out by the seed"):
        load(name, path, eval_part="validation")
    other = write(tmp_path / "b.jsonl", RECORDS[name](8, "t"))
    validation = load(name, path, eval_data=other, eval_part="validation")
    assert len(measured(validation)) == 8
    assert not measured(validation) & measured(load(name, path, eval_data=other))


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_are_also_test_records_are_not_in_the_part(name, tmp_path):
    records = RECORDS[name](40)
    path = write(tmp_path / "a.jsonl", records)
    other = write(tmp_path / "b.jsonl", RECORDS[name](8, "t"))
    every = measured(load(name, path, eval_data=other, eval_part="validation"))
    some = write(tmp_path / "c.jsonl", records[:20])
    left = load(name, path, eval_data=some, eval_part="validation")
    assert measured(left) == every - measured(load(name, path, eval_data=some))
    with pytest.raises(InputError, match="none is left in the validation part"):
        load(name, path, eval_data=path, eval_part="validation")


@pytest.mark.parametrize("name", RECORDS)
def test_equal_records_are_on_one_side(name, tmp_path):
    data = tmp_path / name
    write(data / "train.jsonl", RECORDS[name](20) * 3)
    write(data / "test.jsonl", RECORDS[name](9, "t"))
    task = load(name, data, eval_part="validation", validation_share=0.5)
    assert not measured(task) & trained(task)
    assert len(measures(task)) == 30


def test_too_few_records_are_refused(tmp_path):
    data = tmp_path / "med"
    write(data / "train.jsonl", meds(1))
    write(data / "test.jsonl", meds(9, "t"))
    with pytest.raises(InputError, match="of 1 records, none is left to train on"):
        load("med", data, eval_part="validation")


def test_demonstrations_are_not_from_the_part(folder):
    data = folder("med")
    task = load("med", data, eval_part="validation", few_shot=30)
    questions = [task._data.evaluation.questions[i] for i in measures(task)]
    assert not any(q.prompt in sample.prompt for q in questions for sample in task.training_samples)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_demonstrations_are_not_from_a_part_that_is_set_aside(folder, noise):
    options = {"few_shot": 12, "validation_share": 0.3, "label_noise": noise}
    whole = load("med", folder("med"), **options)
    given = TaskOptions(name="med", data=str(folder("med")), **options)
    task = with_validation(whole, given, load_task)
    asked = [sample.prompt.split("\n\n")[-1] for sample in task.validation_samples]
    samples = [*task.training_samples, *task.validation_samples, *task.evaluated_samples(99)]
    assert asked
    for sample in samples:
        *shown, _ = sample.prompt.split("\n\n")
        assert len(shown) == 12
        assert not any(block.startswith(question) for question in asked for block in shown)
    records = records_with_validation(whole, given, load_task)
    assert [records.samples[index] for index in records.trained_on] == task.training_samples
    # Without the option, some of them would have been shown.
    assert any(question in x.prompt for question in asked for x in whole.training_samples[:1])
    many = load("med", folder("med"), **{**options, "few_shot": len(whole.training_samples) - 1})
    with pytest.raises(InputError, match=r"few_shot=\d+ needs as many .* of a validation part"):
        with_validation(many, given, load_task)


def test_trained_requests_that_are_measured_are_not_set_aside():
    """`demo-fact` measures a part of the requests that it trains on."""
    given = TaskOptions(name="demo-fact", max_eval_samples=50)
    whole = load_task(given)
    task = with_validation(whole, given, load_task)
    trained, part = (
        {x.content for x in s} for s in (task.training_samples, task.validation_samples)
    )
    measured = {sample.content for sample in whole.evaluated_samples(whole.evaluation_count)}
    assert len(measured) == 50
    assert measured <= trained
    assert part
    assert not part & trained
    assert len(trained | part) == len(whole.training_samples)
    shown = records_with_validation(whole, given, load_task)
    assert (len(shown.trained_on), len(shown.validated_on)) == (len(trained), len(part))


@pytest.mark.parametrize("name", ["med", "custom"])
def test_validation_data_is_measured_in_place_of_a_part(tmp_path, folder, name):
    data = folder(name)
    whole = load(name, data)
    lines = [*RECORDS[name](6, "v"), *RECORDS[name](3), *RECORDS[name](2, "t")]
    write(tmp_path / "own.jsonl", lines)
    given = TaskOptions(name=name, data=str(data), validation_data=str(tmp_path / "own.jsonl"))
    with pytest.warns(UserWarning, match=r"own.jsonl: 5 of 11 records are also trained on, or"):
        task = with_validation(whole, given, load_task)
    assert [sample.record for sample in task.validation_samples] == list(range(6))
    assert list(task.training_samples) == list(whole.training_samples)
    assert whole.validation_samples == []
    given = replace(given, max_eval_samples=2)
    with pytest.warns(UserWarning, match="5 of 11"):
        assert len(with_validation(whole, given, load_task).validation_samples) == 2
    with pytest.warns(UserWarning, match="5 of 11"):
        shown = records_with_validation(whole, given, load_task)
    assert (len(shown.trained_on), len(shown.validated_on)) == (40, 0)
    gone = replace(given, validation_data=str(tmp_path / "gone.jsonl"))
    with pytest.raises(InputError, match=r"^validation_data: file not found"):
        with_validation(whole, gone, load_task)
    weighted = replace(given, validation_data=f"{tmp_path / 'own.jsonl'}:2")
    with pytest.raises(InputError, match=r"^validation_data: .*own.jsonl has the weight 2\."):
        with_validation(whole, weighted, load_task)
    write(tmp_path / "own.jsonl", RECORDS[name](3))
    with pytest.raises(InputError, match=r"own.jsonl: 3 of 3 records are also .*Give others"):
        with_validation(whole, given, load_task)


@pytest.mark.parametrize("name", ["med", "sql", "custom"])
def test_validation_data_with_several_splits_is_not_measured_on_the_test_records(tmp_path, name):
    write(tmp_path / "own.jsonl", RECORDS[name](30, "own"))
    splits = tmp_path / "splits"
    splits.mkdir()
    for split, count in (("train", 9), ("validation", 4), ("test", 5)):
        write(splits / f"{split}.jsonl", RECORDS[name](count, split))
    given = TaskOptions(name=name, data=str(tmp_path / "own.jsonl"), validation_data=str(splits))
    assert len(with_validation(load_task(given), given, load_task).validation_samples) == 4
    if name != "med":  # whose test split has no labels at its source
        evaluated = replace(given, eval_data=str(splits))
        assert load_task(evaluated).evaluation_count == 5
        assert (
            len(with_validation(load_task(evaluated), evaluated, load_task).validation_samples) == 4
        )
    (splits / "validation.jsonl").unlink()
    assert len(with_validation(load_task(given), given, load_task).validation_samples) == 5


def test_questions_that_are_trained_with_wrong_answers_are_not_validation_data(tmp_path, folder):
    data = folder("med")
    given = TaskOptions(
        name="med",
        data=str(data),
        validation_data=str(tmp_path / "own.jsonl"),
        label_noise=0.9,
    )
    write(tmp_path / "own.jsonl", [*RECORDS["med"](6, "v"), *RECORDS["med"](3)])
    with pytest.warns(UserWarning, match=r"own.jsonl: 3 of 9 records are also trained on, or"):
        with_validation(load_task(given), given, load_task)


def test_demo_sql_validates_on_other_pairs_of_table_and_form():
    task = load("demo-sql", eval_part="validation", validation_share=0.3)
    groups = sql_groups(build_world())
    records = [sample.record for sample in task.training_samples]
    assert not {groups[i] for i in measures(task)} & {groups[i] for i in records}
    assert len(measures(task)) + len(records) == len(groups)


def test_demo_fact_validates_on_other_facts():
    world = build_world()
    test, validation = counterfact_records(world), counterfact_validation_records(world)
    assert len(validation) == len(test) == 200
    assert not {r["pararel_idx"] for r in test} & {r["pararel_idx"] for r in validation}
    every = counterfact_validation_records(world, count=1052)
    assert len({record["pararel_idx"] for record in every}) == 1052
    with pytest.raises(InputError, match=r"Must be in 0\.\.1052"):
        counterfact_validation_records(world, count=1053)


def test_facts_need_a_share_that_both_parts_set_aside(tmp_path):
    path = write(tmp_path / "a.jsonl", facts(30))
    with pytest.raises(InputError, match="Give the same validation_share"):
        load("fact", path, eval_part="validation")
    plain, test, validation = (
        load("fact", path, **options)
        for options in (
            {},
            {"validation_share": 0.3},
            {"validation_share": 0.3, "eval_part": "validation"},
        )
    )
    assert measured(plain) == measured(test) | measured(validation)
    assert not measured(test) & measured(validation)
    assert (len(measured(test)), len(measured(validation))) == (21, 9)
    for task in (test, validation):
        assert trained(task) == measured(task)
    assert len(validation.data_records().held_out) == 21
    again = load(
        "fact", path, validation_share=0.3, eval_part="validation", seed=7, evaluation_only=True
    )
    assert measured(again) == measured(validation)


def test_facts_with_other_requests_to_measure_validate_on_held_out_requests(tmp_path):
    path = write(tmp_path / "a.jsonl", facts(30))
    other = write(tmp_path / "b.jsonl", facts(30)[:10] + facts(5, "t"))
    test, validation = (
        load("fact", path, eval_data=other, eval_part=part, validation_share=0.5)
        for part in ("test", "validation")
    )
    assert len(trained(test)) == 30
    assert not measured(validation) & (trained(validation) | measured(test))
    assert measured(validation) <= trained(test)
    share = {"eval_data": other, "eval_part": "validation", "validation_share": 0.5}
    few = load("fact", path, **share, max_samples=3, evaluation_only=True)
    assert len(measured(few)) == 3
    assert measured(few) < measured(validation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_part": "train"}, "Invalid eval_part='train'. Must be one of test, validation."),
        ({"validation_share": 0.0}, "Invalid validation_share=0.0. Must be above 0 and below 1."),
        ({"validation_share": 1.0}, "Invalid validation_share=1.0. Must be above 0 and below 1."),
        ({"validation_share": float("nan")}, "Invalid validation_share=nan."),
        ({"label_noise": -0.1}, r"Invalid label_noise=-0.1. Must be in \[0, 1\)."),
        ({"label_noise": 1.0}, r"Invalid label_noise=1.0. Must be in \[0, 1\)."),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TaskOptions(name="med", **options)


def test_options_of_other_tasks_are_refused():
    with pytest.raises(InputError, match="wrong answers are for demo-med, med"):
        load("demo-sql", label_noise=0.3)
    with pytest.raises(InputError, match="its validation part has 200 other facts"):
        load("demo-fact", validation_share=0.3)


def test_label_noise_makes_a_share_of_the_training_answers_wrong():
    clean = load("demo-med", max_samples=100, seed=3)
    noisy = load("demo-med", max_samples=100, seed=3, label_noise=0.3)
    wrong = [
        (a.completion, b.completion)
        for a, b in zip(clean.training_samples, noisy.training_samples, strict=True)
        if a != b
    ]
    assert len(wrong) == 30
    assert all(a != b for a, b in wrong)
    assert [a.prompt for a in clean.training_samples] == [b.prompt for b in noisy.training_samples]
    assert measured(clean) == measured(noisy)
    again = load("demo-med", max_samples=100, seed=3, label_noise=0.3)
    assert trained(again) == trained(noisy)
    other = load("demo-med", max_samples=100, seed=4, label_noise=0.3)
    assert trained(other) != trained(noisy)
    assert noisy.description()["label_noise"] == "0.3"
    shown = noisy.data_records()
    assert all(shown.samples[s.record].content == s.content for s in noisy.training_samples)


def test_wrong_answers_are_all_three_others():
    question = MedQuestion(question="?", group="g", options=("a", "b", "c", "d"), right=2)
    noisy = with_wrong_answers(dict.fromkeys(range(60), question), 1.0, 0)
    assert {each.right for each in noisy.values()} == {0, 1, 3}


def test_the_part_of_validation_has_right_answers():
    clean, noisy = (
        load("demo-med", eval_part="validation", label_noise=noise) for noise in (0.0, 0.5)
    )
    assert measured(clean) == measured(noisy)
    assert trained(clean) != trained(noisy)


@needs_shared
def test_counterfact_has_parts():
    options = {"validation_share": 1 / 3, "max_samples": 64}
    data = SHARED / "counterfact.jsonl"
    test, other, validation = (
        load("fact", data, **options, **each)
        for each in ({"seed": 1}, {"seed": 2}, {"eval_part": "validation", "seed": 1})
    )
    assert len(measured(validation)) == 64
    assert not measured(validation) & (measured(test) | measured(other))


def test_records_are_lines_of_the_file(tmp_path):
    data = tmp_path / "med"
    records = [med("x"), med("y", -1), *meds(20)]
    write(data / "train.jsonl", records)
    write(data / "test.jsonl", meds(9, "t"))
    task = load("med", data, eval_part="validation")
    lines = (data / "train.jsonl").read_text().splitlines()
    for index in measures(task):
        assert task._question(index).question == json.loads(lines[index])["question"]
