"""A step sees whether the model still has the optimizer's parameters, and why gradients lack."""

from __future__ import annotations

import copy
import pickle
import warnings
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import molf
from core_helpers import (
    TinyModel,
    assert_same_bits,
    backward,
    run,
    snapshot,
    tiny_model,
    tiny_optimizer,
)
from molf import MoLFAdamW, MoLFConfig
from optimizer_forms import in_form
from peft_helpers import tiny_qwen2


def replace_weight(model: TinyModel) -> None:
    model.up.weight = nn.Parameter(model.up.weight.detach().clone())


def replace_bias(model: TinyModel) -> None:
    model.up.bias = nn.Parameter(model.up.bias.detach().clone())


def replace_module(model: TinyModel) -> None:
    model.up = nn.Linear(6, 9)


def replace_embedding(model: TinyModel) -> None:
    model.embed = nn.Embedding(11, 6)


def convert(model: TinyModel) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def normalise(model: TinyModel) -> None:
    nn.utils.parametrizations.weight_norm(model.up)


REPLACED = {
    replace_weight: "Layer up: up.weight",
    replace_bias: "Layer up: up.bias",
    replace_module: "Layer up: up.weight",
    replace_embedding: "Parameter embed.weight",
    convert: "Layer up: up.weight",
    normalise: "Layer up: up.weight",
}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("change", REPLACED, ids=lambda change: change.__name__)
def test_replaced_parameters_are_refused_by_name(change, steps_before):
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    run(model, optimizer, range(steps_before))
    change(model)
    backward(model, 5)
    before = snapshot(model, optimizer)
    match = f"^{REPLACED[change]} was replaced in the model after the optimizer was built"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    for key, value in snapshot(model, optimizer).items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, before[key])


@pytest.mark.parametrize("kept", [False, True])
def test_replaced_module_is_found_also_where_it_lives_on(kept):
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    old = model.up if kept else None
    replace_module(model)
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"Layer up: up.weight was replaced"):
        optimizer.step()
    assert old is None or isinstance(old, nn.Linear)


def test_resized_head_is_refused():
    """transformers makes a new layer."""
    model = tiny_qwen2(tied=False)
    optimizer = MoLFAdamW.from_model(model, MoLFConfig(ranks=(2,)))
    model.resize_token_embeddings(40)
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match=r"Parameter lm_head.weight was replaced"):
        optimizer.step()


def test_resized_embeddings_are_refused_once_they_have_state():
    """transformers resizes in place."""
    model = tiny_qwen2(tied=True)
    optimizer = MoLFAdamW.from_model(model, MoLFConfig(ranks=(2,)))
    ids = torch.arange(6)[None]
    for size in (36, 40):
        model.resize_token_embeddings(size)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if size == 36:
            optimizer.step()
    match = r"embed_tokens.weight had shape \(36, 64\) in the last step and has \(40, 64\) now"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()


def test_steps_in_the_backward_pass_see_it_too():
    model = tiny_model()
    optimizer = tiny_optimizer(model, optimizer_in_backward=True)
    replace_weight(model)
    with pytest.raises(RuntimeError, match=r"Layer up: up.weight was replaced"):
        run(model, optimizer, [0])


def moved_by_parametrize(model: TinyModel, optimizer: MoLFAdamW) -> None:
    nn.utils.parametrize.register_parametrization(model.up, "weight", nn.Identity())


def added_to_the_optimizer(model: TinyModel, optimizer: MoLFAdamW) -> None:
    model.embed.weight = nn.Parameter(model.embed.weight.detach().clone())
    optimizer.add_param_group({"params": [("new", model.embed.weight)]})


def moved_in_place(model: TinyModel, optimizer: MoLFAdamW) -> None:
    model.to(torch.float64).to(torch.float32)
    model.up.weight.data = model.up.weight.data.clone()


def wrapped(model: TinyModel, optimizer: MoLFAdamW) -> None:
    nn.Sequential(nn.DataParallel(model))


