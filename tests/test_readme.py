"""Every code block of the README runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from molf.cli import main
from molf.world import BASE_PATH

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
MODEL = "Qwen/Qwen2.5-1.5B"  # what the README names; the tests put the shipped base in its place
RECORDS = [
    {"prompt": f"The capital of country {i} is", "completion": f" city {i}."} for i in range(40)
]


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def test_only_known_languages():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block(code, tmp_path, monkeypatch, capsys):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    names = {
        "model": AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32"),
        "batch": tokenizer("One two three four.", return_tensors="pt").input_ids,
        "dataset": Dataset.from_list(RECORDS),
    }
    code = code.replace(MODEL, str(BASE_PATH)).replace("max_steps=100", "max_steps=2, use_cpu=True")
    exec(compile(code, "README.md", "exec"), names)
    if "trainer" in names:
        assert type(names["trainer"].optimizer.optimizer).__name__ == "MoLFAdamW"
    else:
        assert "winners=" in capsys.readouterr().out


@pytest.mark.parametrize("code", blocks("bash"))
def test_bash_block(code, tmp_path, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    for name in ("records.jsonl", "held_out.jsonl"):
        Path(name).write_text(lines)
    for line in code.replace(MODEL, str(BASE_PATH)).splitlines():
        words = shlex.split(line)
        if words[0] == "molf":
            short = ["--max_steps", "2"] if words[1] == "train" else []
            assert main([*words[1:], *short]) in (None, 0), line
        elif words[0] == "make":
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True)
        else:
            assert words[:2] == ["git", "clone"], f"nothing here runs: {line}"


def test_make_demo_is_molf_train_without_arguments():
    plan = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "demo"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert plan.stdout.splitlines()[-1].endswith("bin/molf train")
