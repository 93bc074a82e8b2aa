"""The commands of pages in docs run, and the records in them can be read."""

import importlib
import json
import re
import shlex
from pathlib import Path
from statistics import median

import pytest

from molf.cli import main
from molf.cli.app import app
from molf.tasks import TaskOptions, load_task
from molf.world import BASE_PATH

DOCS = Path(__file__).resolve().parents[2] / "docs"
TASKS = (DOCS / "tasks.md").read_text()
RECIPES = (DOCS / "recipes.md").read_text()
METHODS = (DOCS / "methods.md").read_text()
PLAN = (DOCS / "plan.md").read_text()
COMPARE = (DOCS / "compare.md").read_text()
HYBRID = (DOCS / "hybrid.md").read_text()
SHORT = ["--max_steps", "2", "--max_length", "256", "--max_samples", "20"]


pytestmark = pytest.mark.usefixtures("short_text")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def section(task: str) -> str:
    return TASKS.split(f"\n## `{task}`\n")[1].split("\n## ")[0]


def records(task: str) -> list[dict]:
    return [json.loads(block) for block in blocks(section(task), "json")]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("task", ["sql", "med", "math", "fact", "custom"])
def test_records(tmp_path, task):
    # A file has one format.
    files = [write(tmp_path / f"{i}.jsonl", [one]) for i, one in enumerate(records(task))]
    loaded = load_task(TaskOptions(name=task, data=",".join(map(str, files)), evaluation_only=True))
    assert loaded.evaluation_count == len(records(task))


@pytest.mark.parametrize("task", ["sql", "med", "math"])
def test_prompts(tmp_path, task):
    """The prompt shown is the one that the record shown is asked with."""
    data = write(tmp_path / "records.jsonl", records(task) * 2)
    loaded = load_task(TaskOptions(name=task, data=str(data), eval_data=str(data)))
    (shown,) = blocks(section(task), "text")
    assert loaded.training_samples[0].prompt == shown.rstrip("\n")


def run(line: str, *extra: str) -> int:
    line = line.replace("out/model", str(BASE_PATH)).replace("Qwen/Qwen2.5-1.5B", str(BASE_PATH))
    return main([*shlex.split(line)[1:], *extra])


@pytest.mark.slow
def test_commands_of_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("questions", "other-questions"):
        asked = [{**records("sql")[0], "sql_prompt": f"{name}: {i}?"} for i in range(20)]
        write(tmp_path / f"{name}.jsonl", asked)
    quiz = [{**records("med")[0], "question": f"Which is vitamin {i}?"} for i in range(20)]
    (tmp_path / "quiz").mkdir()
    write(tmp_path / "quiz" / "train.jsonl", quiz)
    write(tmp_path / "quiz" / "validation.jsonl", quiz[:3])
    write(tmp_path / "records.jsonl", records("custom")[:1])  # the base has no chat template
    train, again, saved, validated, chosen, shown, lines, few_shot, several, install, harness = [
        line for block in blocks(TASKS, "bash") for line in block.splitlines()
    ]
    capsys.readouterr()
    assert run(shown) == 0
    assert "[[ Paris.<" in capsys.readouterr().out
    assert run(lines) == 0
    (example,) = [block for block in blocks(TASKS, "text") if '"segments"' in block]
    line = json.loads(capsys.readouterr().out)
    assert line.keys() == json.loads(example).keys()
    assert line["segments"][0] == json.loads(example)["segments"][0]
    assert run(train, *SHORT) == 0
    assert run(again) == 0
    # What a training held out is what its predictions are about.
    assert 0 < len(Path("out/predictions.jsonl").read_text().splitlines()) < 20
    assert run(saved) == 0
    assert run(validated, *SHORT, "--max_eval_samples", "4") == 0
    assert run(chosen, *SHORT, "--max_eval_samples", "4") == 0
    assert run(few_shot) == 0
    for line in (several, harness):  # these need the network; here they must be understood
        app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)
    assert install == "pip install 'molf[lm-eval]'"


def test_commands_of_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(RECIPES, "bash"):
        for line in block.splitlines():
            short = ["--max_steps", "2", "--max_samples", "20"] if "molf train" in line else []
            assert run(line, *short) == 0, line


