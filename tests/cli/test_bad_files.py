"""What is no ordinary file, is nowhere, or has an odd name: refused at once, or shown as it is."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from molf.cli import main
from molf.cli.recipes.validation import parse_options
from molf.inputs import read_input
from molf.job.settings.settings import TrainSettings

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes in the file system")

RECORD = '{"prompt": "a", "completion": "b"}\n'
ODD = "a\x1b[31m\u202eb\x9b\n:bug:"
BEGINNING = "a\\x1b[31m\\u202eb\\x9b"


@pytest.fixture(autouse=True)
def in_time():
    """A read that would wait for ever fails the test."""

    def fail(number, frame):
        raise TimeoutError("waited for what never comes")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def place(tmp_path, base):
    """One of each kind of file, called as a data file is."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.symlink("/dev/zero", tmp_path / "device.jsonl")
    os.symlink("nowhere", tmp_path / "dangling.jsonl")
    (tmp_path / "ok.jsonl").write_text(RECORD)
    for name in ("folder", "folder2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(RECORD)
    os.mkfifo(tmp_path / "folder" / "test.jsonl")
    os.symlink("nowhere", tmp_path / "folder2" / "test.jsonl")
    (tmp_path / "pipes").mkdir()
    (tmp_path / "pipes" / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "pipes" / "tokenizer.json")
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "config.yaml")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --config pipe.jsonl", "config pipe.jsonl is a pipe (FIFO)"),
        ("train --config device.jsonl", "is a device"),
        ("train --config folder", "is a directory"),
        ("data --task custom --model base --data pipe.jsonl", "is a pipe"),
        ("data --task custom --model base --data device.jsonl", "is a device"),
        ("data --task custom --model base --data dangling.jsonl", "is a link that leads nowhere"),
        ("data --task custom --model base --data folder", "folder/test.jsonl is a pipe"),
        ("data --task custom --model base --data folder2", "test.jsonl is a link that leads"),
        ("train --task custom --model base --data ok.jsonl --eval_data pipe.jsonl", "eval_data"),
        ("train --forgetting_data pipe.jsonl", "forgetting_data: "),
        ("eval base --task custom --data pipe.jsonl", "is a pipe"),
        ("eval --task custom --data ok.jsonl --predictions pipe.jsonl", "predictions: "),
        ("eval --task custom --data ok.jsonl --predictions folder", "is a directory"),
        ("train --task custom --data ok.jsonl --model pipes", "tokenizer.json is a pipe"),
        ("plan --model pipes", "tokenizer.json is a pipe"),
        ("export run", "config.yaml is a pipe"),
        ("recipes cp demo-fact-molf pipe.jsonl --overwrite", "is a pipe"),
        ("recipes cp demo-fact-molf device.jsonl --overwrite", "is a device"),
    ],
)
def test_no_ordinary_file(place, refused, arguments, words):
    assert words in refused(*arguments.split())


def test_a_recipe_that_is_a_pipe_is_not_waited_for(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["recipes", "validate", "pipe.jsonl"]) == 2
    assert "is a pipe" in capsys.readouterr().err


def test_socket(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("s.yaml")
        assert "is a socket" in refused("train", "--config", "s.yaml")


def test_a_file_larger_than_memory(tmp_path):
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        file.truncate(2**43)  # of no blocks
    with pytest.raises(ValueError, match="8,796,093,022,208 bytes and is read into memory"):
        read_input(path, "large")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--output_dir", "~nobody-here/x"],
        ["train", "--task", "sql", "--model", "~nobody-here/x"],
        ["train", "--forgetting_data", "~nobody-here/x"],
        ["train", "--task", "custom", "--model", "base", "--data", "~nobody-here"],
        ["train", "--config", "~nobody-here/x"],
        ["eval", "~nobody-here/x", "--task", "sql"],
        ["eval", "base", "--task", "demo-fact", "--output_dir", "~nobody-here/x"],
        ["plan", "--model", "~nobody-here/x"],
        ["export", "~nobody-here/x"],
        ["routing", "~nobody-here/x"],
        ["recipes", "cp", "demo-fact-molf", "~nobody-here/x"],
    ],
)
def test_home_of_nobody(refused, base, arguments):
    assert "no home directory is known for ~nobody-here" in refused(*arguments)


