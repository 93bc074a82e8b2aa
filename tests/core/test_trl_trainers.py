"""TRL's preference and reward trainers take the factory after they were made."""

from __future__ import annotations

import warnings

import pytest
import torch

import molf
from molf.job.record.routing_log import iter_steps
from molf.world import BASE_PATH

CONFIGS = {
    "folded": molf.MoLFConfig(ranks=(2, 3)),
    "adapter": molf.MoLFConfig(ranks=(2, 3), freeze_base=True),
}
OPTIONS = {
    "max_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_PATH)


def tiny_model(tokenizer, folder):
    """A model that lies in a folder, from where DPO loads its reference."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(folder)


def dpo(model, tokenizer, folder, **options):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pair = {"prompt": "One two", "chosen": " three.", "rejected": " four."}
    args = DPOConfig(output_dir=str(folder), per_device_train_batch_size=2, **OPTIONS)
    data = Dataset.from_list([pair] * 4)
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, **options)


def grpo(model, tokenizer, folder):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **_):
        return [float(index % 2) for index, _ in enumerate(completions)]

    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        **OPTIONS,
    )
    data = Dataset.from_list([{"prompt": "One two three"}] * 4)
    return GRPOTrainer(
        model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer
    )


@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("make", [dpo, grpo], ids=lambda make: make.__name__)
def test_every_layer_is_routed_and_moves(make, form, tokenizer, tmp_path):
    config, model = CONFIGS[form], tiny_model(tokenizer, tmp_path / "model")
    if form == "adapter":
        model = molf.with_adapter(model, config)
    trainer = make(model, tokenizer, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.optimizer_cls_and_kwargs = molf.trainer_optimizer(config, lr=1e-2)
    trainer.add_callback(log := molf.RoutingCallback(tmp_path / "log"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no gradient")
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, molf.MoLFAdamW)
    assert len(optimizer.routing) == 7
    logged = list(iter_steps(tmp_path / "log"))
    assert [len(step["selections"]) for step in logged] == [7, 7]
    last = {layer: list(decision.winners) for layer, decision in optimizer.routing.items()}
    assert {layer: one["winners"] for layer, one in logged[1]["selections"].items()} == last
    assert sum(log.shares.values()) == pytest.approx(1)
    assert all(state["step"] == 2 for state in optimizer.state.values())
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    weights = {name for name in moved if name.endswith("proj.weight") or "lora_B" in name}
    assert len(weights) == 7
    assert form == "folded" or all("lora_" in name for name in moved)


def hybrid(tokenizer, folder):
    model = tiny_model(tokenizer, folder)
    patterns = {
        "full": ["k_proj", "v_proj"],
        "lora": {"r": 2, "alpha": 4, "modules": ["q_proj", "o_proj"]},
        "default": "frozen",
    }
    assignment = molf.Assignment.from_patterns(model, patterns)
    return molf.with_assignment(model, assignment), assignment


def test_the_reference_of_dpo_stays_that_of_the_base(tokenizer, tmp_path):
    """TRL's own, a further adapter, would be beside the weights that are trained in full."""
    model, assignment = hybrid(tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match=r"a further adapter \(ref\) .* give DPOTrainer"):
        dpo(model, tokenizer, tmp_path)
    reference = tiny_model(tokenizer, tmp_path / "reference")
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    trainer = dpo(model, tokenizer, tmp_path, ref_model=reference)
    trainer.optimizer_cls_and_kwargs = molf.trainer_optimizer(assignment, lr=1e-2)
    trainer.train()
    after = dict(trainer.ref_model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    weight = trainer.model.get_parameter("base_model.model.model.layers.0.self_attn.k_proj.weight")
    assert not torch.equal(weight, before["model.layers.0.self_attn.k_proj.weight"])


def test_grpo_without_a_reference_trains_a_hybrid(tokenizer, tmp_path):
    model, assignment = hybrid(tokenizer, tmp_path / "model")
    trainer = grpo(model, tokenizer, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.optimizer_cls_and_kwargs = molf.trainer_optimizer(assignment, lr=1e-2)
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.split(".")[-2] for name in moved if "k_proj" in name} == {"k_proj"}


def test_the_factory_of_an_assignment(tokenizer, tmp_path):
    """Layers in full and with an adapter move, at two rates under the trainer's schedule."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, assignment = hybrid(tokenizer, tmp_path / "model")
    args = SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, **OPTIONS)
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "One two", "completion": " three."}] * 4),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=molf.trainer_optimizer(assignment, lr=1e-2, lora_lr=3e-2),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is molf.AdamW
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-2, 1e-2, 3e-2]
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    still = {name for name in before if "mlp" in name or name.endswith("base_layer.weight")}
    assert moved == before.keys() - still
