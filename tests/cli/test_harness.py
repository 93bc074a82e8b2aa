"""`molf eval --tasks lm-eval:NAME`: what is handed over, and what becomes of what comes back."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from molf.cli import main
from molf.world import BASE_PATH

INSTALLED = importlib.util.find_spec("lm_eval") is not None

# The parts of lm-evaluation-harness 0.4 that molf calls, answering with what they were given.
STUB = {
    "lm_eval/__init__.py": """
        calls = []
        def simple_evaluate(**given):
            calls.append(given)
            (name,) = given["tasks"]
            rows = {
                "plain": {"alias": "plain", "acc,none": 0.5, "acc_stderr,none": 0.1,
                          "f1,none": 0.25, "f1_stderr,none": "N/A",
                          "exact_match,strict-match": 1.0, "exact_match_stderr,strict-match": 0.0},
                "a": {"alias": " - a", "acc,none": 0.25, "acc_stderr,none": 0.05},
                "b": {"alias": " - b", "acc,none": 0.75, "acc_stderr,none": 0.05},
                "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": 0.04},
                "hollow": {"alias": "hollow", " ": " "},
            }
            chosen = {"plain": ["plain"], "group": ["group", "a", "b"], "tag": ["a", "b"],
                      "hollow": ["hollow", "a", "b"], "nothing": ["hollow"]}[name]
            return {
                "results": {row: rows[row] for row in chosen},
                "n-samples": {row: {"original": 90, "effective": 40}
                              for row in chosen if row not in ("group", "hollow")},
                "group_subtasks": {"group": ["a", "b"], "hollow": ["a", "b"]},
                "versions": {"plain": 2.0},
                "n-shot": {"plain": 0 if given["num_fewshot"] is None else given["num_fewshot"]},
            }
        """,
    "lm_eval/tasks.py": """
        class TaskManager:
            all_tasks = ["plain", "group", "tag", "hollow", "nothing", "missing"]
        def get_task_dict(names, manager):
            if names == ["missing"]:
                raise FileNotFoundError("Couldn't find the data set\\nat all")
        """,
    "lm_eval/models/__init__.py": "",
    "lm_eval/models/huggingface.py": """
        class HFLM:
            def __init__(self, **given):
                self.given = given
        """,
    "lm_eval-0.4.99.dist-info/METADATA": """
        Metadata-Version: 2.1
        Name: lm_eval
        Version: 0.4.99
        """,
}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A stand-in for the harness; returns the calls that it got."""
    from textwrap import dedent

    folder = tmp_path / "site"
    for name, text in STUB.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip())
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    import lm_eval

    yield lm_eval.calls
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]


@pytest.fixture
def evaluate(tmp_path, capsys):
    def run(*options: str):
        path = tmp_path / "evaluation"
        assert main(["eval", str(BASE_PATH), *options, "--output_dir", str(path)]) == 0
        return capsys.readouterr().out, json.loads((path / "eval.json").read_text()), path

    return run


def test_one_task(stub, evaluate):
    out, record, path = evaluate("--tasks", "lm-eval:plain")
    assert record == {
        "task": "lm-eval:plain",
        "metrics": {
            "acc": {
                "value": 0.5,
                "low": pytest.approx(0.5 - 0.196, abs=1e-4),
                "high": pytest.approx(0.5 + 0.196, abs=1e-4),
                "count": 40,
            },
            "f1": {"value": 0.25, "low": None, "high": None, "count": 40},
            "exact_match,strict-match": {"value": 1.0, "low": 1.0, "high": 1.0, "count": 40},
        },
        "notes": {
            "measured_by": "lm-evaluation-harness 0.4.99",
            "task_version": 2.0,
            "few_shot": 0,
        },
    }
    assert "0.500 [0.304, 0.696]" in out
    assert " 0.250 │" in out
    assert {file.name for file in path.iterdir()} == {"eval.json", "report.html"}