def test_commands_of_methods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("bitsandbytes", reason="the 4-bit base needs the extra bitsandbytes")
    write(
        tmp_path / "records.jsonl",
        [{"prompt": f"{i} is", "completion": " odd"} for i in "abcdefghij"],
    )
    lines = [line for block in blocks(METHODS, "bash") for line in block.splitlines()]
    assert lines.pop(0) == "pip install 'molf[bitsandbytes]'"
    for line in lines:
        short = ["--max_steps", "2", "--ranks", "2,4"] if "molf train" in line else []
        assert run(line, *short) == 0, line
    assert Path("out/model-bfloat16/model.safetensors").is_file()
    assert Path("adapter-for-serving/adapter_config.json").is_file()


def test_methods_described():
    from molf.job.settings.defaults import METHODS as TRAINED

    rows = re.findall(r"^\| `([^`]+)` \|", METHODS.split("## Equal rank")[0], re.M)
    assert rows[0] == "--method"
    assert sorted(rows[1:]) == sorted(TRAINED)


@pytest.mark.slow
def test_commands_of_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "records.jsonl",
        [{"prompt": f"{i} and two", "completion": f" make {i + 2}."} for i in range(8)],
    )
    commands = [line for block in blocks(PLAN, "bash") for line in block.splitlines()]
    assert [line.split()[1] for line in commands] == ["plan", "plan", "plan", "train"]
    for line in commands:
        assert run(line) == 0, line


def test_commands_of_hybrid(tmp_path, monkeypatch):
    """With a tiny model and a few facts in the place of the demo's."""
    from checkpoints import write_checkpoint, write_facts

    monkeypatch.chdir(tmp_path)
    patterns, _ = blocks(HYBRID, "yaml")
    (tmp_path / "assignment.yaml").write_text(patterns)
    base = write_checkpoint(tmp_path / "base", num_hidden_layers=3, hidden_size=64)
    tiny = f"--task fact --model {base} --data {write_facts(tmp_path / 'facts.jsonl')}"
    for line in (line for block in blocks(HYBRID, "bash") for line in block.splitlines()):
        steps = [] if "--max_steps" in line else ["--max_steps", "2"]
        ranks = ["--ranks", "16"] if "--method molf " in line else []
        assert "--task demo-fact" in line
        assert run(line.replace("--task demo-fact", tiny), *ranks, *steps) == 0, line
    for name in ("by-hand", "by-wins"):
        assert (tmp_path / name / "assignment.yaml").is_file()


@pytest.mark.slow
def test_commands_of_compare(tmp_path, monkeypatch):
    """With a tiny model and a few facts in the place of the demo's."""
    from checkpoints import write_checkpoint, write_facts

    monkeypatch.chdir(tmp_path)
    base = write_checkpoint(tmp_path / "base")
    short = f"--task fact --model {base} --data {write_facts(tmp_path / 'facts.jsonl')}"
    short += " --max_steps 2 --max_eval_samples 2 --no-report --no-spectra --ranks 2"
    for line in (line for block in blocks(COMPARE, "bash") for line in block.splitlines()):
        assert run(line.replace("molf train", f"molf train {short}")) == 0, line
    assert Path("comparison.html").is_file()
    assert len([*Path("figures").iterdir()]) == 3


def test_commands_of_rates(tmp_path, monkeypatch, capsys):
    """With a tiny model and a few facts in the place of the demo's."""
    from checkpoints import write_checkpoint, write_facts

    monkeypatch.chdir(tmp_path)
    base = write_checkpoint(tmp_path / "base")
    tiny = f"--task fact --model {base} --data {write_facts(tmp_path / 'facts.jsonl')}"
    (block,) = blocks((DOCS / "rates.md").read_text(), "bash")
    (line,) = block.splitlines()
    assert run(line.replace("--task demo-fact", tiny), "--ranks", "4", "--max_steps", "20") == 0
    named = re.findall(r"^\| `(rates\..*?)`", (DOCS / "rates.md").read_text(), re.M)
    assert sorted(named) == sorted(path.name for path in Path("rates").iterdir())
    printed = capsys.readouterr().out
    assert all(f"written   rates/{name}" in printed for name in named)


