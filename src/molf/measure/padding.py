"""Test of whether padding in a batch changes a model's output for a text.

Most models mask padding and count positions without it. Some recurrent models read it (RWKV,
xLSTM), decoders of BART's family count it as positions, and others compress attention in blocks
that it shifts. A model is tested once, with two short rows, instead of by a list of classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from molf.core.model.quantised import quantisation_of
from molf.measure.inference import inference, inner_model, last_logits, pad_left

_LENGTHS = (33, 6)  # their difference is odd: it shifts blocks of any even size
_EXACT = 1e-3  # of the largest logit; another order of float32 sums changes less
_ROUNDED = 0.03  # the same for lower precision and quantised weights

_results: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()


ANY, EQUAL, SINGLE = "any", "equal", "single"
"""Rows allowed in one batch: any, rows of equal length, or a single row."""


def logits_batches(model: Any, pad_id: int) -> str:
    """Test which rows may share a batch without a change of their last logits.

    Args:
        model: A transformers causal language model, on its device.
        pad_id: The padding token, added before shorter rows.

    Returns:
        ANY, EQUAL or SINGLE. The first result for a model that is not ANY also warns.
    """

    def logits(rows: list[list[int]]) -> Tensor:
        return last_logits(model, rows, pad_id, keep=1)[:, -1]

    return _test_batches(model, "logits", logits, pad_id)


def generation_batches(model: Any, pad_id: int) -> str:
    """Test the first two generated tokens in the same way: the second one uses the cache."""

    def logits(rows: list[list[int]]) -> Tensor:
        from transformers import GenerationConfig

        inner = inner_model(model)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=2,
            min_new_tokens=2,
            pad_token_id=pad_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        made = inner.generate(
            **pad_left(inner, rows, pad_id), generation_config=settings, synced_gpus=False
        )
        return torch.cat(made.logits, dim=-1)

    return _test_batches(model, "generation", logits, pad_id)


def right_padding_counts(model: Any, pad_id: int) -> bool:
    """Return whether a row's logits depend on padding after it, which training batches have."""

    def logits(rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        ids = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        found = model(**inputs, use_cache=False).logits
        return torch.cat([found[i, : len(row)] for i, row in enumerate(rows)])

    return _differs(model, logits, short_rows(model, pad_id))


def short_rows(model: Any, pad_id: int) -> list[list[int]]:
    """Return a row of 33 different tokens, and one of 6."""
    return _rows(model, pad_id, _LENGTHS)


def _test_batches(
    model: Any, what: str, logits: Callable[[list[list[int]]], Tensor], pad_id: int
) -> str:
    """Return the result of a test, run once per model."""
    inner = inner_model(model)
    answers = _results.setdefault(inner, {})
    if what not in answers:
        answers[what] = ANY
        if _differs(model, logits, _rows(model, pad_id, _LENGTHS)):
            same = _rows(model, pad_id, (_LENGTHS[1], _LENGTHS[1]))
            answers[what] = SINGLE if _differs(model, logits, same) else EQUAL
            batches = "one by one" if answers[what] == SINGLE else "in batches of equal length"
            warnings.warn(
                f"The output of {type(inner).__name__} depends on the rest of a batch ({what}): "
                f"texts are evaluated {batches}, which takes longer.",
                stacklevel=4,
            )
    return answers[what]


def _rows(model: Any, pad_id: int, lengths: Sequence[int]) -> list[list[int]]:
    """Return rows of different tokens with the given lengths."""
    size = inner_model(model).get_input_embeddings().weight.shape[0]
    tokens = [index for index in range(min(size, 100)) if index != pad_id]
    return [
        [tokens[(7 * i + 5 * row) % len(tokens)] for i in range(length)]
        for row, length in enumerate(lengths)
    ]


def _differs(
    model: Any, logits: Callable[[list[list[int]]], Tensor], rows: Sequence[list[int]]
) -> bool:
    with inference(model):
        together = logits(list(rows)).float()
        alone = torch.cat([logits([row]) for row in rows]).float()
    return differ(model, together, alone)


def differ(model: Any, together: Tensor, alone: Tensor) -> bool:
    """Return whether a model's logits of the same texts differ by more than rounding."""
    exact = model.dtype == torch.float32 and quantisation_of(inner_model(model).config) is None
    difference = (together - alone).abs().max() / alone.abs().max()
    return bool(difference > (_EXACT if exact else _ROUNDED))
