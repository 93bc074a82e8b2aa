"""What torch's own test suite checks of every optimizer, of ours, in our words.

Their inputs are in `test_torch_database.py`.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_database import SUBJECTS, Problem

from molf import AdamW, MoLFAdamW

each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda one: one.name)
PLAIN_KEYS = {"params", "lr", "betas", "eps", "weight_decay"}


def assert_equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@each_subject
def test_groups_have_their_own_rates(subject):
    still, moving = Problem.make(), Problem.make()
    optimizer = subject(
        [{"params": still.parameters, "lr": 0.0}, {"params": moving.parameters}],
        lr=0.1,
        weight_decay=0.5,
    )
    before = still.values()
    still.backward()
    moving.backward()
    optimizer.step()
    assert_equal(still.values(), before)
    assert not any(map(torch.equal, moving.parameters, before))


@each_subject
def test_groups_have_their_own_decays(subject):
    decaying, other = Problem.make(), Problem.make()
    optimizer = subject(
        [{"params": decaying.parameters, "weight_decay": 0.5}, {"params": other.parameters}],
        lr=0.1,
        weight_decay=0.0,
    )
    before = decaying.values()
    for parameter in decaying.parameters + other.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(decaying.values(), [0.95 * value for value in before])
    assert_equal(other.values(), before)


@each_subject
@pytest.mark.filterwarnings("ignore:.* routed layers have no gradient")
def test_nothing_happens_without_gradients(subject):
    problem = Problem.make()
    optimizer = subject(problem.parameters, weight_decay=0.1)
    before = problem.values()
    assert optimizer.step() is None
    assert optimizer.step(lambda: 3.0) == 3.0
    assert_equal(problem.values(), before)
    assert not any(optimizer.state.values())


@each_subject
def test_a_closure_that_raises_leaves_everything(subject):
    problem = Problem.make()
    optimizer = subject(problem.parameters)
    before = problem.run(optimizer, 1)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_equal(problem.values(), before)
    assert {state["step"] for state in optimizer.state.values()} == {1}


@each_subject
def test_empty_and_single_numbers_take_part(subject):
    problem = Problem.make()
    empty = [nn.Parameter(torch.empty(shape)) for shape in ((0, 3), (3, 0), (0,))]
    scalar = nn.Parameter(torch.tensor(2.0))
    optimizer = subject([*problem.parameters, *empty, scalar], weight_decay=0.0)
    for parameter in (*empty, scalar):
        parameter.grad = torch.ones_like(parameter)
    first = problem.backward()
    problem.run(optimizer, 1)
    assert problem.backward() < first
    assert [tuple(parameter.shape) for parameter in empty] == [(0, 3), (3, 0), (0,)]
    assert scalar.item() == pytest.approx(2 - 1e-3)


@each_subject
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_gradients_are_never_written(subject, dtype, contiguous):
    problem = Problem.make(dtype, contiguous=contiguous)
    optimizer = subject(problem.parameters)
    for _ in range(2):
        problem.backward()
        given = [(p.grad, p.grad._version, p.grad.clone()) for p in problem.parameters]
        optimizer.step()
        for parameter, (grad, version, values) in zip(problem.parameters, given, strict=True):
            assert parameter.grad is grad
            assert grad._version == version
            assert_equal(grad, values)


@each_subject
def test_gradients_may_be_views(subject):
    """Of a bucket, as those of DDP; of one number, as those of a sum."""
    bucketed, expanded = Problem.make(), Problem.make()
    one, other = subject(bucketed.parameters), subject(expanded.parameters)
    bucket = torch.zeros(60)
    bucketed.weight.grad, bucketed.bias.grad = bucket[:50].view(10, 5), bucket[50:]
    for _ in range(3):
        bucket.zero_()
        (bucketed.weight.sum() + 2 * bucketed.bias.sum()).backward()
        expanded.weight.grad = torch.tensor(1.0).expand(10, 5)
        expanded.bias.grad = torch.tensor(2.0).expand(10)
        one.step()
        other.step()
        assert bucketed.weight.grad.data_ptr() == bucket.data_ptr()
        assert_equal(bucketed.values(), expanded.values())


@each_subject
def test_a_graph_of_the_gradient_stays_outside(subject):
    problem = Problem.make()
    optimizer = subject(problem.parameters)
    loss = (problem.weight.mv(problem.x) + problem.bias).pow(2).sum()
    grads = torch.autograd.grad(loss, problem.parameters, create_graph=True)
    for parameter, grad in zip(problem.parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()
    kept = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    assert kept
    assert not any(tensor.requires_grad for tensor in kept)


@each_subject
@pytest.mark.filterwarnings("ignore:Trained weights are")
def test_one_group_may_mix_dtypes(subject):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    problems = [Problem.make(dtype) for dtype in dtypes]
    optimizer = subject([p for one in problems for p in one.parameters], lr=0.01)
    first = [one.backward() for one in problems]
    for _ in range(5):
        for one in problems:
            one.backward()
        optimizer.step()
    assert all(one.backward() < loss for one, loss in zip(problems, first, strict=True))


@each_subject
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_does_not_matter(subject, dtype):
    ours, theirs = Problem.make(), Problem.make()
    expected = theirs.run(subject(theirs.parameters), 3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = ours.run(subject(ours.parameters), 3)
    finally:
        torch.set_default_dtype(before)
    assert_equal(got, expected)


@each_subject
@pytest.mark.parametrize("rate", [torch.tensor(0.01), torch.tensor([[0.01]])], ids=["0d", "2d"])
def test_a_tensor_is_a_rate(subject, rate):
    ours, theirs = Problem.make(), Problem.make()
    betas = torch.tensor(0.5), torch.tensor(0.75)
    optimizer = subject(ours.parameters, lr=rate, betas=betas)
    got = ours.run(optimizer, 3)
    expected = theirs.run(subject(theirs.parameters, lr=rate.item(), betas=(0.5, 0.75)), 3)
    assert_equal(got, expected)
    assert optimizer.param_groups[0]["lr"] == 0.01


@each_subject
def test_sparse_gradients_are_refused_by_name(subject):
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = subject(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"^The gradient of weight is sparse .*sparse=False"
    ) as raised:
        optimizer.step()
    assert "MoLF" not in str(raised.value)
    assert_equal(embedding.weight.detach(), before)


@each_subject
@pytest.mark.parametrize("resized", ["parameter", "moment", "both moments"])
def test_moments_of_another_shape_are_refused_before_anything_moves(subject, resized):
    """Torch's fused kernel would write past their ends."""
    problem, other = Problem.make(), nn.Parameter(torch.ones(3))
    optimizer = subject([("bias", problem.bias), ("weight", problem.weight), ("other", other)])
    other.grad = torch.ones(3)
    problem.run(optimizer, 1)
    if resized == "parameter":
        problem.weight.data = torch.zeros(40, 50)
        problem.weight.grad = torch.ones(40, 50)
    for key in {"moment": ["exp_avg_sq"], "both moments": ["exp_avg", "exp_avg_sq"]}.get(
        resized, []
    ):
        optimizer.state[problem.weight][key] = torch.zeros(2, 2)
    before = [*problem.values(), other.detach().clone()]
    with pytest.raises(RuntimeError, match=r"A moment of weight has shape"):
        optimizer.step()
    assert_equal([*problem.values(), other.detach()], before)
    del optimizer.state[problem.weight]
    optimizer.step()


