"""Check that the trainer computes the loss of the model that is evaluated and saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from molf.errors import InputError
from molf.measure.causality import influences
from molf.measure.inference import inference, last_logits, position_limit
from molf.measure.padding import differ, short_rows
from molf.planning.reach import ParameterReads, evaluation_mode

_MOST_NATS = 0.05  # mean over tokens; rounding to bfloat16 causes far smaller differences
_LARGEST_TABLE = 16_384  # positions; a square table of more would take gigabytes


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
    missed = needed.seen - reached.seen
    skipped = [name for name, parameter in model.named_parameters() if parameter in missed]
    if skipped or abs(trained - own) > _MOST_NATS * max(1.0, abs(own)):
        where = f", such as {skipped[0]}" if skipped else ""
        raise InputError(
            f"model {name}: TRL's trainer skips operations of {kind} between its last layer and "
            f"its output embeddings{where}: its loss on an example is {trained:.4g} nats per "
            f"token, that of the model {own:.4g}. It would train another model."
        )


def check_joined(name: str, model: Any, pad_id: int, most: int) -> None:
    """Check that examples that are joined to one row do not change each other's loss.

    Their attention, positions and recurrent states must start again in each. Two short texts are
    run joined and alone; modes, buffers and random generators are as before.

    Args:
        name: The model, for messages.
        model: A plain model, on its device.
        pad_id: Any id of the vocabulary.
        most: Most tokens of a joined row.

    Raises:
        InputError: They change it, or the model cannot be run on joined examples.
    """
    rows = short_rows(model, pad_id)
    limit = position_limit(model.config)
    kind = type(model).__name__
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [model.device] if model.device.type == "cuda" else []
    inputs = _joined(model, pad_id, rows)
    try:
        with torch.random.fork_rng(devices):
            evaluation_mode(model)
            with torch.no_grad():
                # Some models mask attention by a square table of this size.
                if limit is not None and limit <= _LARGEST_TABLE and most > limit:
                    model.base_model(**_joined(model, pad_id, [[pad_id] * limit, [pad_id]]))
                alone = [last_logits(model, [row], pad_id, keep=len(row))[0] for row in rows]
                changes = differ(model, model(**inputs).logits[0].float(), torch.cat(alone).float())
            model.train()  # models make other masks
            first = len(rows[0])
            changes |= influences(model, inputs, of=slice(first), on=slice(first, None))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise errors of many types
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise _not_joined(name, f"{kind} fails on joined examples: {reason}") from error
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
    if changes:
        raise _not_joined(name, f"in {kind}, joined examples change each other's loss")


def _joined(model: Any, pad_id: int, rows: Sequence[list[int]]) -> dict[str, Any]:
    """Return the inputs of TRL's batch of joined examples, on the model's device."""
    collate = DataCollatorForLanguageModeling(pad_id, padding_free=True)
    batch = collate([{"input_ids": row} for row in rows])
    del batch["labels"]
    on_device = {
        key: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
    return {**on_device, "use_cache": False}


def _not_joined(name: str, reason: str) -> InputError:
    """Return the error for a model that cannot be trained on joined examples."""
    return InputError(
        f"model {name}: {reason}. Train it without packing and padding_free; "
        "--train_sampling_strategy group_by_length saves padding too."
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
