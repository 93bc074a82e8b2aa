"""The saved checkpoint: plain, exact, whole or not there."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from checkpoints import write_checkpoint
from recorded import PROBE, logits_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from molf.cli import main

RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
paths, probe = json.loads(sys.argv[1])
logits = {}
for path in paths:
    AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits[path] = model(torch.tensor(probe)).logits.float()
assert not any(name.partition(".")[0] == "molf" for name in sys.modules)
torch.save(logits, sys.argv[2])
"""
ARCHITECTURES = ("qwen2", "llama", "gemma3", "gpt2")


@pytest.fixture(scope="module")
def trained(record, facts, workplace):
    """A molf run per architecture; what a process without molf makes of the saved models."""
    runs = {}
    for architecture in ARCHITECTURES:
        model = write_checkpoint(workplace / f"base-{architecture}", architecture)
        arguments = [
            *("train", "--task", "fact", "--model", str(model), "--data", str(facts)),
            *("--ranks", "2,4", "--learning_rate", "1e-2", "--max_steps", "2"),
        ]
        runs[architecture] = record(arguments, workplace / architecture)
    paths = {name: str(run.path / "model") for name, run in runs.items()}
    reloaded = workplace / "reloaded.pt"
    given = json.dumps([list(paths.values()), PROBE.tolist()])
    subprocess.run([sys.executable, "-c", RELOAD, given, str(reloaded)], check=True)
    logits = torch.load(reloaded)
    return {name: (run, logits[paths[name]]) for name, run in runs.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reloads_exactly_without_molf(trained, architecture):
    run, reloaded = trained[architecture]
    assert torch.equal(reloaded, run.trained_logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ties_are_kept(trained, architecture):
    run, _ = trained[architecture]
    model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (architecture != "llama")


def test_saved_in_the_type_of_the_base(record, facts, workplace):
    base = write_checkpoint(workplace / "base-bf16", dtype=torch.bfloat16)
    arguments = ["train", "--task", "fact", "--model", str(base), "--data", str(facts)]
    run = record([*arguments, "--max_steps", "2", "--ranks", "4"], workplace / "bf16")
    saved = AutoModelForCausalLM.from_pretrained(run.path / "model", dtype="auto")
    assert saved.dtype == torch.bfloat16
    assert json.loads((run.path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (logits_of(saved.float()) - run.trained_logits).abs().max() < 0.05


def test_save_dtype_chooses(options, workplace):
    path = workplace / "half"
    assert main([*options, "--save_dtype", "float16", "--output_dir", str(path)]) == 0
    saved = AutoModelForCausalLM.from_pretrained(path / "model", dtype="auto")
    assert saved.dtype == torch.float16


@pytest.fixture
def disk_full(monkeypatch):
    """Saving a model fails half-way, as on a full disk."""

    def save(self, directory, **kwargs):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)


def test_disk_full(disk_full, options, tmp_path, capsys):
    path = tmp_path / "run"
    assert main([*options, "--output_dir", str(path)]) == 1
    errors = capsys.readouterr().err.splitlines()
    last = errors[-1]
    assert "the disk is full" in last
    assert str(path / "error.log") in last
    assert not any("Traceback" in line for line in errors)
    assert "No space left" in (path / "error.log").read_text()
    assert sorted(p.name for p in path.iterdir() if "model" in p.name) == []
    assert (path / "routing" / "part-00000.parquet").exists()
    assert not (tmp_path / "results.csv").exists()


def test_failed_overwrite_keeps_the_earlier_run(disk_full, options, tmp_path, capsys):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("task: fact\n")
    (path / "precious").write_text("kept")
    assert main([*options, "--overwrite", "--output_dir", str(path)]) == 1
    kept = tmp_path / "run.replaced-1"
    assert str(kept) in capsys.readouterr().err.splitlines()[-1]
    assert (kept / "precious").read_text() == "kept"


def test_overwrite_replaces_the_earlier_run(options, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("task: fact\n")
    (path / "old").write_text("old")
    assert main([*options, "--overwrite", "--output_dir", str(path)]) == 0
    assert not (path / "old").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".results.csv.lock", "results.csv", "run"]


def test_interrupt_while_saving(monkeypatch, options, tmp_path, capsys):
    def save(self, directory, **kwargs):
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    path = tmp_path / "run"
    assert main([*options, "--output_dir", str(path)]) == 130
    assert "Interrupted" in capsys.readouterr().err
    assert not any("model" in p.name for p in path.iterdir())
