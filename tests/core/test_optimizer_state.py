"""Saving, loading, copying: the run that goes on is the run that was, bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from core_helpers import (
    assert_same_bits,
    backward,
    run,
    snapshot,
    tiny_model,
    tiny_optimizer,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def started(dtype: torch.dtype = torch.float32, **kwargs):
    """A model and its optimizer after three steps."""
    model = tiny_model(dtype)
    optimizer = tiny_optimizer(model, top_k=2, lora_lr=3e-2, **kwargs)
    run(model, optimizer, range(3))
    return model, optimizer


def fresh_copy(model: nn.Module, **kwargs):
    """The same weights under an optimizer that has taken no step."""
    twin = tiny_model(next(model.parameters()).dtype, seed=5)
    twin.load_state_dict(model.state_dict())
    return twin, tiny_optimizer(twin, **{"top_k": 2, "lora_lr": 3e-2, **kwargs})


@pytest.mark.parametrize("score", ["epd", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_resumed_run_is_the_uninterrupted_run(dtype, score, tmp_path):
    model, optimizer = started(dtype, score=score)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 10)
    saved = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    twin, resumed = fresh_copy(model, score=score)
    twin_scheduler = LambdaLR(resumed, lambda step: 1 - step / 10)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(loaded["optimizer"])
    twin_scheduler.load_state_dict(loaded["scheduler"])
    assert_same_bits(snapshot(twin, resumed), snapshot(model, optimizer))
    for batch in range(3, 8):
        for each, its_optimizer, its_scheduler in (
            (model, optimizer, scheduler),
            (twin, resumed, twin_scheduler),
        ):
            run(each, its_optimizer, [batch])
            its_scheduler.step()
        assert resumed.routing == optimizer.routing
    assert_same_bits(snapshot(twin, resumed), snapshot(model, optimizer))


def test_low_precision_weights_keep_float32_state():
    model, optimizer = started(torch.bfloat16)
    _, resumed = fresh_copy(model)
    resumed.load_state_dict(optimizer.state_dict())
    for parameter, state in resumed.state.items():
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        assert tensors.pop("low").dtype == torch.int16
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        assert any((v.bfloat16().float() != v).any() for v in tensors.values()), parameter.shape


def test_loading_does_not_share_tensors_with_the_source():
    model, optimizer = started()
    twin, resumed = fresh_copy(model)
    given = optimizer.state_dict()
    resumed.load_state_dict(given)
    before = snapshot(twin, resumed)
    run(model, optimizer, [3])
    assert_same_bits(snapshot(twin, resumed), before)
    pointers = {
        v.data_ptr() for s in given["state"].values() for v in s.values() if isinstance(v, Tensor)
    }
    for state in resumed.state.values():
        assert not pointers & {v.data_ptr() for v in state.values() if isinstance(v, Tensor)}


def test_golden_state_dict():
    _, optimizer = started()
    state_dict = optimizer.state_dict()
    moments = {"step": 3, "exp_avg": (9, 6), "exp_avg_sq": (9, 6)}
    factors = {f"lora_A{m}": (5, 6) for m in ("", "_exp_avg", "_exp_avg_sq")}
    factors |= {f"lora_B{m}": (9, 5) for m in ("", "_exp_avg", "_exp_avg_sq")}
    shapes = {
        k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in state_dict["state"][0].items()
    }
    assert shapes == moments | factors
    assert state_dict["state"][1].keys() == {"step", "exp_avg", "exp_avg_sq"}  # the bias
    assert type(state_dict["state"][0]["step"]) is int
    assert state_dict["param_groups"][0] == {
        "params": [0, 1],
        "param_names": ["up.weight", "up.bias"],
        "layer": "up",
        "transposed": False,
        "ranks": (2, 3),
        "scalings": (4 / 2**0.5, 4 / 3**0.5),
        "score": "epd",
        "top_k": 2,
        "seed": 0,
        "lr": 1e-2,
        "lora_lr_ratios": (3.0, 3.0),
        "weight_decay": 0.1,
        "lora_weight_decays": (0.01, 0.01),
        "bias_weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_rounding": None,
        "state_dtype": "float32",
    }
    assert state_dict["param_groups"][2]["layer"] is None


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike(how):
    model, optimizer = started(nonfinite="skip")
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.nonfinite == "skip"
    assert other.routing == optimizer.routing
    run(model, optimizer, [3, 4])
    run(twin, other, [3, 4])
    assert_same_bits(snapshot(twin, other), snapshot(model, optimizer))
    backward(twin, 5)
    twin.up.weight.grad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="Step skipped"):
        other.step()
    assert (optimizer.skipped_steps, other.skipped_steps) == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": (2, 4)}, r"ranks=\(2, 4\) where this optimizer has \(2, 3\)"),
        ({"ranks": (2,)}, "ranks"),
        ({"alpha": 8.0}, "scalings"),
        ({"target_modules": ["up"]}, "3 parameter groups, this optimizer has 4"),
        ({"exclude_modules": ["up"]}, "layer='down' where this optimizer has 'up'"),
    ],
)
def test_state_of_other_experts_or_layers_is_refused(change, message):
    other_model = tiny_model()
    other = tiny_optimizer(other_model, **change)
    run(other_model, other, [0])
    model, optimizer = fresh_copy(tiny_model())
    optimizer_before = (snapshot(model, optimizer), [dict(g) for g in optimizer.param_groups])
    with pytest.raises(ValueError, match=f"Cannot load the optimizer state.*{message}"):
        optimizer.load_state_dict(other.state_dict())
    assert_same_bits(snapshot(model, optimizer), optimizer_before[0])
    assert [dict(g) for g in optimizer.param_groups] == optimizer_before[1]
    run(model, optimizer, [0])


def test_state_of_plain_adamw_is_refused():
    model, optimizer = fresh_copy(tiny_model())
    adamw = torch.optim.AdamW(model.parameters())
    run(model, adamw, [0])
    with pytest.raises(ValueError, match="Cannot load the optimizer state"):
        optimizer.load_state_dict(adamw.state_dict())


def test_groups_of_an_older_checkpoint_get_the_keys_they_lack():
    model, optimizer = started()
    twin, resumed = fresh_copy(model)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for key in ("seed", "bias_weight_decay", "score"):
            group.pop(key, None)
        if group["layer"] is None:
            del group["layer"]
    resumed.load_state_dict(old)
    run(model, optimizer, [3])
    run(twin, resumed, [3])
    assert_same_bits(snapshot(twin, resumed), snapshot(model, optimizer))


def test_user_hooks_see_and_may_replace_the_state():
    model, optimizer = started()
    twin, resumed = fresh_copy(model)
    seen = []

    def halve_rates(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for group in state_dict["param_groups"]:
            group["lr"] /= 2
        return state_dict

    resumed.register_load_state_dict_pre_hook(halve_rates)
    resumed.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[twin.up.weight]["lora_A"].clone())
    )
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] / 2
    assert torch.equal(seen[0], optimizer.state[model.up.weight]["lora_A"])
    assert len(resumed._optimizer_load_state_dict_pre_hooks) == 1
    assert len(resumed._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_checkpoint_state_dict_round_trip(dtype, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = started(dtype)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin, resumed = fresh_copy(model)
    set_optimizer_state_dict(twin, resumed, saved, options=options)
    assert_same_bits(snapshot(twin, resumed), snapshot(model, optimizer))
    run(model, optimizer, range(3, 6))
    run(twin, resumed, range(3, 6))
    assert_same_bits(snapshot(twin, resumed), snapshot(model, optimizer))


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_of_a_layer_that_never_had_a_gradient(flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten, strict=False)
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    for batch in range(2):
        backward(model, batch)
        model.down.weight.grad = model.norm.weight.grad = None
        optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin, resumed = fresh_copy(model, top_k=1, lora_lr=None)
    set_optimizer_state_dict(twin, resumed, saved, options=options)
    run(model, optimizer, [2, 3])
    run(twin, resumed, [2, 3])
    assert_same_bits(snapshot(twin, resumed), snapshot(model, optimizer))


def test_distributed_checkpoint_initialises_an_empty_state_neutrally():
    """It takes a step of its own, with zero gradients at rate 0, to learn the state's keys."""
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    get_optimizer_state_dict(model, optimizer)
    assert len(optimizer.state) == 7
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
        state = optimizer.state[parameter]
        for key in state.keys() - {"step", "lora_A"}:
            assert not state[key].any(), key
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2] * 4


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of the missing process group
def test_distributed_checkpoint_on_disk(tmp_path):
    model, optimizer = started(torch.bfloat16)
    backward(model, 9)
    model.down.weight.grad = None  # a layer that sat a step out
    optimizer.step()
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "c")
    twin, resumed = fresh_copy(model)
    target = {"optim": get_optimizer_state_dict(twin, resumed)}
    dcp.load(target, checkpoint_id=tmp_path / "c")
    set_optimizer_state_dict(twin, resumed, target["optim"])
    run(model, optimizer, range(3, 6))
    run(twin, resumed, range(3, 6))
    assert_same_bits(snapshot(twin, resumed), snapshot(model, optimizer))
