"""Help, version, completion, the printed configuration and the schema of recipes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from molf.api.options import parsed
from molf.cli import main
from molf.cli.recipes.shipped import recipe_names, shipped_recipe


@pytest.fixture
def printed(capsys, monkeypatch):
    def run(*arguments, width=80):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    return run


def names_in(text):
    return set(re.findall(r"--[a-z_0-9]+", text))


def test_help_shows_common_options_and_an_example(printed):
    common, every = printed("train", "--help"), printed("train", "--help-all")
    assert "--learning_rate FLOAT" in common
    assert "--adam_beta1" not in common
    assert "--adam_beta1" in every
    assert names_in(common) < names_in(every)
    assert len(common.splitlines()) < 90
    for text in (common, every):
        assert "Example: molf train --model" in text
        assert "All options: molf train --help-all" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_names_are_never_broken(printed, width):
    from molf.job.settings.settings import TrainSettings

    text = printed("train", "--help-all", width=width)
    for name in vars(TrainSettings()) | {"no-gradient_checkpointing": None}:
        assert re.search(rf"--{name}(?![a-z_0-9-])", text), name


def test_options_without_common_ones_are_all_shown(printed):
    assert "--to" in printed("study", "report", "--help")
    assert printed("study", "report", "--help") == printed("study", "report", "--help-all")


def test_help_is_a_command(printed):
    assert printed("help") == printed("--help")
    assert printed("help", "recipes", "ls") == printed("recipes", "ls", "--help")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["train", "--xyz", "1"], "molf train --help-all"),
        (["routing", "--xyz"], "molf routing --help"),
    ],
)
def test_unknown_options_name_the_help_that_has_every_option(capsys, arguments, shown):
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(f" `{shown}` lists the options.\n")


def test_version(printed):
    assert printed("-V") == printed("--version")


def test_completion_has_commands_and_options():
    from molf.cli.app import app

    script = app.generate_completion(shell="bash")
    for word in ("train", "recipes", "--lora_learning_rate", "--method"):
        assert word in script


def test_printed_configuration_is_a_recipe(printed, tmp_path):
    text = printed("train", "--print_config", "--method", "fft", "--max_steps", "3")
    options = yaml.safe_load(text)
    assert (options["method"], options["max_steps"], options["task"]) == ("fft", 3, "demo-fact")
    assert options["learning_rate"] == 1e-3  # a default of the task
    assert "output_dir" not in options
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert printed("train", "--config", str(path), "--print_config") == text


def test_wrong_options_print_no_configuration(capsys):
    assert main(["train", "--print_config", "--method", "hybrid"]) == 2
    assert capsys.readouterr().out == ""


def test_a_list_of_sources_is_one_value(printed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "task: custom\nmodel: m\ndata: [a.jsonl, b.jsonl:2]\nmax_time: 1h30m\n"
    )
    found = yaml.safe_load(printed("train", "--config", "r.yaml", "--print_config"))
    assert (found["data"], found["max_time"]) == ("a.jsonl,b.jsonl:2", 5400.0)
    given = parsed("train", {"task": "custom", "model": "m", "data": ["a.jsonl", Path("b.jsonl")]})
    assert given["settings"].data == "a.jsonl,b.jsonl"


def test_schema_accepts_every_shipped_recipe(printed):
    schema = json.loads(printed("recipes", "schema"))
    assert schema["properties"]["method"]["enum"][0] == "fft"
    assert schema["properties"]["ranks"]["type"] == ["array", "integer", "string", "null"]
    assert schema["properties"]["max_time"]["type"] == ["string", "number", "null"]
    assert schema["properties"]["data"]["type"] == ["array", "string", "null"]
    assert all(one["description"] for one in schema["properties"].values())
    kinds = {
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
        type(None): "null",
    }
    for name in recipe_names():
        for option, value in yaml.safe_load(shipped_recipe(name).read_text()).items():
            allowed = schema["properties"][option]
            if "enum" in allowed:
                assert value in allowed["enum"], (name, option)
                continue
            accepted = kinds[type(value)] in allowed["type"]
            # An integer is a number.
            assert accepted or (type(value) is int and "number" in allowed["type"]), (name, option)
