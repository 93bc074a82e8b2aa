"""Every code block of the README runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from molf.cli import main
from molf.world import BASE_PATH

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
MODEL = Path("Qwen/Qwen2.5-1.5B")  # what the README names: a tiny one of its kind lies there
RECORDS = [
    {"prompt": f"The capital of country {i} is", "completion": f" city {i}."} for i in range(40)
]


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def test_only_known_languages():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder in which blocks run as they are printed: the model and the records are there."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(MODEL)
    tokenizer.save_pretrained(MODEL)
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    for name in ("records.jsonl", "held_out.jsonl"):
        Path(name).write_text(lines)


def dpo_trainer(model, tokenizer):
    """A trainer whose constructor takes no factory."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pair = {"prompt": "One two", "chosen": " three.", "rejected": " four."}
    args = DPOConfig(output_dir="dpo", max_steps=2, use_cpu=True, bf16=False, report_to=[])
    data = Dataset.from_list([pair] * 4)
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block(code, capsys):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    names = {
        "model": AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
        "batch": tokenizer("One two three four.", return_tensors="pt").input_ids,
        "dataset": Dataset.from_list(RECORDS),
    }
    if "trainer = " not in code and "trainer." in code:
        names["trainer"] = dpo_trainer(names["model"], tokenizer)
    exec(compile(code, "README.md", "exec"), names)
    if "trainer" in names:
        assert type(names["trainer"].optimizer.optimizer).__name__ == "MoLFAdamW"
        assert names["trainer"].state.global_step == (100 if "max_steps=100" in code else 2)
    (printed,) = re.findall(r"# (Decision\(winners=\(.*?\))", code) or [""]
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize(
    "code",
    [  # a probe and a training of the demo's full length take a minute
        pytest.param(code, marks=[pytest.mark.slow] * ("molf probe" in code))
        for code in blocks("bash")
    ],
)
def test_bash_block(code):
    for line in code.splitlines():
        words = shlex.split(line)
        if words[0] == "molf":
            assert main(words[1:]) in (None, 0), line
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
