"""Tiny random multimodal checkpoints, whose texts do not reach all of their layers."""

import torch

from tiny_models import byte_level_tokenizer

_TEXT = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48}


def gemma3():
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config={**_TEXT, "num_hidden_layers": 2, "sliding_window": 16},
        vision_config={
            **_VISION,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        image_token_index=508,
        boi_token_index=509,
        eoi_token_index=510,
        eos_token_id=0,
    )


def qwen3_5():
    from transformers import Qwen3_5Config

    return Qwen3_5Config(
        text_config={
            **_TEXT,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        vision_config={**_VISION, "depth": 1, "num_heads": 4, "out_hidden_size": 32},
        image_token_id=508,
        video_token_id=509,
        vision_start_token_id=510,
        vision_end_token_id=511,
        tie_word_embeddings=True,
    )


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return Qwen2_5_VLConfig(
        text_config={**_TEXT, "num_hidden_layers": 2, "rope_parameters": rope},
        vision_config={
            **_VISION,
            "depth": 1,
            "num_heads": 4,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        image_token_id=508,
        video_token_id=509,
        vision_start_token_id=510,
        vision_end_token_id=511,
    )


def llava():
    from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig

    vision = {"num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    return LlavaConfig(
        text_config=MistralConfig(**{**_TEXT, "num_hidden_layers": 2}),
        vision_config=CLIPVisionConfig(**_VISION, **vision, projection_dim=32),
        image_token_index=508,
    )


def write_multimodal(path, config):
    """Write a checkpoint in its class's own names; return the class."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return type(model)
