"""`molf export`: what it writes is what the run trained, in the type asked for, whole or not."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import write_checkpoint
from molf.cli import main
from recorded import logits_of


@pytest.fixture
def export(tmp_path, capsys):
    """Export into a fresh directory; return it."""

    def run(path, *arguments):
        out = tmp_path / "exported"
        assert main(["export", str(path), *arguments, "--output_dir", str(out)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(out)
        return out

    return run


def listing(path):
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model(run_of, export, dtype):
    run = run_of("molf-e")
    out = export(run.path, "--dtype", dtype)
    assert listing(out) == sorted([*listing(run.path / "model"), "molf_export.json"])
    before = load_file(run.path / "model" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(getattr(torch, dtype)))
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits_of(model), run.trained_logits, rtol=0, atol=0.05)


def test_default_place_and_type(run_of, capsys):
    run = run_of("molf")
    assert main(["export", str(run.path)]) == 0
    out = run.path / "model-float32"
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(out)), run.trained_logits)
    for entry in out.iterdir():
        entry.unlink()
    out.rmdir()


@pytest.mark.parametrize("method", ["molf-e", "lora", "pissa"])
def test_adapter(run_of, base, export, method):
    """It loads onto the base by PEFT; the numbers are those of the run, rounded once."""
    import peft

    run = run_of(method)
    out = export(run.path, "--what", "adapter", "--dtype", "bfloat16")
    assert listing(out) == sorted([*listing(run.path / "adapter"), "molf_export.json"])
    before = load_file(run.path / "adapter" / "adapter_model.safetensors")
    after = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(after[n], t.to(torch.bfloat16)) for n, t in before.items())
    assert before.keys() == after.keys()
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    torch.testing.assert_close(logits_of(model), run.trained_logits, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("molf", ["folds its experts into the weights", "--what model", "molf-e"]),
        ("molf-dropout", ["also trained weights outside of the adapter", "--what model"]),
        ("fft", ["method=fft trains the weights themselves", "--what model"]),
    ],
)
def test_no_adapter(run_of, tmp_path, capsys, name, words):
    out = tmp_path / "out"
    given = ["export", str(run_of(name).path), "--what", "adapter", "--output_dir", str(out)]
    capsys.readouterr()  # of the run
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in [str(run_of(name).path), *words]:
        assert word in error
    assert not out.exists()


def test_existing_output_needs_overwrite(run_of, export, tmp_path, capsys):
    run = run_of("lora")
    out = export(run.path)
    again = ["export", str(run.path), "--dtype", "bfloat16", "--output_dir", str(out)]
    assert main(again) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert main([*again, "--overwrite"]) == 0
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert listing(tmp_path) == ["exported"]


@pytest.mark.parametrize("place", ["", "model", "adapter", "model/sub", "routing/x"])
def test_what_is_not_an_export_is_never_replaced(run_of, capsys, tmp_path, place):
    run = run_of("lora").path
    given = ["export", str(run), "--output_dir", str(run / place), "--overwrite"]
    assert main(given) == 2
    assert "is the run's own" in capsys.readouterr().err
    (tmp_path / "thesis.tex").touch()
    given = ["export", str(run), "--output_dir", str(tmp_path), "--overwrite"]
    assert main(given) == 2
    assert "is not an export" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_other_checkpoints_are_never_replaced(run_of, base, tmp_path, capsys, what):
    """Every checkpoint has a config.json, every adapter an adapter_config.json."""
    run = run_of("lora").path
    other = tmp_path / "other"
    shutil.copytree(run / what, other)
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    given = ["export", str(run), "--what", what, "--output_dir", str(other), "--overwrite"]
    assert main(given) == 2
    assert "it has no molf_export.json" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before


def test_export_with_foreign_files_is_not_replaced(run_of, export, capsys):
    run = run_of("lora").path
    out = export(run)
    (out / "notes.txt").touch()
    assert main(["export", str(run), "--output_dir", str(out), "--overwrite"]) == 2
    assert "it holds notes.txt" in capsys.readouterr().err


def test_card_may_be_gone(run_of, export, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of("lora").path, run)
    (run / "model" / "README.md").unlink()
    assert "README.md" not in listing(export(run))


def test_run_that_was_not_saved(run_of, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run_of("lora").path / "config.yaml").read_text())
    assert main(["export", str(tmp_path)]) == 2
    assert "has no model/" in capsys.readouterr().err


@pytest.fixture(scope="module")
def half(record, facts, workplace):
    """Runs on a base stored in bfloat16, and so saved in it."""
    model = write_checkpoint(workplace / "base-half", dtype=torch.bfloat16)
    arguments = ["train", "--task", "fact", "--model", str(model), "--data", str(facts)]
    arguments += ["--max_steps", "2", "--lora_learning_rate", "3e-2", "--warmup_ratio", "0"]
    runs = {}
    for method in ("molf-e", "molf"):
        given = [*arguments, "--method", method, "--ranks", "2,4"]
        runs[method] = record(given, workplace / f"half-{method}")
    return runs


def test_adapter_is_merged_again_where_the_saved_model_was_rounded(half, export, capsys):
    run = half["molf-e"]
    out = export(run.path, "--dtype", "float32")
    saved = load_file(run.path / "model" / "model.safetensors")
    exported = load_file(out / "model.safetensors")
    assert saved["model.norm.weight"].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits_of(model), run.adapter_logits, rtol=1e-5, atol=1e-6)
    rounded = AutoModelForCausalLM.from_pretrained(run.path / "model", dtype=torch.float32)
    assert (logits_of(rounded) - run.adapter_logits).abs().max() > 1e-4


def test_adapter_is_not_merged_into_a_base_that_has_changed(half, tmp_path, capsys):
    run = shutil.copytree(half["molf-e"].path, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["run"]["model"]["contents"] = "sha256:0"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    given = ["export", str(run), "--output_dir", str(tmp_path / "out"), "--dtype"]
    assert main([*given, "float32"]) == 2
    assert f"has changed since {run} was trained from it" in capsys.readouterr().err
    assert main([*given, "bfloat16"]) == 0  # of the saved model alone


def test_wider_type_without_wider_numbers_warns(half, export, capsys):
    run = half["molf"].path
    assert main(["export", str(run), "--dtype", "float32"]) == 0
    assert "nothing more exact was kept" in capsys.readouterr().err
    saved = load_file(run / "model" / "model.safetensors")
    exported = load_file(run / "model-float32" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor.float()) for name, tensor in saved.items())


def test_numbers_that_do_not_fit_are_not_written(run_of, tmp_path, capsys):
    run = tmp_path / "run"
    for what, file in (("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        (run / what).mkdir(parents=True)
        for entry in (run_of("lora").path / what).iterdir():
            (run / what / entry.name).write_bytes(entry.read_bytes())
        tensors = load_file(run / what / file)
        name = sorted(tensors)[0]
        tensors[name] = tensors[name] + 1e6
        save_file(tensors, run / what / file, {"format": "pt"})
    (run / "config.yaml").write_text((run_of("lora").path / "config.yaml").read_text())
    for what in ("model", "adapter"):
        given = ["export", str(run), "--what", what, "--dtype", "float16"]
        assert main(given) == 1
        assert "fit torch.float16" in capsys.readouterr().err
        assert listing(run) == ["adapter", "config.yaml", "model"]


def test_what_a_killed_export_left_is_removed(run_of, export):
    """Whatever it was: the next may be of another type, and go to another place."""
    run = run_of("molf")
    for name in (".model-float16.123.tmp", ".model-float16.124.tmp.replaced", ".model.125.tmp"):
        (run.path / name).mkdir()
        (run.path / name / "model.safetensors").touch()
    (run.path / "model-float16").mkdir()
    export(run.path, "--dtype", "bfloat16")
    assert not [name for name in listing(run.path) if name.startswith(".")]
    (run.path / "model-float16").rmdir()
