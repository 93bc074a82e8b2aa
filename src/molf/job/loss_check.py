"""Check that the trainer computes the loss of the model that is evaluated and saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from molf.errors import InputError
from molf.measure.inference import inference, last_logits
from molf.planning.reach import ParameterReads, evaluation_mode

_MOST_NATS = 0.05  # mean over tokens; rounding to bfloat16 causes far smaller differences


def check_loss(
    name: str, model: Any, ids: Sequence[int], pad_id: int, router_coefficient: float | None = None
) -> None:
    """Compare the loss of TRL's trainer with that of the model's own logits.

    The trainer multiplies the last hidden states by the output embeddings. For a model with other
    operations there (layers or factors in the head), it would optimize a wrong loss.

    Args:
        name: The model, for messages.
        model: A plain model, on its device.
        ids: Token ids of an example.
        pad_id: Any id of the vocabulary.
        router_coefficient: TRL's `router_aux_loss_coef`, the weight of a mixture's balancing loss;
            0 for none, None for the model's own.

    Raises:
        InputError: The two differ, or the trainer's cannot be computed.
    """
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:  # a private name of TRL; releases without it use the model's own loss
        return
    if len(ids) < 2:
        return
    targets = torch.tensor([list(ids)], device=model.device)
    given = {"input_ids": targets, "attention_mask": torch.ones_like(targets)}
    kind = type(model).__name__
    with inference(model):  # restores the modes
        evaluation_mode(model)
        with ParameterReads() as needed:
            logits = last_logits(model, [ids], pad_id, keep=len(ids))[0, :-1].float()
        own = torch.nn.functional.cross_entropy(logits, targets[0, 1:]).item()
        add_fused_lm_head(model)
        try:
            with ParameterReads() as reached:
                log_probs = model(**given, labels=targets, fused_lm_head=True).log_probs
            trained = -log_probs.float().sum().item() / (len(ids) - 1)
        except (AttributeError, RuntimeError, TypeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"model {name}: TRL's trainer cannot compute the loss of {kind}: {reason}"
            ) from error
        else:
            if _balances(model, router_coefficient):
                _check_balance(name, model, {**given, "labels": targets})
        finally:
            del model.forward  # set on this instance by add_fused_lm_head
    skipped = [n for n, p in model.named_parameters() if p in needed.seen - reached.seen]
    if skipped or abs(trained - own) > _MOST_NATS * max(1.0, abs(own)):
        where = f", such as {skipped[0]}" if skipped else ""
        raise InputError(
            f"model {name}: TRL's trainer skips operations of {kind} between its last layer and "
            f"its output embeddings{where}: its loss on an example is {trained:.4g} nats per "
            f"token, that of the model {own:.4g}. It would train another model."
        )


def _check_balance(name: str, model: Any, given: dict[str, Any]) -> None:
    """Check that TRL can compute the loss that balances the experts.

    Raises:
        InputError: It cannot.
    """
    try:
        model(**given, fused_lm_head=True, output_router_logits=True)
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"model {name}: TRL's trainer cannot compute the loss that balances the experts of "
            f"{type(model).__name__}: {reason}. Train without it: "
            "--training_args.router_aux_loss_coef 0."
        ) from error


def _balances(model: Any, coefficient: float | None) -> bool:
    """Return whether TRL's trainer adds a loss that balances the experts."""
    text = model.config.get_text_config()
    own = getattr(text, "router_aux_loss_coef", 0.0)
    chosen = own if coefficient is None else coefficient
    return hasattr(text, "output_router_logits") and chosen != 0.0
