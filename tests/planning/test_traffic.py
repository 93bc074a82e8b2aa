"""Traffic and memory of several GPUs: planned, counted in real steps, and in the docs."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config

import traffic
from forked import forking
from molf.core.config import MoLFConfig
from molf.planning.memory import Planner
from molf.planning.traffic import RoutedShape, ShardedModel, buffer_bytes
from molf.planning.workload import Workload

DOCS = Path(__file__).parents[2] / "docs" / "sharding.md"
WORLD = 2


def test_table_of_the_docs_is_that_of_the_formula():
    text = DOCS.read_text(encoding="utf-8")
    for line in traffic.table(traffic.derived()):
        assert line in text


def count(rank, folder, models):
    """One process of several: what it counts, by case."""
    torch.set_num_threads(1)
    store, soon = dist.FileStore(f"{folder}/store", WORLD), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=soon)
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {
        name: traffic.count_model(mesh, config, method, ranks)
        for name, (config, method, ranks) in models.items()
    }
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def models(untied, tiny):
    """Biases (qwen2), tied and untied heads; all sizes divide by the processes."""
    return {
        "llama": (untied, "molf", (4,)),
        "qwen2": (tiny, "molf", (6,)),
        "adapter": (untied, "molf-e", (2, 4)),
    }


@pytest.fixture(scope="module")
def counted(tmp_path_factory, models):
    folder = str(tmp_path_factory.mktemp("traffic"))
    context = forking()
    processes = [
        context.Process(target=count, args=(rank, folder, models)) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WORLD
    return torch.load(f"{folder}/found.pt", weights_only=True)


@pytest.mark.slow
def test_planned_steps_are_counted(counted, models):
    """All bytes. Temporaries are planned with blocks of a CPU that processes do not divide."""
    for name, model in models.items():
        planned = traffic.plan_model(*model, WORLD)
        assert planned["sent"] == pytest.approx(counted[name]["sent"]), name
        assert 0.9 < planned["peak"] / counted[name]["peak"] < 1.5, name


def test_buffers_are_those_of_a_bucket():
    """64 MB of far factors, and the layer that exceeds them; transposed layers have B far."""
    layer = RoutedShape(4096, 14336)
    one = 4 * 128 * 14336
    few, many = (buffer_bytes([layer] * n, (128,), 8) for n in (4, 100))
    assert few == 4 * 2 * (2 * one) + 2 * 4 * one // 8
    assert many == buffer_bytes([layer] * 10, (128,), 8)
    assert buffer_bytes([layer._replace(transposed=True)], (128,), 8) * 14336 == (
        buffer_bytes([layer], (128,), 8) * 4096
    )


def test_replicas_reduce_their_shards():
    model = ShardedModel(layers=800, outside=200, trained=1000, weight_bytes=2, gradient_bytes=4)
    gathered = 2 * (2 * 800 + 200)
    assert model.sent(4, 4, passes=3) == pytest.approx(3 * 3 / 4 * (gathered + 4000))
    # Two replicas: each GPU also reduces its quarter of the gradients with another one.
    assert model.sent(8, 4, passes=1) == pytest.approx(3 / 4 * (gathered + 4000) + 1000)


def test_transposed_layers():
    """Conv1D: the far factor is B."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=50)
    workload = Workload(method="molf", config=MoLFConfig(ranks=(2,)), batch_size=1, length=8)
    routed = Planner(config).shape(workload).routed
    assert RoutedShape(96, 32, transposed=True, has_bias=True) in routed
    assert {layer.far(1) for layer in routed} == {layer.out_features for layer in routed}
