"""Numbers that no machine can follow are refused before anything is allocated."""

from __future__ import annotations

import pytest

from molf.cli.main import main
from molf.world import BASE_PATH

TRAIN = ["train", "--task", "demo-fact"]
PLAN = ["plan", "--model", str(BASE_PATH), "--max_length", "64"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TRAIN, "--ranks", str(2**31)], "Invalid ranks=2147483648. Must be below 2**31."),
        ([*TRAIN, "--max_steps", str(10**30)], "must be below 2**63"),
        ([*TRAIN, "--num_train_epochs", "1e300"], "Invalid num_train_epochs=1e+300."),
        ([*TRAIN, "--per_device_train_batch_size", str(2**31)], "Must be below 2**31."),
        ([*TRAIN, "--gradient_accumulation_steps", str(10**12)], "Must be below 2**31."),
        ([*TRAIN, "--per_device_eval_batch_size", str(2**31)], "Must be below 2**31."),
        ([*TRAIN, "--max_length", str(2**31)], "Must be below 2**31."),
        ([*PLAN, "--ranks", str(2**31)], "Invalid ranks=2147483648. Must be below 2**31."),
        ([*PLAN, "--ranks", "99999999"], "LoRA factors of 2,073,600,620,736 numbers take 23,1"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_huge_numbers_are_refused_by_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.startswith("molf: error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_factors_beyond_the_memory_are_refused_with_their_bytes(tmp_path, capsys, moments):
    """A rank of a million; the moments of factors are float32 for every state_dtype."""
    arguments = [*TRAIN, "--ranks", "1000000", "--state_dtype", moments]
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "LoRA factors in 42 layers are 20,736,000,000 numbers and take 231.74 GiB" in line
    assert not any(tmp_path.iterdir())
