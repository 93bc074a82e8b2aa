"""Saving, loading, copying: the run that goes on is the run that was, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

import molf
from core_helpers import (
    assert_same_bits,
    backward,
    run,
    snapshot,
    tiny_model,
    tiny_optimizer,
)
from molf import AdamW, MoLFAdamW, MoLFConfig
from optimizer_forms import build

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
    # Steps, experts; decisions, wins, changes, last change, sum of margins, last winners.
    steps, experts, decisions, wins, *_, last = state_dict["param_groups"][0].pop("history")
    assert (steps, experts, decisions) == (3, ["full", "lora0_r2", "lora1_r3"], 3)
    assert sum(wins) == 2 * 3
    assert len(last) == 2
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


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_unknown_storage_of_moments_is_refused(form):
    model, optimizer = build(form)
    run(model, optimizer, [0])
    saved = optimizer.state_dict()
    saved["param_groups"][-1]["state_dtype"] = "4bit"
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"Invalid state_dtype='4bit'. Must be 'float32' or"):
        optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    ("form", "key"),
    [("folded", "lora_B_exp_avg"), ("folded", "exp_avg"), ("explicit", "exp_avg_sq"),
     ("fft", "exp_avg_sq")],
)  # fmt: skip
def test_state_that_lacks_a_tensor_is_refused(form, key):
    model, optimizer = build(form)
    run(model, optimizer, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0][key]
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=rf"that of (up|embed)\.weight lacks {key}\."):
        optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(model, optimizer), before)


def test_state_of_plain_adamw_is_refused():
    model, optimizer = fresh_copy(tiny_model())
    adamw = torch.optim.AdamW(model.parameters())
    run(model, adamw, [0])
    with pytest.raises(ValueError, match="Cannot load the optimizer state"):
        optimizer.load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_of_torchs_adamw_goes_on(dtype):
    """As if its counter and moments had been ours from the start."""
    model, twin = tiny_model(dtype), tiny_model(dtype)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.8, 0.99))
    run(model, theirs, range(2))
    ours = AdamW(model.named_parameters())
    ours.load_state_dict(theirs.state_dict())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    twin.load_state_dict(model.state_dict())
    reference = AdamW(twin.named_parameters(), lr=1e-3, weight_decay=0.1, betas=(0.8, 0.99))
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        kept = theirs.state[own]
        reference.state[other] = {
            "step": 2,
            "exp_avg": kept["exp_avg"].to(wide, copy=True),
            "exp_avg_sq": kept["exp_avg_sq"].to(wide, copy=True),
        }
        assert type(ours.state[own]["step"]) is int
    run(model, ours, [2])
    run(twin, reference, [2])
    assert_same_bits(snapshot(model, ours), snapshot(twin, reference))
    assert set(ours.param_groups[0]) == set(reference.param_groups[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "it has amsgrad, max_exp_avg_sq"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "it has maximize"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "weight decay that is not decoupled"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "it has momentum_buffer, no exp_avg, "),
    ],
)
def test_state_of_other_optimizers_is_refused(make, message):
    model = tiny_model()
    other = make(model.parameters())
    run(model, other, [0])
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=f"Cannot load the optimizer state.*{message}") as raised:
        optimizer.load_state_dict(other.state_dict())
    assert "\n" not in str(raised.value)
    assert not any(optimizer.state.values())
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_state_of_other_parameters_is_refused_by_name():
    one, two = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    saved = AdamW([("one", one), ("two", two)]).state_dict()
    swapped = AdamW([("two", two), ("one", one)])
    with pytest.raises(ValueError, match="of parameter 'one' where this optimizer has 'two'"):
        swapped.load_state_dict(saved)
    wrapped = AdamW([("module.one", one), ("module.two", two)])
    wrapped.load_state_dict(saved)
    assert wrapped.param_groups[0]["param_names"] == ["module.one", "module.two"]
    nameless = AdamW([one, two])
    nameless.load_state_dict(saved)
    assert "param_names" not in nameless.param_groups[0]
    with pytest.raises(ValueError, match="a group has 2 parameters where this optimizer has 1"):
        AdamW([("one", one)]).load_state_dict(saved)


def test_name_of_an_adapter_may_differ():
    config = MoLFConfig(ranks=(2, 3), alpha=4.0, freeze_base=True, freeze_rest=False)
    first = molf.with_adapter(tiny_model(), config, adapter_name="first")
    second = molf.with_adapter(tiny_model(), config, adapter_name="second")
    saved = MoLFAdamW.from_model(first, config).state_dict()
    optimizer = MoLFAdamW.from_model(second, config)
    before = [group["param_names"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    assert [group["param_names"] for group in optimizer.param_groups] == before
    assert "up.lora_A.second.weight" in before[0]


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
