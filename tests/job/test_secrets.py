"""Secrets end up in options, variables and errors; runs, cards and screens are shared."""

import csv
import io
import json
import sys
from importlib.util import find_spec

import pytest
import yaml

from molf.cli import main
from molf.masking import known

URL = "https://me:pw5ecret@example.org/%s.jsonl?sv=2024&sig=sas5ecret%%2F1&page=2#frag5ecret"


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch):
    monkeypatch.setattr(known, "_learned", {})


@pytest.fixture
def web(facts, tmp_path, monkeypatch):
    """Every address holds the facts."""
    content = facts.read_bytes()
    monkeypatch.setenv("MOLF_CACHE", str(tmp_path / "cache"))

    def urlopen(url, timeout):
        response = io.BytesIO(content)
        response.headers = {}
        return response

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return content


def leaking(folder):
    """The files that hold a secret, whatever they are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path.relative_to(folder)) for path in files if b"5ecret" in path.read_bytes()]


def with_data(options, data):
    arguments = [*options]
    arguments[arguments.index("--data") + 1] = data
    return arguments


def test_a_run_holds_no_secrets(options, web, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "env5ecret-no-form")
    arguments = with_data(options, URL % "facts")
    arguments += [
        "--method",
        "lora",
        "--save_steps",
        "1",
        "--output_dir",
        str(tmp_path / "r" / "run"),
    ]
    if find_spec("tensorboard"):
        arguments += ["--report_to", "tensorboard"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"max_eval_samples": 4}))
    arguments += ["--config", str(recipe)]
    command = ["molf", *arguments, "--api_key", "key5ecret", "--x.token=val5ecret and 5ecret"]
    command += ["hf_0123456789abcdef5ecret", "--header", "Authorization: Bearer bear5ecret"]
    monkeypatch.setattr(sys, "argv", command)
    assert main(arguments) == 0
    printed = "".join(capsys.readouterr())
    assert "5ecret" not in printed
    assert leaking(tmp_path / "r") == []
    run = tmp_path / "r" / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"] == "https://example.org/facts.jsonl"
    assert config["learning_rate"] == 0.01
    (file,) = config["run"]["data"]["files"]["data"]
    assert file["bytes"] == len(web)
    recorded = json.loads((run / "environment.json").read_text())["command"]
    assert recorded[-6:] == [
        *("--api_key", "***", "--x.token=***", "***"),
        *("--header", "Authorization: Bearer ***"),
    ]
    assert recorded[: len(arguments) - 1] == ["molf", *with_data(arguments, config["data"])][:-2]
    assert "data: https://example.org/facts.jsonl\n" in (run / "model" / "README.md").read_text()

    out = tmp_path / "e"
    evaluation = ["eval", str(run / "model"), "--task", "fact", "--data", URL % "facts"]
    assert main([*evaluation, "--output_dir", str(out)]) == 0
    assert "5ecret" not in "".join(capsys.readouterr())
    assert leaking(out) == []
    assert main(["data", *with_data(options, URL % "facts")[1:]]) == 0
    shown = capsys.readouterr()
    assert "fact: https://example.org/facts.jsonl\n" in shown.out
    assert "5ecret" not in "".join(shown)


def test_a_failed_run_quotes_no_secrets(options, web, tmp_path, monkeypatch, capsys):
    from molf.job import run_steps

    monkeypatch.setenv("WANDB_API_KEY", "env5ecretnoform")

    def fail(*given, **named):
        try:
            raise ValueError("nonnumeric port: 'pw5ecret@example.org'")
        except ValueError as error:
            raise RuntimeError(
                f"{URL % 'facts'} with {{'api_key': 'py5ecret'}} of env5ecretnoform"
            ) from error

    monkeypatch.setattr(run_steps, "run_training", fail)
    arguments = [*with_data(options, URL % "facts"), "--output_dir", str(tmp_path / "run")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "5ecret" not in error
    assert "https://example.org/facts.jsonl with {'api_key': '***'} of ***" in error
    log = (tmp_path / "run" / "error.log").read_text()
    assert "5ecret" not in log
    assert "nonnumeric port: '***@example.org'" in log

    monkeypatch.setattr("molf.job.run.resolve", fail)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "5ecret" not in error
    path = error.rpartition("(traceback: ")[2].rstrip().rstrip(")")
    with open(path) as file:
        assert "pw5ecret" not in file.read()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "https://me:pw5ecret@example.org/x.jsonl?sig=5ecret"],
        ["--data", "s3://key:5ecret@bucket/x.jsonl"],
        ["--data", "postgres://me:pw5ecret@db/x"],
        ["--data", "/no/ghp_5ecret78901234567890.jsonl"],
        ["--model", "https://me:5ecret@example.org/m?sig=5ecret"],
        ["--eval_data", "https://example.org/" + "x" * 400 + "?sig=5ecret"],
        ["--api_key", "key5ecret"],
        ["--api-key=key5ecret"],
        ["--chat_password", "pass5ecret"],
        ["--training_args.hub_token", "x5ecretx"],
        ["--training_args.api_key", "x5ecretx"],
        ["--training_args.project", "https://me:5ecret@example.org"],
        ["--report_to", "hf_5ecret7890123456789012"],
        ["--seed", "sk-5ecret78901234567890123"],
        ["--output_dir", "~/\0?token=5ecret"],
        ["--config", "https://me:5ecret@example.org/r.yaml"],
    ],
)
def test_wrong_input_is_quoted_without_secrets(options, arguments, monkeypatch, capsys, tmp_path):
    def refuse(url, timeout):
        raise OSError(f"no route to {url}")

    monkeypatch.setenv("MOLF_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    if arguments[0] in options:
        given = [*options]
        given[given.index(arguments[0]) + 1] = arguments[1]
    else:
        given = [*options, *arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert "5ecret" not in error
    assert error.count("\n") == 1


def test_a_recipe_is_quoted_without_secrets(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for text in (
        "api_key: key5ecret\n",
        "data: s3://a:b5ecret@c/d\n",
        "data: [hf_5ecret78901234567]\n",
    ):
        recipe.write_text(text)
        assert main(["train", "--config", str(recipe)]) == 2
        assert main(["recipes", "validate", str(recipe)]) in (0, 2)
        assert "5ecret" not in "".join(capsys.readouterr())


def test_logs_of_libraries_hold_no_secrets(caplog):
    import logging

    from molf.job.libraries import quiet_libraries

    logger = logging.getLogger("transformers.some")
    with quiet_libraries():
        logger.error("GET %s", "https://me:5ecret@example.org/x?sig=5ecret")
        unfit = ("transformers", logging.ERROR, "x.py", 1, "does not fit %d", ("this",), None)
        assert logging.getLogRecordFactory()(*unfit).msg == "does not fit %d"
    assert [record.msg for record in caplog.records] == ["GET https://example.org/x"]


NAMES = [
    "a`b``c",
    "=cmd|' /C calc'!A0",
    "<script>alert(1)</script> & [x](http:y) ![i](j)",
    "a\n---\nbase_model: evil\n```\n# heading",
    "| a | b |\n|---|---|",
    "---",
    "-1+1",
    "@SUM(1)",
    "new\tline\rs \u202e txt",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_become_no_markup(name, tmp_path):
    from dataclasses import replace

    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    from molf.job.model.card import adapter_card, model_card
    from molf.job.record.results import append_result
    from molf.measure.metric import Evaluation

    settings = some_settings()
    model = tmp_path / name.replace("/", "_")
    model.mkdir()
    settings = replace(
        settings, output_dir=tmp_path / "o" / model.name, model=str(model), data=name
    )
    task = {"name": "fact", "data": name, "prompt": name}
    cards = [model_card(settings, task, Evaluation({}), None), adapter_card(settings, None)]
    for card in cards:
        found = ModelCard(card).data.to_dict()
        assert set(found) <= {"library_name", "pipeline_tag", "tags"}
        tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
        kinds = [token.type for token in tokens]
        assert "html_block" not in kinds
        assert "hr" not in kinds
        headings = [tokens[i + 1].content for i, kind in enumerate(kinds) if kind == "heading_open"]
        assert headings[1:] == ["Metrics", "Settings", "Data"][: len(headings) - 1]
        assert kinds.count("table_open") == len(headings) // 4  # of the metrics
        inline = [child for token in tokens for child in token.children or ()]
        assert {token.type for token in inline} <= {"text", "code_inline", "softbreak"}
        blocks = [yaml.safe_load(token.content) for token in tokens if token.type == "fence"]
        if blocks:
            assert blocks[1]["prompt"] == name

    row = {"run": model.name, "model": name, "seed": 1, "training_loss": -0.5}
    row |= dict.fromkeys(("started", "task", "method", "peak_memory_bytes"), "x")
    folder = tmp_path / "o"
    folder.mkdir()
    append_result(folder, row)
    append_result(folder, {**row, "seed": 2})
    path = append_result(folder, {**row, "run": "other"})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["2", "1"]
    assert rows[0]["training_loss"] == "-0.5"
    for cell in (rows[0]["run"], rows[0]["model"]):
        assert cell[0] not in "=+-@\t\r"
        assert cell.isprintable()


def some_settings():
    from datetime import datetime

    from molf.job.settings.resolved import resolve
    from molf.job.settings.settings import TrainSettings

    return resolve(TrainSettings(task="fact", model="m", data="d"), datetime.now().astimezone())