def test_what_is_handed_over(stub, evaluate):
    evaluate(
        *("--tasks", "lm-eval:plain", "--max_samples", "7", "--few_shot", "5"),
        *("--per_device_eval_batch_size", "4"),
    )
    (call,) = stub
    assert call["tasks"] == ["plain"]
    assert call["limit"] == 7
    assert call["num_fewshot"] == 5
    assert call["batch_size"] == 4
    given = call["model"].given
    assert type(given["pretrained"]).__name__ == "Qwen2ForCausalLM"
    assert given["tokenizer"].eos_token == "<|endoftext|>"
    assert given["batch_size"] == 4


def test_left_open_is_left_to_the_harness(stub, evaluate):
    evaluate("--tasks", "lm-eval:plain")
    assert stub[0]["limit"] is None
    assert stub[0]["num_fewshot"] is None


def test_beside_our_own_tasks(stub, evaluate):
    out, record, path = evaluate("--tasks", "lm-eval:plain,demo-fact", "--max_samples", "3")
    assert [entry["task"] for entry in record["tasks"]] == ["lm-eval:plain", "demo-fact"]
    assert out.index("lm-eval:plain") < out.index("demo-fact")
    assert sorted(file.name for file in path.iterdir()) == [
        "eval.json",
        "predictions-demo-fact.jsonl",
        "report.html",
    ]


def test_group_has_a_table_of_its_tasks(stub, evaluate):
    _, record, _ = evaluate("--tasks", "lm-eval:group")
    metrics = record["metrics"]
    assert (metrics["acc"]["value"], metrics["acc"]["count"]) == (0.5, 80)
    assert {name: row["acc"]["value"] for name, row in metrics["by_task"].items()} == {
        "a": 0.25,
        "b": 0.75,
    }


@pytest.mark.parametrize("name", ["tag", "hollow"])
def test_name_without_a_score_of_its_own(stub, evaluate, name):
    _, record, _ = evaluate("--tasks", f"lm-eval:{name}")
    assert [entry["task"] for entry in record["tasks"]] == ["lm-eval:a", "lm-eval:b"]


def test_no_metric_at_all_fails(stub, capsys):
    assert main(["eval", str(BASE_PATH), "--tasks", "lm-eval:nothing"]) == 1
    assert "lm-eval:nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("lm-eval:plian", ["lm-eval:plian", "Did you mean plain"]),
        ("lm-eval:missing", ["lm-eval:missing", "cannot be read", "Couldn't find"]),
    ],
)
def test_found_before_the_model_is_loaded(stub, monkeypatch, capsys, task, words):
    monkeypatch.setattr("molf.job.model.loading.load_model", None)
    assert main(["eval", str(BASE_PATH), "--tasks", task]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.skipif(INSTALLED, reason="lm-evaluation-harness is installed")
def test_not_installed(refused, base):
    error = refused("eval", str(base), "--tasks", "lm-eval:plain")
    assert "pip install 'molf[lm-eval]'" in error


@pytest.mark.skipif(not INSTALLED, reason="needs lm-evaluation-harness")
def test_the_real_harness(tmp_path, monkeypatch, evaluate):
    """A choice and a generation task over records of our own, as the harness scores them."""
    import functools

    import lm_eval.tasks

    write_harness_tasks(tmp_path / "tasks")
    manager = functools.partial(
        lm_eval.tasks.TaskManager, include_path=str(tmp_path / "tasks"), include_defaults=False
    )
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    _, record, _ = evaluate("--tasks", "lm-eval:toy_choice,lm-eval:toy_text", "--max_samples", "5")
    choice, text = record["tasks"]
    for metric in ("acc", "acc_norm"):
        found = choice["metrics"][metric]
        assert found["count"] == 5
        assert found["low"] <= found["value"] <= found["high"]
    assert text["metrics"]["exact_match"]["count"] == 5
    assert text["notes"]["first_records_only"] == 5


def write_harness_tasks(folder: Path) -> None:
    folder.mkdir()
    records = [
        {"q": f"Two plus {i} is", "choices": ["two", "four", "six"], "gold": i % 3, "a": str(i + 2)}
        for i in range(12)
    ]
    data = folder / "records.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choice = {
        "task": "toy_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    text = {
        "task": "toy_text",
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, text):
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}))
