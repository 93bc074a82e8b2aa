"""Options of models in shards, and offloaded shards, in one process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from cyclopts import CycloptsError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import Shard

from checkpoints import make_model
from molf.cli import main
from molf.cli.recipes.schema import recipe_schema
from molf.cli.recipes.validation import parse_options
from molf.errors import InputError
from molf.job import shards
from molf.job.record.resumed_run import split_again
from molf.job.settings.settings import TrainSettings
from molf.job.settings.sharding import check_offload
from molf.job.shards import Sharding
from molf.job.trainer import sft_config
from molf.job.trainer.trainer import _prepare_shards
from molf.ranks import ALONE, Ranks


@pytest.fixture
def group():
    """A process group of one process, which also has meshes of GPUs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("given", [4, "4", "all"])
def test_numbers_of_shards(given):
    assert TrainSettings(fsdp=given).fsdp == given


def test_recipes_have_a_number_or_a_word():
    assert set(recipe_schema()["properties"]["fsdp"]["type"]) == {"integer", "string", "null"}
    for given in (4, "4", "all"):
        options = parse_options(Path("recipe.yaml"), "train", {"fsdp": given})
        assert options["settings"].fsdp == ("all" if given == "all" else 4)
    with pytest.raises(CycloptsError, match="must be a whole number"):
        parse_options(Path("recipe.yaml"), "train", {"fsdp": 2.5})


@pytest.mark.parametrize("given", [1, 0, -2, True, "1", "2.0", "", "half"])
def test_wrong_numbers_of_shards(given):
    with pytest.raises(InputError, match=f"Invalid fsdp={given}. Must be a number of processes"):
        TrainSettings(fsdp=given)


def test_offload_is_refused_where_it_moves_nothing(capsys):
    with pytest.raises(InputError, match="Invalid fsdp_cpu_offload without fsdp"):
        TrainSettings(fsdp_cpu_offload=True)
    with pytest.raises(InputError, match="Invalid fsdp_cpu_offload on cpu: it keeps shards in"):
        check_offload("cpu")
    check_offload("cuda")
    given = ["plan", "--num_gpus", "2", "--fsdp", "all", "--fsdp_cpu_offload", "--device", "cpu"]
    assert main(given) == 2
    assert "Invalid fsdp_cpu_offload on cpu" in capsys.readouterr().err


def test_a_run_resumed_in_one_process_has_no_shards_to_offload():
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "fsdp": 2,
        "fsdp_cpu_offload": True,
    }
    split_again(options, 2, 4)
    assert (options["fsdp"], options["fsdp_cpu_offload"]) == (2, True)
    split_again(options, 4, 1)
    assert (options["fsdp"], options["fsdp_cpu_offload"]) == (None, False)


@pytest.mark.parametrize("offloads", [True, False])
def test_offload_policy_reaches_fully_shard(group, monkeypatch, offloads):
    """Of each block and of the rest, and the training goes on as without it."""
    given, apply = [], shards.fully_shard

    def recorded(module, **named):
        given.append((type(module).__name__, named["offload_policy"]))
        return apply(module, **named)

    monkeypatch.setattr(shards, "fully_shard", recorded)
    whole = make_model("qwen2")
    mesh = init_device_mesh("cpu", (1,))
    model = Sharding(ALONE, torch.device("cpu"), mesh, offloads).cut(whole)
    names, policies = zip(*given, strict=True)
    assert names == ("Qwen2DecoderLayer", "Qwen2DecoderLayer", "Qwen2ForCausalLM")
    for policy in policies:  # torch pins no memory without CUDA
        assert policy == (CPUOffloadPolicy(pin_memory=False) if offloads else OffloadPolicy())
    ids = torch.arange(24).view(2, 12)
    for one in (whole, model):
        one(input_ids=ids, labels=ids).loss.backward()
    gradients = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.device.type == parameter.grad.device.type == "cpu"
        assert torch.equal(parameter.grad.full_tensor(), gradients[name].grad), name


def test_another_model_than_that_of_rank_0_is_named(group):
    class Other(Ranks):
        rank = 1

        def on_main(self, act):
            return {name.replace("bias", "scale"): kind for name, kind in act().items()}

    sharding = Sharding(Other(), torch.device("cpu"), init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match=r"of rank 1 differs .*: bias \[3\] float32 there, scale"):
        sharding.cut(nn.Linear(2, 3))


def test_offloaded_state_stays_in_host_memory(group):
    """Beside a mesh of GPUs, to which DTensor.from_local copies."""
    from molf.core.storage.sharding import as_sharded

    mesh = init_device_mesh("cuda", (1,))
    values = torch.arange(12.0).view(3, 4)
    like = SimpleNamespace(device_mesh=mesh, placements=(Shard(0),))
    found = as_sharded(values, like, 0, 3)
    assert found.to_local().device.type == found.device.type == "cpu"
    assert found.to_local().data_ptr() == values.data_ptr()
    assert (found.shape, found.stride(), found.placements) == ((3, 4), (4, 1), (Shard(0),))
    assert found.device_mesh.device_type == "cuda"


def test_offloaded_shards_are_sent_from_host_memory_and_from_the_device(monkeypatch):
    started = []
    monkeypatch.setattr(sft_config, "start_group", lambda *given: started.append(given))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for also_on_host in (False, True):
        sft_config._start_processes({"use_cpu": False}, also_on_host=also_on_host)
    sft_config._start_processes({"use_cpu": True}, also_on_host=False)
    timeout = timedelta(seconds=1800)
    assert started == [("nccl", timeout), ("cpu:gloo,cuda:nccl", timeout), ("gloo", timeout)]


def test_accelerate_does_not_move_shards(monkeypatch):
    from accelerate import Accelerator

    model = nn.Linear(2, 2)
    monkeypatch.setattr(model, "to", lambda *given, **named: pytest.fail("moved"))
    assert _prepare_shards(Accelerator(cpu=True), model, device_placement=True) is model