@each_subject
@pytest.mark.parametrize("saved", ["parameters", "named"])
@pytest.mark.parametrize("loading", ["parameters", "named"])
def test_a_saved_run_goes_on_with_and_without_names(subject, saved, loading):
    problem = Problem.make()
    optimizer = subject(getattr(problem, saved), lr=0.1)
    problem.run(optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = problem.copy()
    resumed = subject(getattr(twin, loading))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(twin.run(resumed, 3), problem.run(optimizer, 3))
    assert ("param_names" in resumed.param_groups[0]) is (loading == "named")


@each_subject
def test_a_state_dict_is_the_same_each_time(subject):
    problem = Problem.make()
    optimizer = subject(problem.parameters)
    problem.run(optimizer, 2)
    one, other = optimizer.state_dict(), optimizer.state_dict()
    assert list(one["state"]) == list(other["state"])
    assert_equal(one["state"], other["state"])
    assert one["param_groups"] == other["param_groups"]


@each_subject
def test_older_states_get_the_keys_that_they_lack(subject):
    problem = Problem.make()
    optimizer = subject(problem.parameters)
    problem.run(optimizer, 2)
    expected = problem.copy().values()
    for key in sorted(set(optimizer.param_groups[-1]) - PLAIN_KEYS - {"layer", "state_dtype"}):
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            del group[key]
        twin = problem.copy()
        resumed = subject(twin.parameters)
        resumed.load_state_dict(saved)
        assert all(key in group for group in resumed.param_groups)
        assert_equal(twin.values(), expected)
        twin.run(resumed, 1)


@each_subject
def test_a_state_loads_without_the_counters_of_torch(subject):
    """Torch's counters are tensors, and were numbers once."""
    for number in (torch.tensor(2.0), 2, 2.0):
        problem = Problem.make()
        optimizer = subject(problem.parameters)
        problem.run(optimizer, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["step"] = number
        twin = problem.copy()
        resumed = subject(twin.parameters)
        resumed.load_state_dict(saved)
        assert_equal(twin.run(resumed, 2), problem.run(optimizer, 2))


def test_a_state_goes_on_in_torchs_adamw():
    problem = Problem.make()
    optimizer = AdamW(problem.parameters, lr=0.1)
    problem.run(optimizer, 2)
    twin = problem.copy()
    theirs = torch.optim.AdamW(twin.parameters)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(twin.run(theirs, 3), problem.run(optimizer, 3))


@each_subject
def test_a_state_saved_on_a_gpu_loads(subject):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    problem = Problem.make()
    optimizer = subject(problem.parameters)
    problem.run(optimizer, 2)
    twin = Problem.make()
    for one, other in zip(twin.parameters, problem.parameters, strict=True):
        one.data = other.detach().cuda()
    twin.x = problem.x.cuda()
    moved = subject(twin.parameters)
    moved.load_state_dict(optimizer.state_dict())
    twin.run(moved, 1)
    devices = {
        x.device.type for s in moved.state.values() for x in s.values() if torch.is_tensor(x)
    }
    assert devices == {"cuda"}
    optimizer.load_state_dict(moved.state_dict())
    problem.run(optimizer, 1)


@each_subject
def test_hooks_of_state_dicts_run_in_order_and_may_replace(subject):
    problem = Problem.make()
    optimizer = subject(problem.parameters)
    problem.run(optimizer, 1)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("second"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "mine": len(calls)})
    optimizer.register_state_dict_post_hook(lambda o, saved: calls.append("third"), prepend=True)
    saved = optimizer.state_dict()
    assert calls == ["first", "second", "third"]
    assert saved.pop("mine") == 3

    def halve(_, given):
        calls.append("halve")
        halved = [{**group, "lr": group["lr"] / 2} for group in given["param_groups"]]
        return {**given, "param_groups": halved}

    calls.clear()
    optimizer.register_load_state_dict_pre_hook(lambda o, given: calls.append("before"))
    optimizer.register_load_state_dict_pre_hook(halve, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("last"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("after"), prepend=True)
    optimizer.load_state_dict(saved)
    assert calls == ["halve", "before", "after", "last"]
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4}


@each_subject
def test_hooks_of_steps_run_in_order_and_may_replace(subject):
    problem = Problem.make()
    optimizer = subject(problem.parameters)
    calls = []
    handles = [
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("own after")),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("own before")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append("all after")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append("all before")),
    ]
    try:
        problem.run(optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    problem.run(optimizer, 1)
    assert calls == ["all before", "own before", "own after", "all after"]
    loss = problem.backward()
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, problem.backward), {}))
    assert optimizer.step() == loss


