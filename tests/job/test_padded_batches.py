"""Runs of models whose batches count: measured alike at any batch size, or refused."""

import json

import pytest
import torch

from molf.cli import main
from tiny_models import byte_level_tokenizer


@pytest.fixture(scope="module")
def rwkv(workplace):
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48}
    config = RwkvConfig(
        vocab_size=512, num_hidden_layers=2, bos_token_id=0, eos_token_id=0, **sizes
    )
    path = workplace / "rwkv"
    RwkvForCausalLM(config).save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return path


def test_metrics_do_not_depend_on_the_batch_size(rwkv, facts, tmp_path, capsys):
    found = []
    for size in (1, 8):
        out = tmp_path / str(size)
        how = ["--per_device_eval_batch_size", str(size), "--output_dir", str(out)]
        how += ["--max_samples", "6"]
        assert main(["eval", str(rwkv), "--task", "fact", "--data", str(facts), *how]) == 0
        found.append(json.loads((out / "eval.json").read_text())["metrics"])
    assert "The output of RwkvForCausalLM depends on the rest of a batch" in capsys.readouterr().err
    for name, one in found[0].items():
        assert one["value"] == pytest.approx(found[1][name]["value"], abs=1e-5), name


def test_training_where_padding_would_count(options, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("molf.job.opening.right_padding_counts", lambda model, pad_id: True)
    out = tmp_path / "run"
    assert main([*options, "--output_dir", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "Qwen2ForCausalLM takes the padding after a text into account" in error
    assert "--per_device_train_batch_size 1" in error
    assert not out.exists()
    one = ["--per_device_train_batch_size", "1", "--method", "dora"]
    assert main([*options, *one, "--dry_run"]) == 0
