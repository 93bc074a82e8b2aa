"""`molf train --kernels triton`, from the command line to its summary, beside the eager run."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file
from scenarios import INTERPRETED

from checkpoints import write_checkpoint, write_facts
from molf.cli import main

LR = 1e-4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Options of one narrow layer and its records: the interpreter is slow."""
    path = tmp_path_factory.mktemp("model")
    base = write_checkpoint(path / "tiny", num_hidden_layers=1)
    facts = write_facts(path / "facts.jsonl", count=4)
    return ["--model", str(base), "--task", "fact", "--data", str(facts)]


def train(run, tiny, kernels, capsys, *options):
    """A short run; its lines of metrics and its weights."""
    command = ["train", *tiny, "--kernels", kernels, "--output_dir", str(run)]
    command += ["--max_steps", "2", "--max_eval_samples", "2", "--warmup_ratio", "0"]
    command += ["--learning_rate", str(LR), "--lr_scheduler_type", "constant"]
    command += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    assert main([*command, "--logging_steps", "1", *options]) == 0
    assert f"\nkernels  {kernels} (" in capsys.readouterr().out
    assert yaml.safe_load((run / "config.yaml").read_text())["kernels"] == kernels
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return lines, load_file(run / "model" / "model.safetensors")


def test_molf_through_the_kernels(tiny, tmp_path, capsys):
    options = ["--ranks", "4", "--dtype", "bfloat16", "--save_dtype", "float32"]
    lines, weights = train(tmp_path / "triton", tiny, "triton", capsys, *options)
    assert all("lost_updates" in line for line in lines)
    _, expected = train(tmp_path / "eager", tiny, "eager", capsys, *options)
    for name, value in expected.items():
        # On a GPU gradients themselves vary; each run moves a weight by 2 LR at most.
        near = 0.1 * LR if INTERPRETED else 4 * LR
        torch.testing.assert_close(weights[name], value, rtol=0, atol=near)


def test_fft_in_float32_leaves_torchs_optimizer_for_the_kernels(tiny, tmp_path, capsys):
    lines, _ = train(tmp_path / "run", tiny, "triton", capsys, "--method", "fft")
    assert all("lost_updates" in line for line in lines)