@each_subject
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_all_attributes_and_go_on_alike(subject, how):
    problem = Problem.make()
    optimizer = subject(problem.parameters, lr=0.1)
    problem.run(optimizer, 2)
    pair = problem, optimizer
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    public = {key for key in dir(optimizer) if not key.startswith("_")}
    assert public == {key for key in dir(other) if not key.startswith("_")}
    assert {key for key in public if not hasattr(other, key)} == set()
    assert_equal(twin.run(other, 2), problem.run(optimizer, 2))


@each_subject
def test_it_shows_itself(subject):
    optimizer = subject(Problem.make().parameters)
    assert repr(optimizer).startswith(type(optimizer).__name__)
    assert {"lr", "betas", "eps", "weight_decay"} <= set(optimizer.defaults)
    plain = torch.optim.SGD(Problem.make().parameters)
    assert set(vars(plain)) <= set(vars(optimizer))


@each_subject
def test_it_goes_when_nobody_holds_it(subject):
    problem = Problem.make()
    optimizer = subject(problem.parameters)
    problem.run(optimizer, 1)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None


@each_subject
def test_state_may_be_dropped(subject):
    for drop in (
        lambda o: o.state.clear(),
        lambda o: setattr(o, "state", defaultdict(dict)),
    ):
        used, fresh = Problem.make(), Problem.make()
        optimizer = subject(used.parameters)
        used.run(optimizer, 2)
        for one, other in zip(fresh.parameters, used.parameters, strict=True):
            one.data.copy_(other)
        drop(optimizer)
        assert_equal(used.run(optimizer, 2), fresh.run(subject(fresh.parameters), 2))


