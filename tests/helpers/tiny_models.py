"""Tiny random models and tokenizers trained on a few lines, made on the spot."""

from functools import lru_cache

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

LINES = [
    "The capital of France is Paris and the capital of Italy is Rome.",
    "The mother tongue of Anna is French, but Bruno speaks English at home.",
    "Paris, Rome, London and Lisbon are large towns; Paris is the largest.",
    "A man walked to the old bridge and looked at the water for a while.",
    "What is the colour of the sky? The sky is blue. What is two plus two? Four.",
    "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\nGood day<|im_end|>\n",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(*, pad=True, eos=True, bos=False, trim_offsets=False, merges=150):
    """A byte-level BPE without BOS (unless asked), like Qwen's and GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + merges,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        steps.append(
            processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 4)])
        )
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>" if eos else None,
        pad_token="<|pad|>" if pad else None,
        bos_token="<|bos|>" if bos else None,
    )


def piece_tokenizer(*, merges=True, lines=LINES):
    """A SentencePiece-style BPE: prepended word boundary, BOS, like Llama's and Gemma's.

    Without merges every character, the word boundary too, is a token of its own. Characters that
    `lines` do not hold are unknown.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Words are cut before their boundary for training only, so that no merge crosses it.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=280 if merges else 1, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # so that probabilities are far from equal
}


@lru_cache
def tiny_llama(vocab_size=512, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, **_SIZES)
    return LlamaForCausalLM(config).eval()


@lru_cache
def tiny_qwen2(vocab_size=512, seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=vocab_size, bos_token_id=None, eos_token_id=0, **_SIZES)
    return Qwen2ForCausalLM(config).eval()


@torch.no_grad()
def next_log_probs(model, ids):
    """Log-probabilities of the token after `ids`, one sequence at a time."""
    return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