def tied_later(model: TinyModel, optimizer: MoLFAdamW) -> None:
    model.lm_head.weight = model.embed.weight


@pytest.mark.parametrize(
    "change",
    [moved_by_parametrize, added_to_the_optimizer, moved_in_place, wrapped, tied_later],
    ids=lambda change: change.__name__,
)
def test_harmless_changes_are_none(change):
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    change(model, optimizer)
    run(model, optimizer, [0, 1])
    assert list(optimizer.routing) == ["up", "down"]


def tie_two_layers(model: nn.Module) -> None:
    model[1].weight = model[0].weight


def tie_two_biases(model: nn.Module) -> None:
    model[1].bias = model[0].bias


def tie_a_layer_to_what_is_not_routed(model: nn.Module) -> None:
    model[1].weight = model[2].weight


def tie_what_is_not_routed_to_a_layer(model: nn.Module) -> None:
    model[2].weight = model[0].weight


TIED = {
    tie_two_layers: "Layer 1: 1.weight .* of layer 0: ",
    tie_two_biases: "Layer 1: 1.bias .* of layer 0: ",
    tie_a_layer_to_what_is_not_routed: "Layer 1: 1.weight .* of a parameter that is not routed: ",
    tie_what_is_not_routed_to_a_layer: "Parameter 2.weight .* of layer 0: ",
}


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("change", TIED, ids=lambda change: change.__name__)
def test_layers_that_are_tied_later_are_refused_by_name(change, steps_before, in_backward):
    """A layer would drop out of routing in silence, and the other's gradient sum two uses."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    config = MoLFConfig(ranks=(1, 2), exclude_modules=("2",))
    optimizer = MoLFAdamW.from_model(model, config, optimizer_in_backward=in_backward)
    for _ in range(steps_before):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    change(model)
    before = snapshot(model, optimizer)

    def step():
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match=TIED[change]):
        step()
    assert_same_bits(snapshot(model, optimizer), before)


def test_a_layers_new_weight_may_be_added_to_the_optimizer():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    replace_weight(model)
    optimizer.add_param_group({"params": [("new", model.up.weight)]})
    model.up.bias.requires_grad_(False)
    before = model.up.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"1 of 2 routed layers have no gradient .*first: up"):
        run(model, optimizer, [0, 1])
    assert not torch.equal(model.up.weight, before)


def test_copies_train_with_the_model_that_was_copied_along():
    model, optimizer = copy.deepcopy((m := tiny_model(), tiny_optimizer(m)))
    run(model, optimizer, [0, 1])
    assert list(optimizer.routing) == ["up", "down"]


def test_models_are_not_kept_alive():
    import gc
    import weakref

    model = tiny_model()
    optimizer = tiny_optimizer(torch.nn.Sequential(model))
    module = weakref.ref(model.norm)
    del model
    gc.collect()
    assert module() is None
    assert optimizer.param_groups


def test_flattened_or_split_groups_are_refused_by_name():
    """What ZeRO-1 of DeepSpeed does with any optimizer's groups."""
    for number, split in ((0, 1), (0, 2), (1, 1)):
        model = tiny_model()
        optimizer = tiny_optimizer(model)
        backward(model, 0)
        group = optimizer.param_groups[number]
        flat = torch.cat([p.detach().flatten() for p in group["params"]])
        flat = nn.Parameter(flat[: len(flat) // split])
        flat.grad = torch.zeros_like(flat)
        group["params"] = [flat]
        name = ("up", "down")[number]
        with pytest.raises(RuntimeError, match=rf"^Layer {name}: .* shape \(\d+,\) .*ZeRO"):
            optimizer.step()


def flatten(group: dict) -> None:
    group["params"] = [nn.Parameter(p.detach().flatten()) for p in group["params"]]


def join(group: dict) -> None:
    group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]


def empty(group: dict) -> None:
    group["params"] = []


def fill(group: dict) -> None:
    group["params"] = [nn.Parameter(torch.zeros(3, 3)) for _ in range(5)]


@pytest.mark.parametrize("how", ["copied", "pickled", "built from groups"])
@pytest.mark.parametrize("change", [flatten, join, empty, fill], ids=lambda one: one.__name__)
@pytest.mark.parametrize("form", ["folded", "explicit", "frozen"])
def test_groups_of_an_optimizer_that_knows_no_model_are_refused_too(form, change, how):
    _, optimizer = in_form(form, tiny_model())
    if how == "copied":
        optimizer = copy.deepcopy(optimizer)
    elif how == "pickled":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    else:
        optimizer = MoLFAdamW([dict(group) for group in optimizer.param_groups])
    group = optimizer.param_groups[0]
    change(group)
    for parameter in group["params"]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"group of layer .*up' has tensors of shape .* split"):
        optimizer.step()


