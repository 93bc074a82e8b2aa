"""The optimizer under accelerate, peft and the Trainer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import molf
from core_helpers import (
    Conv1D,
    assert_same_bits,
    run,
    snapshot,
    tiny_optimizer,
    trainer_arguments,
)
from optimizer_forms import STORAGES, build


def tiny_qwen2(*, tied: bool = True):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize(
    ("form", "storage"),
    [("folded", "float32"), ("folded", "exact"), ("explicit", "float32"), ("frozen", "float32")],
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_accelerate_prepares_the_optimizer(steps_before, form, storage):
    from accelerate import Accelerator

    model, optimizer = build(form, storage)
    plain, reference = build(form, storage)
    run(model, optimizer, range(steps_before))
    run(plain, reference, range(steps_before))
    _, prepared = Accelerator(cpu=True).prepare(model, optimizer)  # loads the state into itself
    run(model, prepared, [2, 3])
    run(plain, reference, [2, 3])
    assert_same_bits(snapshot(model, optimizer), snapshot(plain, reference))
    assert optimizer.routing == reference.routing


def test_trainer_takes_the_factory(tmp_path):
    from transformers import Trainer

    model = tiny_qwen2()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = molf.MoLFConfig(ranks=(4,), alpha=8.0)
    ids = torch.arange(8).repeat(8, 1)
    trainer = Trainer(
        model,
        args=trainer_arguments(
            tmp_path, 3, save_strategy="no", learning_rate=1e-3, logging_strategy="no"
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        optimizer_cls_and_kwargs=molf.trainer_optimizer(config, lr=1e-3, lora_lr=2e-3),
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, molf.MoLFAdamW)
    assert len(optimizer.routing) == 7
    assert all(name.startswith("model.layers.0.") for name in optimizer.routing)
    assert optimizer.state[model.model.layers[0].mlp.up_proj.weight]["step"] == 3
    assert optimizer.param_groups[0]["lora_lr_ratios"] == (2.0,)
    moved = {name for name, p in model.named_parameters() if (p != start[name]).any()}
    biases = {name for name in start if name.endswith("proj.bias")}  # move where `full` wins
    assert moved | biases == start.keys()


@pytest.mark.parametrize("storage", ["float32", "exact", "stochastic 8bit"])
def test_training_resumed_by_the_trainer_ends_in_the_same_bits(tmp_path, storage):
    """With the Trainer's own checkpoints; dropout needs its random states."""
    from transformers import Trainer

    dtype, options, _ = STORAGES[storage]
    ids = torch.arange(16).repeat(8, 1)
    ids[:, 0] = torch.arange(8)

    def train(path, checkpoint=None):
        model = tiny_qwen2().to(dtype)
        model.config.attention_dropout = 0.2
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no weight is large enough for 8 bits
            trainer = Trainer(
                model,
                args=trainer_arguments(path, 6, save_steps=2, logging_steps=1),
                train_dataset=[{"input_ids": row, "labels": row} for row in ids],
                optimizer_cls_and_kwargs=molf.trainer_optimizer(
                    molf.MoLFConfig(ranks=(2, 4), score="fresh"), lr=1e-2, **options
                ),
            )
            trainer.train(resume_from_checkpoint=checkpoint)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, snapshot(model, trainer.optimizer.optimizer)

    losses, bits = train(tmp_path / "whole")
    resumed_losses, resumed_bits = train(tmp_path / "again", tmp_path / "whole" / "checkpoint-2")
    assert resumed_losses == losses
    assert_same_bits(resumed_bits, bits)


PATTERNS = {"full": ["k_proj"], "lora": {"r": 2, "modules": ["q_proj"]}, "default": "frozen"}
EXPLICIT = molf.MoLFConfig(ranks=(2, 4), alpha=4.0, freeze_base=False)


def with_full_weights(kind):
    """Return a model that trains weights beside an adapter, and the Trainer's optimizer."""
    if kind == "explicit":
        return molf.with_adapter(tiny_qwen2(), EXPLICIT), molf.trainer_optimizer(EXPLICIT, lr=1e-2)
    model = tiny_qwen2().to(torch.bfloat16 if kind == "exact hybrid" else torch.float32)
    assignment = molf.Assignment.from_patterns(model, PATTERNS)
    optimizer = molf.trainer_optimizer(assignment, lr=1e-2, lora_lr=3e-2)
    return molf.with_assignment(model, assignment), optimizer


