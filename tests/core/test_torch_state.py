"""Saved states, copies and hooks, as torch's own test suite checks them of every optimizer."""

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

from molf import AdamW
from torch_database import SUBJECTS, Problem, assert_equal

each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda one: one.name)
PLAIN_KEYS = {"params", "lr", "betas", "eps", "weight_decay"}


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
    hook = optimizer.register_state_dict_post_hook(lambda o, saved: {"under": saved})
    assert optimizer.state_dict()["under"]["param_groups"] == saved["param_groups"]
    hook.remove()

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
