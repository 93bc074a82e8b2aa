"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): LoRA that moves ranks between layers.

An increment is `B diag(E) A`; a penalty keeps A and B near orthogonality. After each step the
allocator updates the importance of each singular value. At intervals it sets the least important
ones to zero, until `rank` per layer remain on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.core.storage.sharding import is_sharded, layout_of, local_part, whole_tensor
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
        prepared.model.base_model.__class__ = _WithoutPenalty
        penalty = _Penalty(prepared.model)
        allocator = _Allocator(prepared.model)

        def attach(model: Any) -> None:
            penalty.attach(model)
            allocator.attach(model)

        @torch.no_grad()
        def measure() -> dict[str, float]:
            return {"mean_rank": allocator.mean_rank(), "penalty": float(penalty())}

        return replace(
            prepared,
            penalty=penalty,
            callbacks=(allocator,),
            attach=attach,
            measure=measure,
            save_adapter=_save_adapter,
        )


def initial_rank(rank: int) -> int:
    """Return the initial rank: 1.5 times the final one, and at least one more."""
    return max(rank + 1, round(INITIAL_RANKS * rank))


class _Allocator(TrainerCallback):
    """Calls PEFT's allocator after each step, while gradients exist.

    With a model in shards, all processes compare the singular values of whole factors, which are
    gathered for it, and each masks its own.
    """

    def __init__(self, model: Any) -> None:
        self._base = model.base_model
        self._config = model.peft_config["default"]  # saved with the adapter
        self._has_seen = False
        self._layers = sum("lora_E" in name for name, _ in model.named_parameters())
        self.attach(model)

    def attach(self, model: Any) -> None:
        """Take the parameters of another model with the same names."""
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        """Return the importance of singular values and the ranks, for a checkpoint."""
        allocator = self._base.rankallocator
        return {
            "has_seen": self._has_seen,
            "rank_pattern": self._config.rank_pattern,
            **{name: dict(getattr(allocator, name)) for name in _IMPORTANCE},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace importance and ranks."""
        allocator = self._base.rankallocator
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
        self._allocate(step, needs_factors=step <= last)

    @torch.no_grad()
    def _allocate(self, step: int, *, needs_factors: bool) -> None:
        """Update importance and ranks; all processes of a model in shards call it."""
        kind = "lora_" if needs_factors else "lora_E"
        own = {name: p for name, p in _allocated(self._model) if kind in name}
        whole = {name: _whole_with_gradient(p) for name, p in own.items()}
        # PEFT's own method, which takes these four of a model.
        AdaLoraModel.update_and_allocate(
            SimpleNamespace(
                peft_config={"default": self._config},
                trainable_adapter_name="default",
                rankallocator=self._base.rankallocator,
                model=SimpleNamespace(named_parameters=whole.items),
            ),
            step,
        )
        for name, parameter in own.items():
            if "lora_E" in name and is_sharded(parameter):
                rows = layout_of(parameter).shards().part(len(parameter))
                local_part(parameter).copy_(whole[name][rows])

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._model.parameters())

    def mean_rank(self) -> float:
        """Return the mean number of singular values per layer that are not set to zero."""
        pattern = self._config.rank_pattern
        if pattern is None:
            return float(self._config.init_r)
        return sum(map(sum, pattern.values())) / self._layers


def _whole_with_gradient(parameter: Tensor) -> Tensor:
    """Return a parameter, or a whole copy of a sharded one, with its gradient."""
    if not is_sharded(parameter):
        return parameter
    whole = whole_tensor(parameter)
    whole.grad = None if parameter.grad is None else whole_tensor(parameter.grad)
    return whole


def _allocated(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with the names that PEFT's allocator gives them."""
    yield from model.base_model.model.named_parameters()


class _WithoutPenalty(AdaLoraModel):
    """PEFT's model without its own penalty, which fails on the parts of factors in shards."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the adapted model."""
        return self.model.forward(*args, **kwargs)


class _Penalty:
    """The weighted mean of `||A A^T - 1||` and `||B^T B - 1||` over all layers."""

    # PEFT adds it to the loss that the model returns. TRL computes its loss from log-probabilities
    # instead, so PEFT's weight is 0, and the trainer adds this penalty.
    def __init__(self, model: Any) -> None:
        self.attach(model)

    def attach(self, model: Any) -> None:
        """Take the factors of a model."""
        self._rows = [p for name, p in model.named_parameters() if "lora_A" in name]
        self._columns = [p for name, p in model.named_parameters() if "lora_B" in name]

    def __call__(self) -> Tensor:
        with torch.autocast(self._rows[0].device.type, enabled=False):
            # Gathered from shards, and each process then has the whole gradient's own part.
            gram = [A @ A.T for A in map(whole_tensor, self._rows)]
            gram += [B.T @ B for B in map(whole_tensor, self._columns)]
            norms = [torch.linalg.norm(G - torch.eye(len(G), device=G.device)) for G in gram]
            return PENALTY * torch.stack(norms).mean()


def _save_adapter(model: Any, path: Path) -> None:
    """Save the adapter, with the weight of the penalty in its configuration."""
    model.peft_config["default"].orth_reg_weight = PENALTY
    model.save_pretrained(path)