def replace_embedded(model: TinyModel) -> None:
    model.embed.weight = nn.Parameter(model.embed.weight.detach().clone())


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("change", [replace_embedding, replace_embedded])
def test_one_of_two_tied_tensors_that_is_replaced_is_refused(change, steps_before):
    """The model still has the old one, and would train without the new one."""
    model = tiny_model()
    model.lm_head.weight = model.embed.weight
    optimizer = tiny_optimizer(model)
    run(model, optimizer, range(steps_before))
    change(model)
    backward(model, 2)
    with pytest.raises(RuntimeError, match=r"Parameter embed.weight was replaced"):
        optimizer.step()


def test_swapped_tensors_are_the_same_parameters():
    """`module.to` swaps what parameters hold, if torch is told so."""
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    run(model, optimizer, [0])
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    run(model, optimizer, [1, 2])
    assert model.up.weight.dtype == torch.float64
    assert set(optimizer.routing) == {"up", "down"}


def test_master_copies_of_the_same_shape_are_taken():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert list(optimizer.routing) == ["up", "down"]


def test_groups_of_wrong_shape_are_refused_when_they_are_given():
    group = tiny_optimizer(tiny_model()).param_groups[0]
    for parameters in ([torch.zeros(54)], [torch.zeros(9, 6), torch.zeros(6)], []):
        given = [nn.Parameter(p) for p in parameters]
        with pytest.raises(ValueError, match=r"The group of layer 'up' has tensors of shape"):
            MoLFAdamW([{**group, "params": given, "param_names": ["n"] * len(given)}])


