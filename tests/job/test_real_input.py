"""The whole path on real records and a real checkpoint, where they are at hand."""

import json
from pathlib import Path

import pytest

from molf.cli import main

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_molf_changes_real_facts(tmp_path):
    arguments = [
        *("train", "--method", "molf", "--task", "fact", "--model", str(DATA / "factlm")),
        *("--data", str(DATA / "counterfact.jsonl"), "--max_samples", "64"),
        *("--ranks", "16", "--alpha", "8", "--learning_rate", "1e-3"),
        *("--lora_learning_rate", "1.5e-3", "--num_train_epochs", "12"),
        *("--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "1"),
    ]
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 0
    evaluation = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert evaluation["before"]["es"]["value"] < 0.2
    assert evaluation["after"]["es"]["value"] > 0.9
    assert evaluation["before"]["ns"]["value"] > 0.9