def rows(count=8):
    ids = torch.arange(16).repeat(count, 1)
    ids[:, 0] = torch.arange(count)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(kind, path, **options):
    from transformers import Trainer

    model, optimizer = with_full_weights(kind)
    arguments = {"save_steps": 2, "logging_strategy": "no", **options}
    return Trainer(
        model,
        args=trainer_arguments(path, 4, **arguments),
        train_dataset=rows(),
        eval_dataset=rows(2),
        optimizer_cls_and_kwargs=optimizer,
    )


BESIDE = pytest.mark.parametrize("kind", ["hybrid", "exact hybrid", "explicit"])


@BESIDE
def test_the_trainer_resumes_weights_beside_an_adapter(tmp_path, kind):
    def train(path, checkpoint=None):
        trainer = trainer_of(kind, path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*outside the adapter")
            trainer.train(resume_from_checkpoint=checkpoint)
        return snapshot(trainer.model, trainer.optimizer.optimizer)

    bits = train(tmp_path / "whole")
    assert_same_bits(train(tmp_path / "again", tmp_path / "whole" / "checkpoint-2"), bits)


@BESIDE
def test_the_best_model_of_the_trainer_is_that_of_one_step(tmp_path, kind):
    from safetensors.torch import load_file

    trainer = trainer_of(
        kind,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls: the earlier checkpoint is loaded
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    trained = {
        name.replace(".default", ""): parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], parameter) for name, parameter in trained.items())


@BESIDE
def test_peft_alone_loads_the_trained_model(tmp_path, kind):
    import peft

    trainer = trainer_of(kind, tmp_path, save_strategy="no")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    ids = torch.arange(8)[None]
    base = tiny_qwen2().to(trainer.model.dtype)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
    assert type(loaded) is peft.PeftModelForCausalLM
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


@BESIDE
def test_a_copy_of_the_model_saves_its_own_weights(tmp_path, kind):
    from safetensors.torch import load_file

    model, _ = with_full_weights(kind)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(2.0)
    other.save_pretrained(tmp_path, selected_adapters=["default"])
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(model.trained_beside) < saved.keys()
    assert all(bool((tensor == 2).all()) for tensor in saved.values())


def test_an_adapter_under_another_name_is_whole_too(tmp_path):
    from safetensors.torch import load_file

    model = tiny_qwen2()
    assignment = molf.Assignment.from_patterns(model, PATTERNS)
    model = molf.with_assignment(model, assignment, adapter_name="mine")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    assert set(model.trained_beside) < saved.keys()


def test_weights_that_would_be_lost_are_refused(tmp_path):
    import peft

    model, _ = with_full_weights("hybrid")
    with pytest.raises(ValueError, match="safe_serialization=False saves the adapter alone"):
        model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert not (tmp_path / "bin").exists()
    with pytest.raises(ValueError, match=r"Invalid state_dict: it lacks \d+ trained parameters"):
        model.save_pretrained(tmp_path / "part", state_dict={})
    assert not (tmp_path / "part").exists()
    peft.PeftModel.save_pretrained(model, str(tmp_path / "alone"))
    with pytest.raises(ValueError, match=r"lacks \d+ trained parameters outside the adapter"):
        model.load_adapter(tmp_path / "alone", "default")


def test_another_adapter_or_none_is_no_base(tmp_path):
    import peft

    model, _ = with_full_weights("hybrid")
    for use in (
        lambda: model.disable_adapter(),
        lambda: model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"])),
        lambda: model.load_adapter(tmp_path, "other"),
    ):
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"outside the adapter are trained .*beside the base"):
            use()
        assert list(model.peft_config) == ["default"]
    frozen = molf.MoLFConfig(ranks=(2, 4), alpha=4.0, freeze_base=True)
    model = molf.with_adapter(tiny_qwen2(), frozen)
    model.load_adapter(tmp_path, "other")
    with model.disable_adapter():
        ids = torch.arange(8)[None]
        assert torch.equal(model(input_ids=ids).logits, tiny_qwen2()(input_ids=ids).logits)