def test_python_of_hybrid(tmp_path, monkeypatch):
    import peft
    import torch

    from checkpoints import make_model

    monkeypatch.chdir(tmp_path)
    names = {"molf": importlib.import_module("molf"), "model": make_model("qwen2")}
    program, loading = blocks(HYBRID, "python")
    with pytest.warns(UserWarning, match="named by no pattern"):
        exec(program, names)
    assert [group["lr"] for group in names["optimizer"].param_groups] == [1e-5, 1e-5, 1e-4]
    trained = names["model"]
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += parameter.requires_grad
    trained.save_pretrained("sft/checkpoint-100")
    names |= {"peft": peft, "base": make_model("qwen2")}
    exec(loading, names)
    assert names["model"] is not trained
    assert all(map(torch.equal, names["model"].parameters(), trained.parameters()))


def test_python_of_the_whole_job(tmp_path, monkeypatch, capsys):
    from checkpoints import write_checkpoint

    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "Qwen/Qwen2.5-1.5B")
    records = [{"prompt": f"{i} and two", "completion": f" make {i + 2}."} for i in range(20)]
    for name in ("records.jsonl", "held_out.jsonl"):
        write(tmp_path / name, records)
    program, short = blocks((DOCS / "python.md").read_text(), "python")
    names = {}
    exec(program, names)
    planned, trained, *_ = capsys.readouterr().out.splitlines()
    of_short = {"molf": names["molf"]}
    short = short.replace("(**data,", "(**data, max_steps=20,")
    exec(short.replace("probe(", "probe(ranks=[2], "), of_short)
    suggestions, full = capsys.readouterr().out.splitlines()
    assert suggestions == str(of_short["rates"].suggestions)
    assert full == str([layer.name for layer in of_short["probe"].assignment.full])
    assert of_short["run"].options["assignment"] == str(tmp_path / "probe")
    assert planned.endswith("['24 GB', '40 GB', '80 GB', '141 GB']")
    assert trained.startswith("complete ")
    assert str(names["run"].record["model"]["trained_parameters"]) == planned.split()[0]
    assert names["model"].config.model_type == "qwen2"
    text = (DOCS / "python.md").read_text()
    assert members(text, "molf.Run(path)") == public(names["molf"].Run) - {"path"}
    assert members(text, "molf.RangeTest") == public(names["molf"].RangeTest)
    assert members(text, "molf.TrainingPlan") == public(names["molf"].TrainingPlan)


def members(text: str, name: str) -> set[str]:
    """The names in the first column of a table whose head begins with a name."""
    (table,) = re.findall(rf"^\| `{re.escape(name)}`.*?\n\|---\|---\|\n((?:\|.*\n)+)", text, re.M)
    rows = re.findall(r"^\| (.*?) \|", table, re.M)
    return {one for row in rows for one in re.findall(r"`([a-z_]+)", row)}


def public(kind: type) -> set[str]:
    fields = getattr(kind, "__dataclass_fields__", ())
    return {name for name in {*dir(kind), *fields} if not name.startswith("_")}


def test_recipes_named():
    from molf.cli.recipes.shipped import recipe_names

    names = recipe_names()
    assert set(re.findall(r"`(?:\.\.\.)?-(24gb|laptop)`", RECIPES)) == {"24gb", "laptop"}
    for ending in ("-24gb", "-laptop", "-chat"):
        assert any(name.endswith(ending) for name in names)


def test_packed_rows_of_the_page(capsys):
    page = (DOCS / "packing.md").read_text()
    [command] = re.findall(r"`(molf data [^`]*)`", page)
    assert main([*shlex.split(command)[1:], "--examples", "0"]) == 0
    [shown] = [block for block in blocks(page, "text") if block.startswith("packed")]
    assert shown in capsys.readouterr().out


def test_figures_of_packing_are_those_of_the_record():
    record = json.loads((DOCS.parent / "benchmarks/results/packing_cpu.json").read_text())
    seconds = record["seconds"]
    found = {
        (
            f"{record['tokens'] / median(taken):,.0f}",
            f"{median([a / b for a, b in zip(seconds['padded'], taken, strict=True)]):.3g}",
        )
        for taken in seconds.values()
    }
    table = (DOCS / "packing.md").read_text().split("| x padded |\n")[1]
    shown = re.findall(r"^\|[^|]*\| ([\d,]+) \| ([\d.]+)", table, re.M)
    assert set(shown) == found
