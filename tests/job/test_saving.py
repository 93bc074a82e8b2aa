"""The saved checkpoint: plain, exact, whole or not there."""

import errno
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoints import write_checkpoint
from molf.cli import main
from recorded import PROBE, logits_of

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


def earlier_run(path):
    path.mkdir()
    (path / "config.yaml").write_text("method: molf\nrun:\n  task: {}\n")
    (path / "environment.json").write_text("{}")
    (path / "error.log").write_text("old")


def test_disk_full_keeps_the_weights(disk_full, options, tmp_path, capsys):
    """transformers can save nothing: the weights alone are written, and the configuration."""
    (tmp_path / "other").mkdir()
    given = ["--output_dir", str(tmp_path / "run"), "--fallback_dir", str(tmp_path / "other")]
    assert main([*options, *given]) == 1
    (kept,) = (tmp_path / "other").iterdir()
    assert f"was saved in {kept / 'model'} instead, and verified" in capsys.readouterr().err
    assert (kept / "config.yaml").is_file()
    AutoModelForCausalLM.from_pretrained(kept / "model")


def test_failed_overwrite_keeps_the_earlier_run(disk_full, options, tmp_path, capsys):
    path = tmp_path / "run"
    earlier_run(path)
    assert main([*options, "--overwrite", "--output_dir", str(path)]) == 1
    kept = tmp_path / "run.replaced-1"
    assert str(kept) in capsys.readouterr().err.splitlines()[-1]
    assert (kept / "error.log").read_text() == "old"


def test_overwrite_replaces_the_earlier_run(options, tmp_path):
    path = tmp_path / "run"
    earlier_run(path)
    assert main([*options, "--overwrite", "--output_dir", str(path)]) == 0
    assert not (path / "error.log").exists()
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


@pytest.mark.parametrize("option", ["data", "model", "forgetting_data"])
def test_what_a_run_reads_is_not_overwritten_by_it(options, facts, base, tmp_path, capsys, option):
    path = tmp_path / "run"
    earlier_run(path)
    given = path / "model"
    if option == "model":
        shutil.copytree(base, given)
    else:
        given.mkdir()
        given = given / "file.jsonl"
        given.write_text(facts.read_text())
    arguments = [*options, "--forgetting_data", str(facts)]
    arguments[arguments.index(f"--{option}") + 1] = str(given)
    assert main([*arguments, "--overwrite", "--output_dir", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{option} {given} lies in output_dir {path}" in error
    assert given.exists()


def test_overwritten_link_stays_a_link(options, tmp_path):
    (tmp_path / "scratch").mkdir()
    earlier_run(tmp_path / "scratch" / "real")
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "scratch" / "real")
    assert main([*options, "--overwrite", "--output_dir", str(link)]) == 0
    assert link.is_symlink()
    assert (link / "eval.json").is_file()
    names = sorted(p.name for p in (tmp_path / "scratch").iterdir())
    assert names == [".results.csv.lock", "real", "results.csv"]


def test_row_that_cannot_be_added_does_not_fail_a_run(monkeypatch, options, tmp_path, capsys):
    def append(path, row):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("molf.job.records.append_result", append)
    path = tmp_path / "run"
    earlier_run(path)
    assert main([*options, "--overwrite", "--output_dir", str(path)]) == 0
    error = capsys.readouterr().err
    assert "warning: The run is complete, but its row was not added to" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    assert not (path / "error.log").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signal_ends_a_run_as_an_interrupt_does(monkeypatch, options, tmp_path, capsys, name, code):
    from molf.job import run_steps

    def killed(*given, **options):
        signal.raise_signal(getattr(signal, name))
        raise AssertionError("the signal did nothing")

    monkeypatch.setattr(run_steps, "run_training", killed)
    number = getattr(signal, name)
    usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(number, usual)  # under nohup, and in the background, they are ignored
    path = tmp_path / "run"
    earlier_run(path)
    try:
        assert main([*options, "--overwrite", "--output_dir", str(path)]) == code
        assert signal.getsignal(number) == usual
    finally:
        signal.signal(number, before)
    error = capsys.readouterr().err
    assert "Interrupted; the written files are in" in error
    assert "The earlier run is kept in" in error
