"""`molf eval` on several tasks at once, and what it refuses."""

import json

import pytest

from checkpoints import write_checkpoint
from molf.cli import main
from molf.errors import InputError
from molf.world import BASE_PATH

MED = {
    "question": "Which of these is a vitamin?",
    "opa": "Iron",
    "opb": "Folate",
    "opc": "Zinc",
    "opd": "Salt",
    "cop": 1,
    "subject_name": "Biochemistry",
}
SQL = {
    "sql_prompt": "How many towns are there?",
    "sql_context": "CREATE TABLE town (name TEXT); INSERT INTO town VALUES ('Rome'), ('Paris');",
    "sql": "SELECT count(*) FROM town;",
    "sql_complexity": "aggregation",
}
SHORT = ["--max_samples", "3", "--per_device_eval_batch_size", "8"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Local records in the place of those of the Hub."""
    from molf.tasks import med, sql

    for module, name, record in ((med, "MED", MED), (sql, "SQL", SQL)):
        path = tmp_path / f"{name.lower()}.jsonl"
        records = [
            {**record, key: f"{record[key]} ({i})"} for i in range(4) for key in [*record][:1]
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        kind = getattr(module, name)
        replaced = type(kind)(**{**vars(kind), "default_data": str(path)})
        monkeypatch.setattr(module, name, replaced)
    return tmp_path


@pytest.fixture
def evaluate(data, capsys):
    """Evaluate the shipped base; return what was printed and what was written."""

    def run(*options: str):
        path = data / "evaluation"
        assert main(["eval", str(BASE_PATH), *options, *SHORT, "--output_dir", str(path)]) == 0
        return capsys.readouterr().out, path

    return run


WAYS = [
    ["--task", "demo-fact,sql,med"],
    ["--task", "demo-fact", "--task", "sql", "--task", "med"],
    ["--tasks", "demo-fact,sql", "--tasks", "med"],
    ["--tasks=demo-fact, sql, med"],
]


@pytest.mark.parametrize("tasks", WAYS)
def test_several_tasks_are_given_in_any_way(data, monkeypatch, tasks):
    from molf.cli import evaluation

    given = []

    def stop(model, options):
        given.extend(options.task)
        raise InputError("far enough")

    monkeypatch.setattr(evaluation, "evaluate_checkpoint", stop)
    assert main(["eval", str(BASE_PATH), *tasks, *SHORT]) == 2
    assert given == ["demo-fact", "sql", "med"]


def test_several_tasks(evaluate, monkeypatch):
    from molf.job.model import loading as model_loading

    loads = []
    load = model_loading.load_model
    monkeypatch.setattr(
        model_loading, "load_model", lambda model: loads.append(model) or load(model)
    )
    out, path = evaluate(*WAYS[-1])
    assert loads == [str(BASE_PATH)]
    record = json.loads((path / "eval.json").read_text())
    assert list(record) == ["tasks"]
    assert [entry["task"] for entry in record["tasks"]] == ["demo-fact", "sql", "med"]
    metrics = [entry["metrics"] for entry in record["tasks"]]
    for names, found in zip(
        [{"es", "acc_new"}, {"execution_accuracy", "by_complexity"}, {"accuracy", "by_subject"}],
        metrics,
        strict=True,
    ):
        assert names | {"forgetting_loss"} <= set(found)
    assert out.index("demo-fact") < out.index("execution_accuracy") < out.index("accuracy_logprob")
    for task in ("demo-fact", "sql", "med"):
        lines = (path / f"predictions-{task}.jsonl").read_text().splitlines()
        assert len(lines) == 3
    assert not (path / "predictions.jsonl").exists()


def test_several_tasks_measure_what_one_does(evaluate):
    _, path = evaluate("--task", "demo-fact,sql")
    several = json.loads((path / "eval.json").read_text())["tasks"]
    _, path = evaluate("--task", "sql", "--overwrite")
    one = json.loads((path / "eval.json").read_text())
    assert one == several[1]
    assert (path / "predictions.jsonl").exists()
    assert not list(path.glob("predictions-*"))


def test_predictions_of_one_of_several_can_be_scored_again(evaluate, data):
    _, path = evaluate("--task", "demo-fact,sql")
    predictions = str(path / "predictions-sql.jsonl")
    again = str(data / "again")
    arguments = ["eval", "--task", "sql", "--predictions", predictions, "--output_dir", again]
    assert main([*arguments, *SHORT]) == 0
    metrics = json.loads((data / "again" / "eval.json").read_text())["metrics"]
    before = json.loads((path / "eval.json").read_text())["tasks"][1]["metrics"]
    assert metrics == {name: before[name] for name in metrics}


def test_few_shot(evaluate):
    _, path = evaluate("--task", "sql,med", "--few_shot", "1")
    for task, starts in (("sql", "\nQuestion: How"), ("med", "Question: Which")):
        for line in (path / f"predictions-{task}.jsonl").read_text().splitlines():
            assert json.loads(line)["prompt"].count(starts) == 2


def test_tasks_in_a_recipe(evaluate, data):
    (data / "eval.yaml").write_text("tasks: [demo-fact, med]\nseed: 1\n")
    _, path = evaluate("--config", str(data / "eval.yaml"))
    record = json.loads((path / "eval.json").read_text())
    assert [entry["task"] for entry in record["tasks"]] == ["demo-fact", "med"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--task sql,sql", ["sql comes twice"]),
        ("--task sql,poetry", ["poetry", "demo-fact", "custom"]),
        ("--task sql,", ["--task"]),
        ("--task sql,med --data x.jsonl", ["data=x.jsonl", "sql,med", "one task", "--data FILE"]),
        ("--task sql,custom", ["task=custom", "one task"]),
        ("--task fact --few_shot 1", ["few_shot=1", "task=fact", "sql, med"]),
        ("--task sql,fact --few_shot 1", ["few_shot=1", "task=fact"]),
        ("--task sql --few_shot -1", ["few_shot=-1", "at least 0"]),
        ("--task sql --max_samples 0", ["max_"]),
        ("--task lm-eval:", ["lm-eval:", "Name the task"]),
        ("--task lm-eval:piqa --data x.jsonl", ["data=x.jsonl", "brings its own data"]),
        ("--task lm-eval:piqa --few_shot -1", ["few_shot=-1", "at least 0"]),
        ("--task lm-eval:piqa --format text", ["format=text", "brings its own data"]),
        ("--task lm-eval:piqa --forgetting_data x.txt", ["forgetting_data=x.txt"]),
    ],
)
def test_wrong_tasks(refused, base, arguments, words):
    error = refused("eval", str(base), *arguments.split())
    for word in words:
        assert word in error


def test_a_bidirectional_model_is_refused_before_it_is_measured(tmp_path, facts, capsys):
    causal = write_checkpoint(tmp_path / "causal", "gemma3")
    other = write_checkpoint(tmp_path / "other", "gemma3", use_bidirectional_attention=True)
    places = {"task": "fact", "data": facts, "output_dir": tmp_path / "evaluation"}
    given = [word for name, value in places.items() for word in (f"--{name}", str(value))]
    for models in ((str(other),), (str(causal), "--base", str(other))):
        capsys.readouterr()
        assert main(["eval", *models, *given]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"molf: error: model {other}: in Gemma3ForCausalLM, tokens attend")
        assert not (tmp_path / "evaluation").exists()
    assert main(["eval", str(causal), *given]) == 0


@pytest.mark.parametrize(
    ("tasks", "words"),
    [("sql,med", ["predictions", "2 tasks"]), ("lm-eval:piqa", ["predictions", "lm-eval:piqa"])],
)
def test_predictions_answer_one_task(refused, tasks, words):
    error = refused("eval", "--task", tasks, "--predictions", "p.jsonl")
    for word in words:
        assert word in error


def test_few_shot_of_train(refused, base):
    error = refused("train", "--task", "fact", "--model", str(base), "--few_shot", "2")
    assert "few_shot=2" in error
    assert "task=fact" in error


def saved(path, count=3):
    entries = [{"index": index, "prediction": " SELECT 1;"} for index in range(count)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (["eval.json", "config.yaml"], "it has a config.yaml"),
        (["eval.json", "model/model.safetensors"], "it has a model"),
        (["eval.json", "thesis.tex"], "it holds thesis.tex"),
        (["predictions.jsonl"], "it has no eval.json"),
        (["other/eval.json"], "it has no eval.json"),
    ],
)
def test_overwrite_spares_what_is_more_than_an_evaluation(data, capsys, files, fault):
    """Every run of `molf train` has an eval.json."""
    path = data / "run"
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text('{"task": "sql", "metrics": {}}')
    predictions = saved(data / "saved.jsonl", 4)
    arguments = ["eval", "--task", "sql", "--predictions", predictions, "--overwrite"]
    assert main([*arguments, "--output_dir", str(path)]) == 2
    assert fault in capsys.readouterr().err
    for name in files:
        assert (path / name).read_text() == '{"task": "sql", "metrics": {}}'


def test_a_runs_eval_json_is_not_that_of_an_evaluation(data, capsys):
    (data / "run").mkdir()
    (data / "run" / "eval.json").write_text('{"task": "sql", "before": {}, "after": {}}')
    arguments = ["eval", "--task", "sql", "--predictions", saved(data / "saved.jsonl", 4)]
    assert main([*arguments, "--overwrite", "--output_dir", str(data / "run")]) == 2
    assert "its eval.json is not that of an evaluation" in capsys.readouterr().err


def test_predictions_are_not_overwritten_by_their_own_score(data, capsys):
    arguments = ["eval", "--task", "sql", "--output_dir", str(data / "e"), "--predictions"]
    assert main([*arguments, saved(data / "saved.jsonl", 4)]) == 0
    own = str(data / "e" / "predictions.jsonl")
    assert main([*arguments, own, "--overwrite"]) == 2
    assert f"predictions {own} lies in output_dir" in capsys.readouterr().err


def test_predictions_may_hold_any_character(data, capsys):
    """Only a line feed ends a line of JSON; other separators stand in texts as they are."""
    entries = [{"index": index, "prediction": "a\u2028b\x85c\x0c"} for index in range(4)]
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    (data / "saved.jsonl").write_text("".join(lines), encoding="utf-8")
    arguments = ["eval", "--task", "med", "--predictions", str(data / "saved.jsonl")]
    assert main([*arguments, "--output_dir", str(data / "e")]) == 0
    written = (data / "e" / "predictions.jsonl").read_bytes().decode().split("\n")
    assert json.loads(written[0])["prediction"] == "a\u2028b\x85c\x0c"


def test_saved_texts_need_no_demonstrations(data, capsys):
    """All records are scored, so none could be shown; the texts are there already."""
    arguments = ["eval", "--task", "med", "--few_shot", "1", "--predictions"]
    assert main([*arguments, saved(data / "saved.jsonl", 4)]) == 0
    assert main(["eval", str(BASE_PATH), "--task", "med", "--few_shot", "1"]) == 2
    assert (
        "Evaluated records and those of a validation part are never shown"
        in capsys.readouterr().err
    )
