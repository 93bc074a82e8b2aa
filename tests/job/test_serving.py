"""Adapters that vLLM cannot serve are named when they are exported."""

from __future__ import annotations

import pytest

from molf.cli import main
from molf.job.serving import vllm_faults

LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none", "use_dora": False}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 512, "use_rslora": True},
        {"modules_to_save": None, "rank_pattern": {}, "alpha_pattern": None},
        # Equal scales: alpha / r, and alpha / sqrt(r) with rsLoRA.
        {"rank_pattern": {"up": 8}, "alpha_pattern": {"up": 16}},
        {"rank_pattern": {"up": 4}, "alpha_pattern": {"up": 16}, "use_rslora": True},
    ],
)
def test_adapters_that_vllm_serves(fields):
    assert list(vllm_faults({**LORA, **fields})) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 513}, ["rank 513 exceeds 512"]),
        ({"rank_pattern": {"up": 640}, "alpha_pattern": {"up": 1280}}, ["rank 640 exceeds 512"]),
        ({"use_dora": True, "bias": "all"}, ["DoRA", "bias=all"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save (lm_head)"]),
        ({"modules_to_save": [*"abcdef"]}, ["modules_to_save (a, b, c and 3 more)"]),
        ({"rank_pattern": {"up": 8}}, ["rank_pattern"]),
        ({"alpha_pattern": {"up": 16}}, ["alpha_pattern"]),
        ({"peft_type": "ADALORA"}, ["peft_type is ADALORA"]),
    ],
)
def test_adapters_that_vllm_does_not_serve(fields, words):
    found = list(vllm_faults({**LORA, **fields}))
    assert len(found) == len(words)
    assert all(word in fault for word, fault in zip(words, found, strict=True))


@pytest.mark.parametrize(
    ("method", "reason"),
    [("lora", None), ("molf-e", None), ("dora", "it refuses DoRA"), ("adalora", "peft_type")],
)
def test_exported_adapters(run_of, method, reason, tmp_path, capsys):
    given = ["export", str(run_of(method).path), "--what", "adapter"]
    capsys.readouterr()
    assert main([*given, "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    printed = capsys.readouterr().err
    if reason is None:
        assert printed == ""
    else:
        (line,) = printed.splitlines()
        assert line.startswith("molf: warning: vLLM cannot serve this adapter beside its base: ")
        assert reason in line


def test_extracted_adapters(run_of, tmp_path, capsys):
    """Norms and embeddings cannot be served beside a base."""
    given = ["export", str(run_of("fft").path), "--what", "adapter", "--rank", "20"]
    assert main([*given, "--output_dir", str(tmp_path / "plain")]) == 0
    assert "vLLM" not in capsys.readouterr().err
    assert main([*given, "--modules_to_save", "--output_dir", str(tmp_path / "kept")]) == 0
    assert "it refuses modules_to_save (" in capsys.readouterr().err
