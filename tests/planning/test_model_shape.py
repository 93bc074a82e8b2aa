"""Counts of parameters: published ones, the real model's, and the real optimizer's."""

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import molf
from checkpoints import make_model
from molf.planning.model_shape import describe_model
from molf.planning.workload import Workload
from plan_memory import method_config

QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "num_key_value_heads": 2,
}
# Sizes of the published config.json, and the published number of parameters.
PUBLISHED = {
    "Qwen2.5-1.5B": (
        QWEN
        | {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
        },
        1_543_714_304,
    ),
    "Qwen2.5-3B": (
        QWEN
        | {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
        },
        3_085_938_688,
    ),
    "gemma-3-1b-pt": (
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
        },
        999_885_952,
    ),
}


def workload(method, **options):
    config = method_config(method, **options)
    return Workload(method=method, config=config, batch_size=1, length=8)


def make_config(sizes):
    sizes = dict(sizes)
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    sizes, parameters = PUBLISHED[name]
    shape = describe_model(make_config(sizes), workload("fft"))
    assert shape.parameters == shape.trained == parameters
    assert shape.tied


def test_parts_of_qwen():
    """By hand: per layer q and o h x h, k and v h x 256, biases of q, k and v; three of h x m."""
    sizes, _ = PUBLISHED["Qwen2.5-1.5B"]
    shape = describe_model(make_config(sizes), workload("molf", ranks=(128,)))
    parts = {part.name: part.parameters for part in shape.parts}
    h, m, kv = 1536, 8960, 2 * 128
    assert parts == {
        "embeddings": 151936 * h,
        "head": 0,
        "attention": 28 * (2 * h * h + 2 * h * kv + h + 2 * kv),
        "mlp": 28 * 3 * h * m,
        "norms": 28 * 2 * h + h,
        "other": 0,
    }
    assert shape.layers == 28 * 7
    assert shape.experts == {
        "full": parts["attention"] + parts["mlp"],
        "lora0_r128": 28 * 128 * (2 * (h + h) + 2 * (h + kv) + 3 * (h + m)),
        "not routed": parts["embeddings"] + parts["norms"],
    }


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3", "gpt2"])
def test_real_models(architecture):
    """Every parameter is counted in one part, whatever the architecture calls its modules."""
    model = make_model(architecture)
    shape = describe_model(model.config, workload("fft"))
    assert shape.parameters == model.num_parameters() == sum(p.parameters for p in shape.parts)
    parts = {part.name: part.parameters for part in shape.parts}
    assert parts["other"] == 0
    assert min(parts[name] for name in ("embeddings", "attention", "mlp", "norms")) > 0
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    assert shape.tied == tied
    assert parts["head"] == (0 if tied else head.numel())
    assert shape.weight_bytes == sum(
        t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers())
    )


@pytest.mark.parametrize("freeze_rest", [None, True])
def test_experts_of_molf(tiny, freeze_rest):
    shape = describe_model(tiny, workload("molf", ranks=(4, 8), freeze_rest=freeze_rest))
    model = AutoModelForCausalLM.from_config(tiny)
    config = molf.MoLFConfig(ranks=(4, 8), freeze_rest=freeze_rest)
    optimizer = molf.MoLFAdamW.from_model(model, config)
    routed = [group for group in optimizer.param_groups if group["layer"]]
    rest = [group for group in optimizer.param_groups if not group["layer"]]
    factors = [optimizer.lora_factors(group["layer"]) for group in routed]
    assert shape.layers == len(routed)
    assert shape.experts == {
        "full": sum(p.numel() for group in routed for p in group["params"]),
        "lora0_r4": sum(A.numel() + B.numel() for (A, B), _ in factors),
        "lora1_r8": sum(A.numel() + B.numel() for _, (A, B) in factors),
        "not routed": sum(p.numel() for group in rest for p in group["params"]),
    }
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(part.trained for part in shape.parts) == trained
    assert shape.trained == sum(shape.experts.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters(untied, dtype):
    """lora and molf-e: PEFT's own count, and the bytes of the model with its adapter in it."""
    plain = AutoModelForCausalLM.from_config(untied, dtype=getattr(torch, dtype))
    config = molf.MoLFConfig(ranks=(4, 8), freeze_base=True)
    model = molf.with_adapter(plain, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    planned = Workload(method="molf-e", config=config, batch_size=1, length=8, dtype=dtype)
    shape = describe_model(untied, planned)
    assert shape.trained == trained
    assert shape.experts == {"lora0_r4": trained // 3, "lora1_r8": trained // 3 * 2}
    assert shape.weight_bytes == sum(
        t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers())
    )
    assert not any(part.trained for part in shape.parts)

    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_config(untied), lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert describe_model(untied, workload("lora", ranks=(8,))).experts == {"adapter": trained}


def test_decoder_layers_and_the_rest(untied):
    model = AutoModelForCausalLM.from_config(untied)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    buffers = sum(t.numel() * t.itemsize for t in model.buffers())
    shape = describe_model(untied, workload("fft"))
    assert shape.outside == model.num_parameters() - layers
    assert shape.outside_bytes == 4 * shape.outside + buffers
    assert shape.layer_bytes == 4 * layers // 3
    assert shape.trained_tensors == len(list(model.parameters()))
    assert shape.routed == ()
