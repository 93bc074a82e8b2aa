"""A finished run with what its process knew of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PROBE = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@dataclass
class Recorded:
    """A run's directory and command, and its model on the way.

    Logits and parameters are those of the base, of the prepared model before training (start), of
    the trained model before (adapter, end) and after it was merged (trained).
    """

    path: Path
    arguments: list[str]
    prepared: Any = None
    base_logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    start_logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    end: dict[str, torch.Tensor] = field(default_factory=dict)
    trained_logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    adapter_logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    routing: list[dict[str, Any]] = field(default_factory=list)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """The logits of a few tokens; the model keeps its mode."""
    was_training = model.training
    logits = model.eval()(input_ids=PROBE.to(model.device)).logits.float().cpu()
    model.train(was_training)
    return logits


def parameters_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
