import pytest
import torch

torch.set_num_threads(1)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="session")
def tiny():
    from transformers import Qwen2Config

    return Qwen2Config(vocab_size=700, tie_word_embeddings=True, **SIZES)


@pytest.fixture(scope="session")
def untied():
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=700, tie_word_embeddings=False, **SIZES)