class Pooled(nn.Module):
    """An encoder with a pooler that the loss may leave unused, as BERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pooler = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.gradient_checkpointing = False


def first_step(model: nn.Module, loss, **options) -> str:
    optimizer = tiny_optimizer(model, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss(model).sum().backward()
        optimizer.step()
    (text,) = [str(one.message) for one in caught]
    return text


@pytest.mark.parametrize("in_backward", [False, True])
def test_an_unused_layer_is_said_to_be_unused(in_backward):
    text = first_step(
        Pooled(), lambda m: m.body(torch.ones(2, 4)), optimizer_in_backward=in_backward
    )
    assert text.startswith(
        "1 of 2 routed layers have no gradient in the first step (first: pooler)"
    )
    assert "Most likely the loss does not depend on them" in text
    assert text.index("BERT's pooler") < text.index("use_reentrant")


def test_layers_without_gradients_are_looked_up_at_once():
    """A mixture has thousands of experts without a token; each was searched in the whole model."""
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(20)])
    optimizer = tiny_optimizer(model)
    model[0](torch.ones(2)).sum().backward()
    reads = Mock(wraps=model.parameters)
    model.parameters = reads
    with pytest.warns(UserWarning, match="19 of 20 routed layers have no gradient"):
        optimizer.step()
    assert reads.call_count == 1


def test_reentrant_checkpointing_comes_first_where_the_model_has_it():
    from functools import partial

    model = Pooled()
    model.gradient_checkpointing = True
    model._gradient_checkpointing_func = partial(print, use_reentrant=True)
    text = first_step(model, lambda m: m.body(torch.ones(2, 4)))
    assert "Most likely gradient checkpointing drops them" in text
    model._gradient_checkpointing_func = partial(print, use_reentrant=False)
    text = first_step(model, lambda m: m.body(torch.ones(2, 4)))
    assert "Most likely the loss does not depend on them" in text


def test_layers_frozen_later_are_said_to_be_frozen():
    model = Pooled()
    optimizer = tiny_optimizer(model)
    model.pooler.requires_grad_(False)
    (model.pooler(model.body(torch.ones(2, 4)))).sum().backward()
    with pytest.warns(UserWarning, match=r"first: pooler\).*They were frozen"):
        optimizer.step()


@pytest.mark.parametrize("in_backward", [False, True])
def test_no_routed_layer_with_a_gradient_is_an_error(in_backward):
    model = Pooled()
    optimizer = tiny_optimizer(model, optimizer_in_backward=in_backward)
    before = model.scale.detach().clone()
    (model.scale * 2).sum().backward()
    reason = "Most likely the loss does not depend on them"
    match = rf"None of the 2 routed layers has a gradient in the first step .*body.*{reason}"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert in_backward or torch.equal(model.scale, before)


@pytest.mark.parametrize("before", ["skipped", "factors"])
def test_the_first_step_is_the_first_that_is_taken(before):
    """A state may be there before it: of a step that was skipped, of factors that were set."""
    model = Pooled()
    optimizer = tiny_optimizer(model, nonfinite="skip")
    if before == "skipped":
        model.pooler(model.body(torch.ones(2, 4))).sum().backward()
        model.body.weight.grad[0, 0] = float("nan")
        with pytest.warns(UserWarning, match="Step skipped"):
            optimizer.step()
        optimizer.zero_grad()
    else:
        optimizer.set_lora_factors("body", optimizer.lora_factors("body"))
    assert optimizer.state[model.body.weight]["step"] == 0
    (model.scale * 2).sum().backward()
    with pytest.raises(RuntimeError, match="None of the 2 routed layers has a gradient"):
        optimizer.step()


@pytest.mark.parametrize("in_backward", [False, True])
def test_first_step_without_any_gradient_is_torchs(in_backward):
    model = tiny_model()
    optimizer = tiny_optimizer(model, optimizer_in_backward=in_backward)
    with pytest.warns(
        UserWarning, match=r"2 of 2 .* \(first: up\), nor has any other parameter: call"
    ):
        optimizer.step()
    run(model, optimizer, [0])
    assert set(optimizer.routing) == {"up", "down"}


def test_all_layers_frozen_later_are_warned_of_and_routed_once_they_are_not():
    model = Pooled()
    optimizer = tiny_optimizer(model)
    model.body.requires_grad_(False)
    model.pooler.requires_grad_(False)
    (model.scale * 2).sum().backward()
    with pytest.warns(UserWarning, match=r"2 of 2 routed layers .* They were frozen"):
        optimizer.step()
    model.requires_grad_(True)
    (model.pooler(model.body(torch.ones(2, 4))) * model.scale).sum().backward()
    optimizer.step()
    assert list(optimizer.routing) == ["body", "pooler"]


def test_adapter_put_on_after_the_optimizer_was_built():
    """PEFT freezes the base."""
    import peft

    model = tiny_qwen2()
    optimizer = tiny_optimizer(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ids = torch.arange(6)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    with pytest.warns(UserWarning, match=r"7 of 7 .* They were frozen .* by an adapter"):
        optimizer.step()


def test_a_later_step_without_gradients_is_no_error():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    run(model, optimizer, [0])
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.routing == {}


def test_adapter_deleted_after_the_optimizer_was_built():
    config = MoLFConfig(ranks=(2,), freeze_base=True)
    model = molf.with_adapter(tiny_qwen2(), config)
    optimizer = MoLFAdamW.from_model(model, config)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    layer.lora_A["default"] = nn.Linear(64, 2, bias=False)
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match=r"lora_A.default.weight was replaced"):
        optimizer.step()
