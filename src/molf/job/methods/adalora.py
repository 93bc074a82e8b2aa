"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): LoRA that moves ranks between layers.

An increment is `B diag(E) A`; a penalty keeps A and B near orthogonality. After each step the
allocator updates the importance of each singular value. At intervals it sets the least important
ones to zero, until `rank` per layer remain on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.errors import InputError
from molf.job.methods.adapter import Adapter, AdapterPlan, common_config
from molf.job.methods.base import Layer, Prepared, TrainingData
from molf.job.record.result import RunError
from molf.job.settings.resolved import ResolvedSettings

# The authors' quick start: 3,000 steps, the first 500 at the initial ranks, the last 1,500 at the
# final ones, an allocation every 10 steps, ranks from 12 to 8. Betas are those of all their runs.
# The weight of the penalty is PEFT's default; theirs is 0.1 to 0.5, depending on the task.
INITIAL_RANKS = 1.5
WARM_UP = 1 / 6
FINAL = 1 / 2
INTERVAL = 10 / 3000
BETA = 0.85
PENALTY = 0.5

_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # attributes of PEFT's allocator
_LEAST_STEPS = 3  # one before the last allocation, one for it, one after


class AdaLora(Adapter):
    """PEFT's AdaLoRA, with its allocator called after each step."""

    def config(self, plan: AdapterPlan, settings: ResolvedSettings, steps: int) -> AdaLoraConfig:
        """Return PEFT's configuration, with the authors' schedule scaled to the run's steps."""
        rank = initial_rank(plan.rank)
        return AdaLoraConfig(
            target_r=plan.rank,
            init_r=rank,
            lora_alpha=plan.scaling * rank,  # PEFT divides by the initial rank
            total_step=steps,
            tinit=int(WARM_UP * steps),
            tfinal=int(FINAL * steps),
            deltaT=max(1, round(INTERVAL * steps)),
            beta1=BETA,
            beta2=BETA,
            orth_reg_weight=0.0,  # see `_Penalty`
            **common_config(plan, settings),
        )

    def parameters(self, layer: Layer, rank: int) -> int:
        """Count the factors of the initial rank, and a singular value per rank."""
        initial = initial_rank(rank)
        return layer.lora_parameters(initial) + initial

    def plan(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> AdapterPlan:
        """Return the plan, after checking that the steps suffice to move ranks."""
        if data.steps < _LEAST_STEPS:
            raise InputError(
                f"method=adalora needs at least {_LEAST_STEPS} optimizer steps to move ranks; this "
                f"training has {data.steps}. Give more data, --num_train_epochs or --max_steps."
            )
        return super().plan(model, settings, data)

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Add the adapter, its allocator and its penalty."""
        prepared = super().prepare(model, settings, data)
        penalty = _Penalty(prepared.model)
        allocator = _Allocator(prepared.model)

        @torch.no_grad()
        def measure() -> dict[str, float]:
            return {"mean_rank": allocator.mean_rank(), "penalty": float(penalty())}

        return replace(
            prepared,
            penalty=penalty,
            callbacks=(allocator,),
            measure=measure,
            save_adapter=_save_adapter,
        )


def initial_rank(rank: int) -> int:
    """Return the initial rank: 1.5 times the final one, and at least one more."""
    return max(rank + 1, round(INITIAL_RANKS * rank))


class _Allocator(TrainerCallback):
    """Calls PEFT's allocator after each step, while gradients exist."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = model.peft_config["default"]
        self._has_seen = False
        self._layers = sum("lora_E" in name for name, _ in model.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """Return the importance of singular values and the ranks, for a checkpoint."""
        allocator = self._model.base_model.rankallocator
        return {
            "has_seen": self._has_seen,
            "rank_pattern": self._config.rank_pattern,
            **{name: dict(getattr(allocator, name)) for name in _IMPORTANCE},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace importance and ranks."""
        allocator = self._model.base_model.rankallocator
        devices = {name: parameter.device for name, parameter in _allocated(self._model)}
        self._has_seen, self._config.rank_pattern = state["has_seen"], state["rank_pattern"]
        for name in _IMPORTANCE:
            found = {key: value.to(devices[key]) for key, value in state[name].items()}
            setattr(allocator, name, found)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the importance of singular values, and move ranks.

        A skipped step has no gradients, and does not count.
        """
        # Steps count from 1. From `last` on, the ranks are final.
        step, last = state.global_step + 1, self._config.total_step - self._config.tfinal
        if step < last:
            if not self._has_gradients():
                return
            self._has_seen = True
        elif not self._has_seen:
            raise RunError(
                f"Step {step} of {state.max_steps}: AdaLoRA cannot tell which ranks matter: all "
                "steps before this one were skipped. Try a lower --lora_learning_rate."
            )
        self._model.base_model.update_and_allocate(step)

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._model.parameters())

    def mean_rank(self) -> float:
        """Return the mean number of singular values per layer that are not set to zero."""
        pattern = self._config.rank_pattern
        if pattern is None:
            return float(self._config.init_r)
        return sum(map(sum, pattern.values())) / self._layers


def _allocated(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with the names that PEFT's allocator gives them."""
    yield from model.base_model.model.named_parameters()


class _Penalty:
    """The weighted mean of `||A A^T - 1||` and `||B^T B - 1||` over all layers."""

    # PEFT adds it to the loss that the model returns. TRL computes its loss from log-probabilities
    # instead, so PEFT's weight is 0, and the trainer adds this penalty.
    def __init__(self, model: Any) -> None:
        self._rows = [p for name, p in model.named_parameters() if "lora_A" in name]
        self._columns = [p for name, p in model.named_parameters() if "lora_B" in name]

    def __call__(self) -> Tensor:
        with torch.autocast(self._rows[0].device.type, enabled=False):
            gram = [A @ A.T for A in self._rows] + [B.T @ B for B in self._columns]
            norms = [torch.linalg.norm(G - torch.eye(len(G), device=G.device)) for G in gram]
            return PENALTY * torch.stack(norms).mean()


def _save_adapter(model: Any, path: Path) -> None:
    """Save the adapter, with the weight of the penalty in its configuration."""
    model.peft_config["default"].orth_reg_weight = PENALTY
    model.save_pretrained(path)
