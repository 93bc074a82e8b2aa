"""Test of whether the logits of a token depend on later tokens."""

from __future__ import annotations

from typing import Any

import torch

from molf.errors import InputError
from molf.measure.inference import inference, last_logits, position_limit
from molf.measure.padding import differ, short_rows
from molf.planning.reach import evaluation_mode


def check_causal(name: str, model: Any, pad_id: int) -> None:
    """Check that the logits of a token do not depend on later tokens.

    A bidirectional model, such as one for embeddings or masked words, reads the token that it
    should predict: its loss falls without learning to continue a text.

    Args:
        name: The model, for messages.
        model: A plain model, on its device.
        pad_id: Any id of the vocabulary.

    Raises:
        InputError: They depend on later tokens.
    """
    row = short_rows(model, pad_id)[0][: position_limit(model.config)]
    first = len(row) // 2
    other = [*row[:first], *reversed(row[first:])]
    with inference(model):
        evaluation_mode(model)
        logits, changed = (
            last_logits(model, [ids], pad_id, keep=len(ids))[0, :first].float()
            for ids in (row, other)
        )
    if not differ(model, logits, changed):
        return
    # Rounding can change the experts of a mixture, and with them the logits; no gradient says so.
    inputs = {"input_ids": torch.tensor([row], device=model.device), "use_cache": False}
    modes = [(module, module.training) for module in model.modules()]
    try:
        evaluation_mode(model)
        is_read = influences(model, inputs, of=slice(first, None), on=slice(first))
    finally:
        for module, training in modes:
            module.training = training
    if is_read:
        raise InputError(
            f"model {name}: in {type(model).__name__}, tokens attend to later ones, as in models "
            "for embeddings. Its loss would be that of tokens that it reads. Give a model that "
            "continues text."
        )


def influences(model: Any, inputs: dict[str, Any], *, of: slice, on: slice) -> bool:
    """Return whether the logits of some tokens (`on`) depend on others (`of`).

    A gradient shows it exactly, with dropout too. A comparison of logits in low precision does not.
    """
    embedded: list[torch.Tensor] = []

    def keep(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1] * 1  # models change it in place

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(**inputs).logits[0, on].float()
            # Each logit with another weight: a plain sum may cancel.
            weights = torch.linspace(0.5, 1.5, logits.numel(), device=logits.device)
            (gradient,) = torch.autograd.grad((logits.flatten() * weights).sum(), embedded[:1])
    finally:
        hook.remove()
    return bool(gradient[:, of].any())
