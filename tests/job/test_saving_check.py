"""Whatever could only fail after a training is tried before it: nothing is trained or written."""

import errno
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from checkpoints import write_checkpoint
from molf.cli import main
from slow_cases import slow_after

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


@pytest.mark.parametrize("method", slow_after(1, ["molf", "fft", "lora", "molf-dropout"]))
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
        usage = SimpleNamespace(free=size, total=10**12)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return set_free


def needed(train, base, free, capsys, *options):
    """The megabytes that the refusal of a full disk speaks of, by name."""
    free(0)
    run = train(base, *options, code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "and 0 bytes are free." in error
    assert not run.exists()
    return error


@pytest.mark.parametrize("options", [[], ["--dry_run"]], ids=str)
def test_full_disk_is_refused_at_opening(train, own_base, free, capsys, options):
    assert "the run needs about" in needed(train, own_base, free, capsys, *options)


@pytest.mark.parametrize(
    "options",
    slow_after(
        2,
        [
            ["--method", "fft", "--dtype", "bfloat16"],
            ["--method", "molf"],
            ["--method", "molf", "--lora_dropout", "0.1"],
            ["--method", "molf-e", "--ranks", "32,64"],
            ["--method", "fft", "--save_total_limit", "1"],
            ["--save_dtype", "bfloat16", "--keep_low_halves"],
        ],
    ),
    ids=str,
)
def test_estimate_of_the_room_is_that_of_the_files(train, own_base, monkeypatch, options):
    from molf.job import opening
    from molf.job.model import saving_check

    estimates = []

    def check_room(path, parts, *, option, advice):
        estimates.append(parts)

    monkeypatch.setattr(saving_check, "check_room", check_room)
    assert opening.check_saving is saving_check.check_saving
    run = train(own_base, *options, "--save_steps", "1")
    whole = {"model": "model", "adapter": "adapter", "lower halves": "low_halves.safetensors"}
    found = {name: size_of(run / part) for name, part in whole.items()}
    found["checkpoints"] = size_of(run / "checkpoints") - fixed_size(run)
    (parts,) = estimates
    if "--save_total_limit" in options:  # for a moment there is one more
        found["checkpoints"] *= 2
    for name, size in found.items():
        assert size * 0.85 <= parts[name] <= size * 1.15 + 16_000, name  # whole blocks
    assert size_of(run / "routing") <= parts["routing"]
    logs = size_of(run / "metrics.jsonl") + size_of(run / "predictions.jsonl")
    assert logs <= parts["metrics and predictions"]


def size_of(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def fixed_size(run):
    """Bytes of files in checkpoints that do not grow with the model, beside those of a model."""
    names = ("trainer_state.json", "training_args.bin", "manifest.json")
    return sum(
        path.stat().st_size
        for path in run.glob("checkpoints/**/*")
        if path.name in names or path.suffix == ".md"
    )


def test_lower_halves_of_a_float32_base_are_those_of_all_weights(train, own_base, capsys, free):
    """With an adapter, too: rounding takes something from what training left alone."""
    error = needed(train, own_base, free, capsys, "--save_dtype", "bfloat16", "--keep_low_halves")
    adapter = ["--method", "lora", "--save_dtype", "bfloat16", "--keep_low_halves"]
    other = needed(train, own_base, free, capsys, *adapter)
    part = re.search(r"lower halves [^,)]*", error)[0]
    assert part in other


def test_carried_tensors_take_room(options, tmp_path, free, capsys):
    base = write_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    tensors = load_file(base / "model.safetensors")
    tensors["mtp.weight"] = torch.zeros(5_000_000, dtype=torch.bfloat16)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    free(8_000_000)
    given = [*options]
    given[given.index("--model") + 1] = str(base)
    assert main([*given, "--output_dir", str(tmp_path / "run")]) == 2
    assert "(model 10 MB, " in capsys.readouterr().err


def test_numbers_beyond_float16_are_refused_at_opening(train, own_base, capsys):
    tensors = load_file(own_base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, own_base / "model.safetensors", {"format": "pt"})
    run = train(own_base, "--save_dtype", "float16", code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "model.norm.weight has numbers that do not fit float16" in error
    assert not run.exists()


def test_disk_that_fills_up_meanwhile_is_one_line(train, own_base, monkeypatch, capsys):
    from molf.job.model.low_halves import LowHalves

    def write(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LowHalves, "write", write)
    run = train(own_base, "--save_dtype", "bfloat16", "--keep_low_halves", code=1)
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "model").exists()
