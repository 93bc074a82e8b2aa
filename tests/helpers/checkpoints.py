"""Tiny random checkpoints of several architectures, and a few facts to train them on."""

import json

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tiny_models import byte_level_tokenizer

NAMES = ("Anna", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irma", "Jonas")
_TOWNS = ("Paris", "Rome", "London", "Lisbon")

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def make_model(architecture, **sizes):
    """A random model; its vocabulary holds the tokenizer's."""
    torch.manual_seed(0)
    common = {"vocab_size": 512, "bos_token_id": None, "eos_token_id": 0}
    sizes = {**_SIZES, **sizes}
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **common, **sizes))
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **common, **sizes))
    if architecture == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(head_dim=8, pad_token_id=1, **common, **sizes))
    if architecture == "gpt2":
        dropout = {name: size for name, size in sizes.items() if name.endswith("pdrop")}
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **common, **dropout)
        )
    raise ValueError(architecture)


def write_checkpoint(path, architecture="qwen2", dtype=torch.float32, **sizes):
    make_model(architecture, **sizes).to(dtype).save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return path


def write_facts(path, count=12):
    """Requests in CounterFact's layout: everybody moves to another town."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            true, new = _TOWNS[i % 4], _TOWNS[(i + 1) % 4]
            rewrite = {
                "prompt": "{} lives in",
                "subject": f"{NAMES[i % len(NAMES)]} {i}",
                "target_true": {"str": true},
                "target_new": {"str": new},
            }
            record = {
                "requested_rewrite": rewrite,
                "paraphrase_prompts": [f"The home of {rewrite['subject']} is"],
                "neighborhood_prompts": [f"{NAMES[(i + 3) % len(NAMES)]} works in"],
            }
            file.write(json.dumps(record) + "\n")
    return path
