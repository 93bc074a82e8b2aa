"""What a run says of the fused experts of a mixture is what happens to them."""

import re

import pytest
import torch
from tiny_models import byte_level_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM


@pytest.fixture(scope="module")
def mixture(workplace):
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=512,
            bos_token_id=None,
            eos_token_id=0,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
            max_position_embeddings=128,
        )
    )
    path = workplace / "mixture"
    model.save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("lora", "cannot be adapted: they stay frozen"),
        ("dora", "cannot be adapted: they stay frozen"),
        ("molf-e", "cannot be routed: they stay frozen"),
        ("molf-e --no-freeze_rest", "cannot be routed: they take plain AdamW steps"),
        ("molf", "cannot be routed: they take plain AdamW steps"),
        ("molf --freeze_rest", "cannot be routed: they stay frozen"),
        ("molf --lora_dropout 0.05", "cannot be routed: they take plain AdamW steps"),
        ("fft", None),
    ],
)
def test_fused_experts(mixture, options, record, workplace, capsys, method, said):
    arguments = [*options, "--method", *method.split(), "--warmup_ratio", "0"]
    arguments[arguments.index("--model") + 1] = str(mixture)
    if method.startswith("molf-e"):
        arguments[arguments.index("--ranks") + 1] = "2,4"
    run = record(arguments, workplace / f"mixture-{method.replace(' ', '')}")
    error = capsys.readouterr().err
    assert error.count("fused 3-D weights") == (said is not None)
    assert said is None or said in error
    experts = [name for name, p in run.start.items() if p.dim() == 3]
    assert len(experts) == 2
    end = run.end if run.end else dict(run.prepared.model.named_parameters())
    moved = [name for name in experts if not torch.equal(run.start[name], end[name])]
    assert len(moved) == (0 if said and "frozen" in said else 2)


def test_rank_beyond_a_layer_is_that_of_the_method(mixture, options, capsys):
    """An adapter routes nothing, and `--match` gives it another rank than `--ranks`."""
    from molf.cli import main

    arguments = [*options, "--dry_run"]
    arguments[arguments.index("--model") + 1] = str(mixture)
    arguments[arguments.index("--ranks") + 1] = "60"
    assert main([*arguments, "--method", "adalora", "--match", "parameters"]) == 0
    error = capsys.readouterr().err
    assert re.search("Rank (39|40) exceeds the smaller side of 4 of 4 adapted layers", error)
    assert "there the adapter is no longer low-rank" in error
    assert "routed" not in error
