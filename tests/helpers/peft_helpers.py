"""Small models with adapters, quantised ones too, for the tests of the adapter form."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

IDS = torch.arange(12).reshape(2, 6)


def tiny_qwen2(*, tied: bool = True, width: int = 64, layers: int = 1):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


def quantised_qwen2(original: nn.Module, kind: str, folder: Path):
    """Load a model again with quantised linear layers: `bnb4`, `bnb8` or `torchao` (int8)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "bnb8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    original.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32
    )


def logits(model: nn.Module) -> torch.Tensor:
    """Logits on `IDS` as in training: eval mode has other kernels for 4-bit layers on CPUs."""
    model.train()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def spread(model: nn.Module, seed: int = 0):
    """Give every adapter parameter random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_" in name or "hada_" in name or "delta" in name):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
