"""Joined examples have the loss and gradient of padded ones, or the model is refused by name."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from molf.errors import InputError
from molf.job.loss_check import check_joined
from molf.measure.causality import check_causal

_COMMON = {"vocab_size": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "intermediate_size": 48, **_SIZES}
_EXPERTS = {"num_local_experts": 4, "num_key_value_heads": 2, "output_router_logits": True}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
    "num_key_value_heads": 2,
}
KINDS = {
    "Llama": _HEADS,
    "Qwen2": {"num_key_value_heads": 2, **_HEADS},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # learned positions
    "Gemma2": {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4, **_HEADS},
    "Mixtral": {**_HEADS, **_EXPERTS},
    "Mamba": {"state_size": 8, **_SIZES},
    "Rwkv": {"attention_hidden_size": 32, "intermediate_size": 48, **_SIZES},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # attends across examples
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4, **_SIZES},
    "Qwen3Next": {**_HEADS, **_LINEAR},
}
EXAMPLES = [[7, 8, 9, 10, 11, 12, 13], [3, 4, 0], [400], [5, 6, 21, 22, 23, 24, 25, 26, 27, 0]]


def make(name, dtype=torch.float32, **further):
    torch.manual_seed(0)
    sizes = {**_COMMON, **KINDS.get(name, {}), **further}
    config = getattr(transformers, f"{name}Config")(**sizes)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def loss_and_gradients(model, *, joined):
    """Of SFTTrainer's pass: the mean over tokens with a label, and the loss of the experts."""
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in EXAMPLES]
    rows[0]["labels"][1:4] = [-100] * 3  # a prompt
    batch = DataCollatorForLanguageModeling(1, padding_free=joined)(rows)
    add_fused_lm_head(model)
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    labels = (batch["labels"][..., 1:] != -100).sum()
    loss = -outputs.log_probs.sum() / labels
    if model.config.model_type == "mixtral":
        loss = loss + 0.1 * outputs.aux_loss
    model.zero_grad()
    loss.backward()
    return loss.item(), labels.item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPT2", "Gemma2", "Mixtral"])
def test_joined_examples_have_the_same_loss_and_gradient(name):
    model = make(name).eval()  # no dropout
    check_joined("x", model, 1, 64)
    padded, joined = (loss_and_gradients(model, joined=joined) for joined in (False, True))
    assert joined[0] == pytest.approx(padded[0], rel=1e-5)
    assert joined[1] == padded[1] == 3 + 2 + 9
    for one, other in zip(joined[2], padded[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Mamba", "Rwkv", "Bloom", "OPT"])
def test_models_that_mix_examples_are_refused(name, dtype):
    with pytest.raises(InputError, match=f"model tiny: in {name}ForCausalLM, joined examples"):
        check_joined("tiny", make(name, dtype), 1, 64)


def test_reason_of_a_model_that_fails():
    """Without its kernels, linear attention cannot separate examples.

    transformers 5.13 mixes them, later releases refuse.
    """
    words = r"Qwen3NextForCausalLM(, joined examples change each other's loss| fails on .*conv1d)"
    with pytest.raises(InputError, match=words):
        check_joined("tiny", make("Qwen3Next"), 1, 64)


def test_low_precision_is_accepted_and_the_model_is_left_as_it_was():
    model = make("Llama", torch.bfloat16)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_joined("x", model, 1, 64)
    assert modes == [module.training for module in model.modules()]
    assert not model.get_input_embeddings()._forward_hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_rows_above_the_model_s_positions():
    """Tables of positions are read from 0 in each example; a mask of fixed size is refused."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    model = make("GPTNeo", attention_types=[[["global", "local"], 1]], **sizes)
    check_joined("x", model, 1, 64)
    with pytest.raises(InputError, match="GPTNeoForCausalLM fails on joined examples"):
        check_joined("x", model, 1, 65)
    check_joined("x", make("GPT2", n_positions=64), 1, 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_later_tokens_is_refused(dtype):
    """Such as EmbeddingGemma, whose configuration is that of Gemma 3 otherwise."""
    text = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4, **_HEADS}
    torch.manual_seed(0)
    for bidirectional in (False, True):
        config = transformers.Gemma3TextConfig(
            use_bidirectional_attention=bidirectional, **_COMMON, **text
        )
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        if not bidirectional:
            check_causal("x", model, 1)
            continue
        with pytest.raises(InputError, match="model x: in Gemma3ForCausalLM, tokens attend to"):
            check_causal("x", model, 1)


def test_other_logits_alone_do_not_make_a_model_bidirectional(monkeypatch):
    """As in a mixture, where rounding gives a token other experts; no token reads a later one."""
    model = make("GPT2")
    modes = [module.training for module in model.modules()]
    monkeypatch.setattr("molf.measure.causality.differ", lambda *_: True)
    check_causal("x", model, 1)
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_models_that_continue_text_are_accepted(name):
    check_causal("x", make(name), 1)
    check_causal("x", make("GPT2", n_positions=4), 1)
