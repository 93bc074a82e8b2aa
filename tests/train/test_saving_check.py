"""Whatever could only fail after a training is tried before it: nothing is trained or written."""

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from molf.cli import main

UNSAVABLE = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}
EXACT = json.dumps(UNSAVABLE).replace(", ", " ,  ")  # as only this file has it


@pytest.fixture
def train(facts, tmp_path):
    def run(base, *options, code=0):
        path = tmp_path / "run"
        arguments = ["train", "--task", "fact", "--model", str(base), "--data", str(facts)]
        arguments += ["--ranks", "4", "--max_steps", "2", "--output_dir", str(path)]
        assert main([*arguments, *options]) == code
        return path

    return run


@pytest.fixture
def own_base(tmp_path):
    return write_checkpoint(tmp_path / "base")


@pytest.mark.parametrize("method", ["fft", "molf", "lora", "molf-dropout"])
def test_generation_config_that_cannot_be_saved_is_copied(train, own_base, method):
    (own_base / "generation_config.json").write_text(EXACT)
    options = ["--lora_dropout", "0.1"] if method == "molf-dropout" else ["--method", method]
    run = train(own_base, *options, "--save_steps", "1")
    copies = sorted(run.rglob("generation_config.json"))
    assert run / "model" / "generation_config.json" in copies
    assert [copy.read_text() for copy in copies] == [EXACT] * len(copies)
    whole = [path.parent for path in copies if "checkpoint-" in path.parent.name]
    assert len(whole) == (2 if method in ("fft", "molf") else 0)  # else adapters
    assert len(list((run / "checkpoints").glob("checkpoint-*"))) == 2
    assert main(["export", str(run), "--dtype", "bfloat16"]) == 0
    assert (run / "model-bfloat16" / "generation_config.json").read_text() == EXACT


def test_generation_options_in_the_model_config_do_not_stop_a_checkpoint(train, own_base):
    (own_base / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((own_base / "config.json").read_text())
    (own_base / "config.json").write_text(json.dumps({**config, "temperature": 0.7, "top_k": 7}))
    run = train(own_base, "--save_steps", "1")
    for place in ("model", "checkpoints/checkpoint-1"):
        saved = json.loads((run / place / "generation_config.json").read_text())
        assert (saved["temperature"], saved["top_k"]) == (0.7, 7)
        GenerationConfig.from_pretrained(run / place)


@pytest.mark.parametrize("kind", [PreTrainedConfig, PreTrainedTokenizerBase])
@pytest.mark.parametrize("options", [[], ["--dry_run"]], ids=str)
def test_what_cannot_be_saved_is_refused_at_opening(
    train, own_base, monkeypatch, capsys, kind, options
):
    def save(self, directory, **given):
        raise ValueError("it is not serialisable\nbecause of that")

    monkeypatch.setattr(kind, "save_pretrained", save)
    run = train(own_base, *options, code=2)
    error = capsys.readouterr().err
    assert f"model {own_base} could not be saved after a training: it is not serial" in error
    assert "Traceback" not in error
    assert not run.exists()


@pytest.fixture
def free(monkeypatch):
    def set_free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))

    return set_free


def needed(train, base, free, capsys, *options):
    """The megabytes that the refusal of a full disk speaks of, by name."""
    free(0)
    run = train(base, *options, code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "and 0 MB are free." in error
    assert not run.exists()
    return error


@pytest.mark.parametrize("options", [[], ["--dry_run"]], ids=str)
def test_full_disk_is_refused_at_opening(train, own_base, free, capsys, options):
    assert "the run needs about" in needed(train, own_base, free, capsys, *options)


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "fft", "--dtype", "bfloat16"],
        ["--method", "molf"],
        ["--method", "molf", "--lora_dropout", "0.1"],
        ["--method", "molf-e", "--ranks", "32,64"],
        ["--method", "fft", "--save_total_limit", "1"],
        ["--save_dtype", "bfloat16", "--keep_low_halves"],
    ],
    ids=str,
)
def test_estimate_of_the_room_is_that_of_the_files(train, own_base, monkeypatch, options):
    from molf.train import job, saving_check

    estimates = []

    def check_room(base, settings, plan, steps, model):
        estimates.append(
            model + sum(saving_check.run_bytes(base.model, settings, plan, steps).values())
        )

    monkeypatch.setattr(saving_check, "_check_room", check_room)
    assert job.check_saving is saving_check.check_saving
    run = train(own_base, *options, "--save_steps", "1")
    kept = ("model", "adapter", "checkpoints", "low_halves.safetensors")
    sizes = [
        path.stat().st_size
        for path in run.rglob("*")
        if path.is_file() and path.relative_to(run).parts[0] in kept
    ]
    small = sum(
        path.stat().st_size
        for path in run.glob("checkpoints/*/*")
        if path.suffix in (".json", ".jinja", ".pth", ".bin", ".md") or path.name == "scheduler.pt"
    )  # files that do not grow with the model
    actual = sum(sizes) - small
    transient = 2 if "--save_total_limit" in options else 1
    assert actual * 0.85 < estimates[0] < actual * 1.15 * transient


def test_numbers_beyond_float16_are_refused_at_opening(train, own_base, capsys):
    tensors = load_file(own_base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, own_base / "model.safetensors", {"format": "pt"})
    run = train(own_base, "--save_dtype", "float16", code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "model.norm.weight has numbers that do not fit float16" in error
    assert not run.exists()


def test_disk_that_fills_up_meanwhile_is_one_line(train, own_base, monkeypatch, capsys):
    from molf.train.low_halves import LowHalves

    def write(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LowHalves, "write", write)
    run = train(own_base, "--save_dtype", "bfloat16", "--keep_low_halves", code=1)
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "model").exists()