def test_rows_may_be_pruned_with_their_state():
    problem = Problem.make()
    optimizer = AdamW([{"params": [p], "name": n} for n, p in problem.named], lr=0.1)
    problem.run(optimizer, 2)
    for group in optimizer.param_groups:
        old = group["params"][0]
        state = optimizer.state.pop(old)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key][:7].clone()
        group["params"][0] = new = nn.Parameter(old.detach()[:7].clone())
        optimizer.state[new] = state
    pruned = Problem(*(group["params"][0] for group in optimizer.param_groups), problem.x)
    rows = [values[:7] for values in problem.run(AdamW(problem.parameters, lr=0.0), 0)]
    assert_equal(pruned.values(), rows)
    pruned.run(optimizer, 2)
    assert optimizer.state[pruned.weight]["step"] == 4


@each_subject
@pytest.mark.parametrize(
    ("group", "error"),
    [
        (["weight"], TypeError),
        ("weight", TypeError),
        (None, TypeError),
        ({"lr": 0.1}, KeyError),
        ({"params": {nn.Parameter(torch.ones(1))}}, TypeError),
        ({"params": [1.0]}, TypeError),
        ({"params": [nn.Parameter(torch.ones(1)) * 2]}, ValueError),
    ],
    ids=["list", "string", "none", "no params", "set", "number", "no leaf"],
)
def test_groups_of_another_kind_are_refused_as_by_torch(subject, group, error):
    problem = Problem.make()
    optimizer = subject(problem.parameters)
    groups = [dict(own) for own in optimizer.param_groups]
    with pytest.raises(error) as raised:
        optimizer.add_param_group(copy.copy(group))
    with pytest.raises(error) as expected:
        torch.optim.AdamW(Problem.make().parameters).add_param_group(copy.copy(group))
    assert str(raised.value) == str(expected.value)
    assert [dict(own) for own in optimizer.param_groups] == groups
    problem.run(optimizer, 1)


@pytest.mark.parametrize(
    "params",
    [[], [1.0], ["weight"], [{"lr": 0.1}], [None], None, 3, {"params": []}],
    ids=["empty", "number", "string", "no params", "none inside", "none", "int", "dict"],
)
def test_params_of_another_kind_are_refused_as_by_torch(params):
    with pytest.raises((TypeError, ValueError, KeyError)) as expected:
        torch.optim.AdamW(params)
    with pytest.raises(expected.type) as raised:
        AdamW(params)
    assert str(raised.value) == str(expected.value)


def test_a_routed_optimizer_says_what_it_is_built_from():
    with pytest.raises(ValueError, match="from_model"):
        MoLFAdamW(Problem.make().parameters)


@each_subject
def test_groups_come_later_in_every_shape(subject):
    problem, one, other = Problem.make(), Problem.make(), Problem.make()
    optimizer = subject(problem.parameters)
    optimizer.add_param_group({"params": one.bias})
    optimizer.add_param_group({"params": (parameter for parameter in [one.weight])})
    optimizer.add_param_group({"params": other.parameters, "lr": 0.0})
    for each in (one, other):
        each.backward()
    before = problem.values()
    problem.run(optimizer, 1)
    assert not any(map(torch.equal, one.parameters, before))
    assert_equal(other.values(), before)


@each_subject
def test_the_profiler_sees_steps(subject):
    problem = Problem.make()
    optimizer = subject(problem.parameters)
    with torch.profiler.profile() as profile:
        problem.run(optimizer, 1)
        optimizer.zero_grad()
    name = type(optimizer).__name__
    found = {event.key for event in profile.key_averages()}
    assert {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"} <= found
