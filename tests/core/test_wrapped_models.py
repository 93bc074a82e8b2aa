"""Models inside wrappers for several devices: what is refused, in one line and before a change."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

import molf
from checkpoints import make_model
from molf import Assignment, MoLFAdamW, MoLFConfig

IDS = torch.arange(20).reshape(2, 10)
LORA = {"full": ["k_proj", "v_proj"], "default": {"r": 2, "alpha": 2}}
FULL = {"full": ["k_proj"], "default": "frozen"}


class Own(nn.Module):
    """A user's own wrapper."""

    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": DataParallel,
    "Own": Own,
}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(model):
    return [
        *((name, type(module)) for name, module in model.named_modules()),
        *((name, parameter.requires_grad) for name, parameter in model.named_parameters()),
    ]


def refused(call, model, words):
    before = state(model)
    with pytest.raises(ValueError, match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert state(model) == before


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_an_adapter_or_assignment_inside_a_wrapper_is_refused(kind, compiled):
    """The adapter would be outside of it: not averaged by DDP, and saved under other names."""
    model = WRAPPERS[kind](make_model("qwen2"))
    words = f"inside a {kind}, in its attribute module. Give model.module, and wrap the result"
    if compiled:
        model = torch.compile(model, backend="eager")
    for patterns in (LORA, FULL):
        assignment = Assignment.from_patterns(model, patterns)
        assert "model.layers.0.self_attn.k_proj" in assignment.layers
        refused(lambda wrapped, a=assignment: molf.with_assignment(wrapped, a), model, words)
    config = MoLFConfig(ranks=(2, 3), freeze_base=True)
    refused(lambda wrapped: molf.with_adapter(wrapped, config), model, words)


def test_a_wrapper_after_the_assignment_trains():
    inner = make_model("qwen2")
    assignment = Assignment.from_patterns(inner, LORA)
    model = DistributedDataParallel(molf.with_assignment(inner, assignment))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the model inside the wrapper saves the rest too
        optimizer = molf.AdamW.from_assignment(model, assignment, lr=1e-3)
    train(model, optimizer)


def train(model, optimizer):
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimizer_that_freezes_parameters_is_built_before_ddp():
    """DDP waits for gradients of all parameters that were trained when it was made."""
    config = MoLFConfig(ranks=(2, 3), freeze_rest=True)
    words = "freezes .*embed_tokens.weight, whose gradient DistributedDataParallel waits for"
    model = DistributedDataParallel(make_model("qwen2"))
    refused(lambda wrapped: MoLFAdamW.from_model(wrapped, config), model, words)
    inner = make_model("qwen2")
    optimizer = MoLFAdamW.from_model(inner, config)
    train(DistributedDataParallel(inner), optimizer)
    waiting = DistributedDataParallel(make_model("qwen2"), find_unused_parameters=True)
    train(waiting, MoLFAdamW.from_model(waiting, config))
    again = DistributedDataParallel(inner)
    train(again, MoLFAdamW.from_model(again, config))  # nothing is left to freeze


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_named(original):
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(make_model("qwen2"), use_orig_params=original, device_id=cpu)
    words = "_proj is flattened by FSDP1 .*Use fully_shard"
    for call in (MoLFAdamW.from_model, molf.with_adapter):
        refused(call, model, words)
    assignment = Assignment.from_patterns(make_model("qwen2"), LORA)
    refused(lambda wrapped: molf.with_assignment(wrapped, assignment), model, words)
