"""What torch's own test suite checks of every optimizer, of ours, in our words.

Its inputs are in `test_torch_database.py`, states and hooks in `test_torch_state.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from molf import AdamW, MoLFAdamW
from torch_database import LIKE_TORCH, SUBJECTS, Problem, assert_equal

each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda one: one.name)


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_does_not_matter(subject, dtype):
    """Nor to the counters of steps: bfloat16 has no 257."""
    ours, theirs = Problem.make(), Problem.make()
    expected = theirs.run(subject(theirs.parameters), 260)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = ours.run(subject(ours.parameters), 260)
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
def test_gradients_without_numbers_are_refused_by_name(subject):
    weight = nn.Parameter(torch.ones(4, 4, device="meta"))
    optimizer = subject([("weight", weight)])
    weight.grad = torch.ones(4, 4, device="meta")
    with pytest.raises(RuntimeError, match=r"^The gradient of weight is on the meta device"):
        optimizer.step()


def in_a_group(function):
    """Run a function in a process group of one process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        function(init_device_mesh("cpu", (1,)))
    finally:
        torch.distributed.destroy_process_group()


@each_subject
def test_parameters_that_are_not_cut_by_rows_are_refused_by_name(subject):
    def build(mesh):
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
        with pytest.raises(ValueError, match=r"^weight is a DTensor with placements \(Replicate"):
            subject([("weight", weight)])

    in_a_group(build)


@each_subject
@pytest.mark.parametrize("whole", [True, False])
def test_gradients_that_are_not_cut_as_the_parameter_are_refused_by_name(subject, whole):
    def step(mesh):
        ones = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        weight = nn.Parameter(torch.ones(4, 4) if whole else ones.clone())
        optimizer = subject([("weight", weight)])
        other = distribute_tensor(torch.ones(4, 4), mesh, [Replicate()])
        weight.grad = ones if whole else other
        reason = "is sharded .* the parameter is not" if whole else "is not sharded as the param"
        with pytest.raises(RuntimeError, match=rf"^The gradient of weight {reason}"):
            optimizer.step()

    in_a_group(step)


@each_subject
def test_one_shard_takes_the_steps_of_whole_tensors(subject):
    def step(mesh):
        results = []
        for is_sharded in (False, True):
            values = torch.linspace(-1, 1, 16).view(4, 4)
            weight, grad = values.clone(), values.flip(0)
            if is_sharded:
                weight, grad = (distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, grad))
            weight = nn.Parameter(weight)
            optimizer = subject([("weight", weight)])
            for _ in range(2):
                weight.grad = grad.clone()
                optimizer.step()
            results.append(weight.full_tensor() if is_sharded else weight)
            assert bool(optimizer.state[weight])
        if subject.score is None:
            assert_equal(results[1].detach(), results[0].detach())
        else:  # a shard's products may be rounded otherwise: by the last bit on some processors
            torch.testing.assert_close(results[1].detach(), results[0].detach(), rtol=5e-7, atol=0)
        assert not torch.equal(results[0].detach(), values)

    in_a_group(step)


def test_lazy_parameters_may_get_their_shapes_later():
    modules = []
    for make in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        module = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
        optimizer = make(module.parameters(), lr=0.1, weight_decay=0.01)
        module(torch.eye(3)).pow(2).sum().backward()
        optimizer.step()
        modules.append(module)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


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


def test_moments_of_factors_of_another_shape_are_refused():
    problem = Problem.make()
    optimizer = LIKE_TORCH[1](problem.parameters)  # factors move their moments and nothing else
    before = problem.run(optimizer, 1)
    optimizer.state[problem.weight]["lora_A_exp_avg"] = torch.zeros(1, 2)
    with pytest.raises(
        RuntimeError, match=r"shapes .*\(1, 2\).* Was the optimizer's state changed"
    ):
        problem.run(optimizer, 1)
    assert_equal(problem.values(), before)


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