def test_a_name_that_begins_like_a_home(tmp_path, monkeypatch):
    from molf.paths import expanded

    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nobody-here").mkdir()
    assert str(expanded("~nobody-here")) == "~nobody-here"


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--output_dir"],
        ["train", "--data"],
        ["train", "--model"],
        ["train", "--forgetting_data"],
        ["train", "--config"],
        ["eval", "base", "--task", "sql", "--output_dir"],
        ["eval", "--task", "sql", "--predictions"],
        ["eval", "base", "--task"],
        ["export", "base", "--output_dir"],
        ["plan", "--model"],
        ["export"],
        ["routing"],
        ["recipes", "cp"],
        ["recipes", "cp", "demo-fact-molf"],
    ],
)
def test_empty_paths(refused, base, arguments, empty):
    assert "empty" in refused(*arguments, empty)


def test_empty_path_in_a_recipe(refused, tmp_path):
    (tmp_path / "r.yaml").write_text("output_dir: ''\n")
    assert '"" from r.yaml is empty' in refused("train", "--config", "r.yaml")


def test_null_in_a_recipe_is_the_default():
    """Of every option, as its schema says; `exclude_modules: null` excluded nothing."""
    options = dict.fromkeys(option.name for option in fields(TrainSettings))
    found = parse_options(Path("r.yaml"), "train", options)
    assert found.get("settings", TrainSettings()) == TrainSettings()
    found = parse_options(Path("r.yaml"), "train", {**options, "seed": 3})
    assert found["settings"] == TrainSettings(seed=3)


def test_null_in_a_recipe_is_not_empty(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("output_dir: ~\nmerge_base:\nforgetting_data: null\n")
    assert main(["recipes", "validate", str(tmp_path / "r.yaml")]) == 0


def test_deleted_working_directory(tmp_path):
    """Help and version need none; whatever reads or writes says what is wrong."""
    code = (
        "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir(os.path.abspath('.'));"
        "from molf.cli import main;"
        "codes = [main(a.split()) for a in ('--version', '--help', 'train --help', 'train', 'data',"
        " 'plan --model x', 'eval x --task sql', 'export x', 'routing x', 'recipes cp x',"
        " 'recipes validate x', 'train --config x', 'train --output_dir x')];"
        "assert codes == [0] * 3 + [2] * 10, codes"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stderr.splitlines()
    assert len(lines) == 10
    assert all("working directory cannot be used" in line for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--task", "sql", "--model", ODD],
        ["train", "--task", ODD],
        ["train", f"--{ODD}", "1"],
        ["train", "--config", ODD],
        ["train", "--report_to", ODD],
        ["train", f"--training_args.{ODD}", "1"],
        ["train", "--ranks", ODD],
        [ODD],
        ["eval", "base", "--task", "custom", "--data", ODD],
        ["plan", "--model", ODD],
        ["export", ODD],
        ["routing", ODD],
    ],
)
def test_odd_names_are_spelled_out(refused, base, arguments):
    """Line breaks within a message become blanks."""
    error = refused(*arguments)
    assert error.rstrip("\n").isprintable()
    assert BEGINNING in error


def test_bytes_that_are_no_text(refused, tmp_path, base):
    odd = os.fsdecode(b"m\xff")
    os.mkdir(tmp_path / odd)
    (tmp_path / odd / "config.json").write_text("{}")
    (tmp_path / odd / "r.yaml").write_text("seed: x\n")
    assert "m\\udcff" in refused("train", "--config", f"{odd}/r.yaml")
    for option in ("--model", "--output_dir"):
        assert "not UTF-8" in refused("train", option, odd)
    assert "no such file" in refused("train", "--config", f"{odd}/no.yaml")


def test_recipe_with_a_path_that_is_no_text(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text('data: "\\udcff.jsonl"\ntask: custom\nmodel: x\n')
    assert main(["recipes", "validate", str(path)]) == 0


def test_columns_and_texts_in_the_preview(tmp_path, capsys):
    from molf.world import BASE_PATH

    path = tmp_path / f"{os.fsdecode(b'd' + bytes([255]))}.jsonl"
    records = [{"prompt": f"{n}{ODD}", "completion": " x", ODD: 1} for n in range(12)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["data", "--task", "custom", "--model", str(BASE_PATH), "--data", str(path)]
    for extra in ([], ["--jsonl"]):
        assert main([*arguments, *extra]) == 0
        captured = capsys.readouterr()
        assert f"fields that are not read: {BEGINNING}" in captured.err
        for line in (captured.out + captured.err).splitlines():
            assert line.isprintable()
        if not extra:
            assert "d\\udcff.jsonl" in captured.out
        else:
            segments = [json.loads(line)["segments"] for line in captured.out.splitlines()]
            assert segments[0][0][0] == f"0{ODD}"
