"""The adapter form as an optimizer: state, resume, guards, cost, and the trainers."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import molf
from core_helpers import tiny_model, trainer_arguments
from molf import MoLFAdamW, MoLFConfig
from peft_helpers import IDS, tiny_qwen2

FORMS = pytest.mark.parametrize("freeze_base", [True, False], ids=["frozen", "explicit"])


def made(freeze_base: bool, dtype: torch.dtype = torch.float32, **options):
    """A small adapted model and its optimizer; adapters of bfloat16 bases are float32."""
    names = MoLFConfig.__dataclass_fields__
    settings = {k: options.pop(k) for k in list(options) if k in names}
    config = MoLFConfig(ranks=(2, 3), alpha=4.0, top_k=2, freeze_base=freeze_base, **settings)
    model = molf.with_adapter(tiny_model(dtype), config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Trained weights are")
        return model, MoLFAdamW.from_model(
            model, config, **{"lr": 1e-2, "lora_lr": 3e-2, **options}
        )


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
    out = model(ids).flatten(0, 1).float()
    nn.functional.cross_entropy(out, ids.roll(1, 1).flatten()).backward()


def run(model, optimizer, batches) -> None:
    for batch in batches:
        backward(model, batch)
        optimizer.step()


def test_golden_state_dict():
    model, optimizer = made(freeze_base=False)
    run(model, optimizer, range(2))
    state_dict = optimizer.state_dict()
    group = dict(state_dict["param_groups"][0])
    assert group.pop("param_names") == [
        "up.weight",
        "up.bias",
        "up.lora_A.default.weight",
        "up.lora_B.default.weight",
    ]
    assert group["params"] == [0, 1, 2, 3]
    assert (group["layer"], group["ranks"], group["adapter_scaling"]) == ("up", (2, 3), 1.0)
    shapes = [
        {k: tuple(v.shape) if torch.is_tensor(v) else v for k, v in state_dict["state"][i].items()}
        for i in range(4)
    ]
    expected = [(9, 6), (9,), (5, 6), (9, 5)]
    assert shapes == [{"step": 2, "exp_avg": size, "exp_avg_sq": size} for size in expected]


@FORMS
def test_state_is_moments_alone(freeze_base):
    model, optimizer = made(freeze_base, freeze_rest=True)
    optimizer.lora_factors("up")
    assert not any(optimizer.state.values())
    run(model, optimizer, [0])
    sizes = sum(
        v.numel() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes == 2 * trained


def test_adapters_rounded_to_nearest_are_warned_of():
    config = MoLFConfig(ranks=(2, 3), freeze_base=True)
    model = molf.with_adapter(tiny_qwen2().bfloat16(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        MoLFAdamW.from_model(model, config)  # PEFT keeps adapters in float32
        MoLFAdamW.from_model(model.bfloat16(), config)  # exact
    with pytest.warns(UserWarning, match=r"Trained weights are torch.bfloat16 and rounded"):
        MoLFAdamW.from_model(model, config, weight_rounding="nearest")


def test_core_needs_torch_alone():
    code = (
        "import sys, molf; molf.MoLFAdamW, molf.merge, molf.peft_config, molf.with_adapter; "
        "print(sorted({'peft', 'transformers', 'bitsandbytes', 'torchao'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("freeze_base", "dropout"), [(True, 0.0), (True, 0.1), (False, 0.1)], ids=str
)
def test_trainer_takes_every_form(freeze_base, dropout, tmp_path):
    from transformers import Trainer

    config = MoLFConfig(ranks=(2, 3), alpha=4.0, freeze_base=freeze_base, lora_dropout=dropout)
    model = molf.with_adapter(tiny_qwen2(), config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(
        model,
        args=trainer_arguments(
            tmp_path,
            3,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_steps=2,
            learning_rate=1e-3,
            logging_strategy="no",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)],
        optimizer_cls_and_kwargs=molf.trainer_optimizer(config, lr=1e-3, lora_lr=2e-3),
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, MoLFAdamW)
    assert len(optimizer.routing) == 7
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert any("lora_B" in name for name in moved) or not freeze_base
    assert any("lora_" not in name for name in moved) is not freeze_base
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_sft_trainer_makes_the_adapter_from_the_configuration(tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from molf.world import BASE_PATH

    config = MoLFConfig(ranks=(2, 3), alpha=4.0, freeze_base=True)
    trainer = SFTTrainer(
        str(BASE_PATH),
        args=SFTConfig(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[],
                       per_device_train_batch_size=2, bf16=False, disable_tqdm=True,
                       save_strategy="no"),
        train_dataset=Dataset.from_list([{"prompt": "One two", "completion": " three four."}] * 4),
        processing_class=AutoTokenizer.from_pretrained(BASE_PATH),
        peft_config=molf.peft_config(config, task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=molf.trainer_optimizer(config, lr=1e-3),
    )  # fmt: skip
    trainer.train()
    routing = trainer.optimizer.optimizer.routing
    assert routing
    assert all(tuple(d.scores) == config.experts for d in routing.values())
    assert molf.merge(trainer.model).config.architectures
