"""What a run says of the fused experts of a mixture is what happens to them."""

import re

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tiny_models import byte_level_tokenizer


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
        ("hybrid --assignment FILE", "cannot be assigned: they take plain AdamW steps"),
        ("hybrid --assignment FILE --freeze_rest", "cannot be assigned: they stay frozen"),
    ],
)
def test_fused_experts(mixture, options, record, workplace, capsys, method, said):
    patterns = workplace / "assignment-of-mixture.yaml"
    patterns.write_text("full: [v_proj]\ndefault: {r: 2}\n")
    method, place = method.replace("FILE", str(patterns)), method.replace(" ", "")
    arguments = [*options, "--method", *method.split(), "--warmup_ratio", "0"]
    arguments[arguments.index("--model") + 1] = str(mixture)
    if method.startswith("molf-e"):
        arguments[arguments.index("--ranks") + 1] = "2,4"
    run = record(arguments, workplace / f"mixture-{place}")
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


SIZES = {
    "vocab_size": 512, "bos_token_id": None, "eos_token_id": 0, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip


def refused(options, model, path, capsys, *more):
    from molf.cli import main

    model.save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    arguments = [*options, *more, "--output_dir", str(path.parent / "run")]
    arguments[arguments.index("--model") + 1] = str(path)
    assert main(arguments) == 2
    assert not (path.parent / "run").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("dropout", ["0", "0.05"])
def test_dense_layers_that_peft_takes_for_experts(options, tmp_path, capsys, dropout):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **SIZES, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=1, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    more = ["--method", "lora", "--lora_dropout", dropout]
    said = refused(options, DeepseekV3ForCausalLM(config), tmp_path / "base", capsys, *more)
    assert "Leave these out with --exclude_modules down_proj,gate_proj,up_proj." in said


def test_a_balancing_loss_that_the_trainer_cannot_compute(options, tmp_path, capsys):
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    config = GraniteMoeConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    model = GraniteMoeForCausalLM(config)
    said = refused(options, model, tmp_path / "base", capsys, "--method", "fft")
    assert "cannot compute the loss that balances the experts of GraniteMoeForCausalLM" in said
    assert "--training_args.router_aux_loss_coef 0." in said
