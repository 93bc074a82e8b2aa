"""What decays by default."""

from __future__ import annotations

import torch
from torch import nn

from core_helpers import tiny_optimizer
from molf import MoLFAdamW, MoLFConfig


class Mixer(nn.Module):
    """Parameters as state-space layers, vision models and mixtures have them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.A_log = nn.Parameter(torch.ones(4, 3))
        self.A_b_log = nn.Parameter(torch.ones(4, 3))
        self.D = nn.Parameter(torch.ones(4))
        self.dt_bias = nn.Parameter(torch.ones(2, 2))
        self.log_dt = nn.Parameter(torch.ones(4, 2))
        self.time_decay = nn.Parameter(torch.ones(4, 2))
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.marked = nn.Parameter(torch.ones(4, 4))
        self.marked._no_weight_decay = True
        self.pos_embed = nn.Parameter(torch.ones(1, 5, 4))
        self.expert_bias = nn.Parameter(torch.ones(3, 4))
        self.norm = nn.LayerNorm((3, 4))
        self.conv = nn.Conv1d(4, 4, 2, groups=4)
        self.mixed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 2))
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 1)
        self.matrix = nn.Parameter(torch.ones(4, 4))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


def test_what_decays_is_matrices_and_tables():
    optimizer = tiny_optimizer(Mixer(), exclude_modules=["head"])
    decays = {
        name
        for group in optimizer.param_groups
        if group["layer"] is None and group["weight_decay"]
        for name in group["param_names"]
    }
    assert decays == {
        "conv.weight", "embed.weight", "head.weight", "matrix",
        "mixed.parametrizations.weight.original1",
    }  # fmt: skip


def test_routed_weight_that_the_model_marks():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["a"].weight._no_weight_decay = True
    optimizer = MoLFAdamW.from_model(model, MoLFConfig(ranks=(1, 2)))
    a, b = optimizer.param_groups
    assert (a["weight_decay"], tuple(a["lora_weight_decays"])) == (0.0, (0.0, 0.0))
    assert (b["weight_decay"], tuple(b["lora_weight_decays"])) == (0.1, (0.01, 0.01))


def test_mamba():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    optimizer = tiny_optimizer(model)
    without = [
        name.rpartition(".")[2]
        for group in optimizer.param_groups
        if group["layer"] is None and not group["weight_decay"]
        for name in group["param_names"]
    ]
    assert {"A_log", "D"} <= set(without)