def test_parameters_made_trainable_later_are_warned_of():
    model = tiny_qwen2()
    assignment = molf.Assignment.from_patterns(model, {**PATTERNS, "frozen": ["o_proj"]})
    model = molf.with_assignment(model, assignment, freeze_rest=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        molf.AdamW.from_assignment(model, assignment)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 trained parameter outside the adapter \(first: model"):
        molf.AdamW.from_assignment(model, assignment)


def test_rate_is_required_as_the_trainer_hands_over_none():
    with pytest.raises(TypeError, match="lr"):
        molf.trainer_optimizer(molf.MoLFConfig())


def test_factory_is_what_the_trainer_calls_a_factory():
    from transformers.trainer_optimizer import is_optimizer_factory

    factory, kwargs = molf.trainer_optimizer(lr=1e-3)
    assert is_optimizer_factory(factory)
    assert kwargs == {"config": molf.MoLFConfig(), "lr": 1e-3}
    optimizer = factory()(nn.Linear(200, 200), **kwargs)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_transformers_models_are_routed_without_their_head():
    for tied in (True, False):
        model = tiny_qwen2(tied=tied)
        optimizer = tiny_optimizer(model)
        routed = [group["layer"] for group in optimizer.param_groups if group["layer"]]
        assert len(routed) == 7
        assert not any("head" in name for name in routed)
        rest = [n for g in optimizer.param_groups if not g["layer"] for n in g["param_names"]]
        assert ("lm_head.weight" in rest) is not tied
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model.embed_tokens"):
        tiny_optimizer(tiny_qwen2(), target_modules=["lm_head"], exclude_modules=())


def test_differently_named_head_is_left_out_too():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    assert model.get_output_embeddings() is not None
    optimizer = tiny_optimizer(model)
    names = [group["layer"] for group in optimizer.param_groups if group["layer"]]
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    assert head not in names
    assert len(names) == 4


HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "score", "QUESTION_ANS": "qa_outputs"}


@pytest.mark.parametrize("task", HEADS)
def test_heads_of_tasks_are_left_out_whatever_the_way_in(task):
    import peft
    from transformers import (
        Qwen2ForQuestionAnswering,
        Qwen2ForSequenceClassification,
        Qwen2ForTokenClassification,
    )

    kinds = dict(
        zip(
            HEADS,
            (
                Qwen2ForSequenceClassification,
                Qwen2ForTokenClassification,
                Qwen2ForQuestionAnswering,
            ),
            strict=True,
        )
    )

    def plain():
        return kinds[task](tiny_qwen2().config)

    def routed(model, config):
        optimizer = molf.MoLFAdamW.from_model(model, config)
        return [group["layer"] for group in optimizer.param_groups if group["layer"]]

    options = {"ranks": (2, 3), "alpha": 4.0}
    config = molf.MoLFConfig(**options, freeze_base=True, freeze_rest=False)
    folded = routed(plain(), molf.MoLFConfig(**options))
    assert len(folded) == 7
    assert not any(HEADS[task] in name for name in folded)
    assert routed(molf.with_adapter(plain(), config), config) == folded
    settings = molf.peft_config(config, task_type=task)
    assert routed(peft.get_peft_model(plain(), settings), config) == folded
    # Without the task PEFT adapts the head.
    adapted = peft.get_peft_model(plain(), molf.peft_config(config))
    with pytest.raises(ValueError, match="is the model's head and carries the trained adapter"):
        routed(adapted, config)
    with pytest.warns(UserWarning, match=f"The head {HEADS[task]} is no part of the adapter"):
        molf.with_adapter(plain(), molf.MoLFConfig(**options, freeze_base=True))


def test_biases_of_fused_experts_do_not_decay():
    from transformers import GptOssConfig, GptOssForCausalLM

    model = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=1,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    with pytest.warns(UserWarning, match="fused 3-D weights"):
        optimizer = tiny_optimizer(model)
    decays = {
        name: group["weight_decay"] > 0
        for group in optimizer.param_groups
        if group["layer"] is None
        for name in group["param_names"]
    }
    assert any(name.endswith("gate_up_proj_bias") for name in decays)
    assert {name for name, decayed in decays.items() if decayed} == {
        name
        for name, parameter in model.named_parameters()
        if name in decays and parameter.dim() >= 2 and "bias" not in name
    }


def test_gpt2_layers_are_transposed():
    from transformers.pytorch_utils import Conv1D as GPT2Conv1D

    torch.manual_seed(0)
    theirs, ours = GPT2Conv1D(6, 4), Conv1D(6, 4)
    ours.load_state_dict(theirs.state_dict())
    optimizers = [tiny_optimizer(nn.ModuleDict({"c": layer})) for layer in (theirs, ours)]
    for layer, optimizer in zip((theirs, ours), optimizers, strict=True):
        layer(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["transposed"]
    assert torch.equal(theirs.weight, ours.weight)


def test_defaults_warn_once_on_a_tiny_model():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        molf.MoLFAdamW.from_model(tiny_qwen2())
    assert [str(w.message)[:16] for w in caught] == ["Rank 128 exceeds"]
