"""Planned memory against measured: the benchmark's comparison, on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import molf
import plan_memory
from molf.core.arithmetic.blocks import BLOCKS
from molf.errors import InputError
from molf.planning.memory import Planner
from molf.planning.trace import trace_pass, trace_step
from molf.planning.trainable import skeleton
from molf.planning.workload import Workload
from plan_memory import method_config
from slow_cases import slow_after

RANKS = {"lora": (4,), "molf": (4, 8), "molf-e": (4, 8)}


def make(method, **options):
    config = method_config(method, ranks=RANKS.get(method))
    shape = {"batch_size": 2, "length": 48, "device": "cpu"}
    if method == "hybrid":
        shape |= {"assignment": plan_memory.assignment(method, rank=4), "lora_dropout": 0.1}
    return Workload(method=method, config=config, **{**shape, **options})


@pytest.mark.parametrize("method", ["fft", "lora", "molf", "molf-e", "hybrid"])
@pytest.mark.parametrize(
    "options",
    slow_after(
        1,
        [
            {},
            {"checkpointing": True},
            {"batch_size": 1, "length": 16, "accumulates": True, "padded": False},
        ],
    ),
    ids=["kept", "checkpointing", "accumulating"],
)
def test_planned_is_measured(tiny, monkeypatch, method, options):
    monkeypatch.setattr(plan_memory, "model_config", lambda: tiny)
    workload = make(method, **options)
    planned = Planner(tiny).memory(workload).peak
    assert planned == pytest.approx(plan_memory.measure(workload, "profiler"), rel=0.03)


SMALL = {
    "dtype": "bfloat16",
    "weight_rounding": "stochastic",
    "state_dtype": "8bit",
    "optimizer_in_backward": True,
}


@pytest.mark.parametrize(
    ("method", "options"),
    slow_after(
        2,
        [
            ("fft", {"state_dtype": "8bit"}),
            ("hybrid", {"dtype": "bfloat16", "quantised": "load_in_4bit"}),
            ("fft", {"optimizer_in_backward": True}),
            ("molf", SMALL),
            ("fft", {"dtype": "bfloat16", "grad_accumulation_dtype": "float32"}),
            ("lora", {"quantised": "load_in_4bit"}),
            ("molf-e", {"quantised": "load_in_8bit"}),
        ],
    ),
    ids=[
        *("8-bit states", "4-bit base, full layers in bfloat16", "in backward", "small"),
        *("float32 gradients", "4-bit base", "8-bit base"),
    ],
)
def test_planned_is_measured_however_numbers_are_kept(tiny, monkeypatch, method, options):
    library = {"state_dtype": "torchao", "quantised": "bitsandbytes"}
    for name in options.keys() & library.keys():
        pytest.importorskip(library[name])
    if "grad_accumulation_dtype" in options and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    # Few tokens beside wide layers: states and gradients decide.
    wide = tiny_with(tiny, hidden_size=128, intermediate_size=512, vocab_size=256)
    monkeypatch.setattr(plan_memory, "model_config", lambda: wide)
    workload = make(method, batch_size=1, length=8, padded=False, **options)
    planned = Planner(wide).memory(workload).peak
    if "state_dtype" in options:  # torchao's first use in a process takes room of its own
        plan_memory.measure(workload, "profiler")
    assert planned == pytest.approx(plan_memory.measure(workload, "profiler"), rel=0.06)


@pytest.mark.slow
def test_what_storage_saves(untied):
    planner = Planner(untied)
    plain, small = (planner.memory(make("fft", **options)) for options in ({}, SMALL))
    assert small.weights == pytest.approx(plain.weights / 2, rel=0.01)
    # Rows of 64 have a scale each: 2 + 2 * 4 / 64 bytes a number, of 8, and vectors in float32.
    assert small.moments < 0.32 * plain.moments
    assert (small.gradients, small.pass_gradients, small.transient) == (0, 0, 0)
    assert small.peak == small.pass_peak
    base = planner.memory(make("lora"))
    four, eight = (planner.memory(make("lora", quantised=f"load_in_{bits}bit")) for bits in (4, 8))
    linear = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160)  # weights; the head is not quantised
    assert base.weights - four.weights == linear * 4 - linear // 2 - linear // 64 * 4
    rows = 3 * (64 + 32 + 32 + 64 + 160 + 160 + 64)
    assert base.weights - eight.weights == linear * 3 - rows * 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fft", "molf"])
def test_state_in_host_memory(untied, method):
    planner = Planner(untied)
    how = {"device": "cuda", "batch_size": 1, "length": 8}
    plain = planner.memory(make(method, **how))
    other = planner.memory(make(method, state_offload=True, **how))
    # In pinned memory each tensor takes a power of two, at most twice what it is.
    state = plain.moments + plain.factors
    assert state < other.host < 1.5 * state
    if method == "fft":
        sizes = [4 * p.numel() for p in skeleton(untied).parameters()]
        assert other.host == 2 * sum(2 ** math.ceil(math.log2(size)) for size in sizes)
    assert (other.moments, other.factors, plain.host) == (0, 0, 0)
    assert (other.weights, other.gradients) == (plain.weights, plain.gradients)
    assert (other.activations, other.pass_gradients) == (plain.activations, plain.pass_gradients)
    # What is lent: of the head or the embeddings, and of their neighbours.
    largest = 2 * 4 * 700 * 64
    assert largest < other.transient - plain.transient < 3 * largest
    # In the backward pass too; the activations of the head are more than what is lent later.
    how["optimizer_in_backward"] = True
    beside = planner.memory(make(method, state_offload=True, **how))
    assert beside.host == other.host
    assert beside.peak < other.peak
    # Beside a CPU nothing moves.
    how["device"] = "cpu"
    kept, asked = (planner.memory(make(method, state_offload=x, **how)) for x in (False, True))
    assert kept == asked
    assert kept.host == 0


def test_trackers_agree(tiny, monkeypatch):
    """The profiler and torch.distributed's tracker, which share no code, see the same bytes."""
    monkeypatch.setattr(plan_memory, "model_config", lambda: tiny)
    workload = make("molf")
    profiler, tracker = (plan_memory.measure(workload, t) for t in ("profiler", "mem_tracker"))
    assert profiler == pytest.approx(tracker, rel=0.03)


@pytest.mark.parametrize("method", ["fft", "lora", "molf", "molf-e"])
def test_state_is_the_optimizers(tiny, monkeypatch, method):
    monkeypatch.setattr(plan_memory, "model_config", lambda: tiny)
    workload = make(method)
    model = plan_memory.make_model(workload)
    optimizer = plan_memory.make_optimizer(model, workload)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    step = trace_step(tiny, workload)
    assert step.moments + step.factors == sum(t.numel() * t.itemsize for t in tensors)
    assert step.gradients == sum(p.numel() * 4 for p in trained)
    assert (step.factors > 0) == (method == "molf")


def test_transient_is_of_whole_tensors_on_cuda(tiny):
    """Three temporaries of the largest layer on a GPU; blocks on a CPU, which hold a tiny layer."""
    on_cuda = trace_step(tiny, make("molf", device="cuda")).transient
    largest = 64 * 160 * 4
    assert 2 * largest < on_cuda < 6 * largest
    wide = tiny_with(tiny, intermediate_size=2560)
    block = BLOCKS.cpu_elements * torch.get_num_threads() * 4
    cuda, cpu = (trace_step(wide, make("molf", device=d)).transient for d in ("cuda", "cpu"))
    assert cuda >= 2 * 64 * 2560 * 4
    assert cpu < cuda
    assert cpu < 4 * block


def tiny_with(config, **changes):
    return type(config)(**{**config.to_dict(), **changes})


def test_what_the_pass_depends_on(tiny):
    base = trace_pass(tiny, make("fft")).activations
    assert trace_pass(tiny, make("fft", checkpointing=True)).activations < base
    assert trace_pass(tiny, make("fft", bf16=True)).activations < base
    assert trace_pass(tiny, make("fft", length=96)).activations > 1.8 * base
    assert trace_pass(tiny, make("fft", device="cuda")).activations < base  # no copies of logits
    assert trace_pass(tiny, make("fft", padded=False)).activations < base  # no mask
    assert trace_pass(tiny, make("molf")).activations == base  # folded: nothing is wrapped


def test_dropout_makes_molf_an_adapter(tiny):
    config = molf.MoLFConfig(ranks=(4,), lora_dropout=0.1)
    workload = Workload(method="molf", config=config, batch_size=2, length=48, device="cpu")
    planner = Planner(tiny)
    model = molf.with_adapter(AutoModelForCausalLM.from_config(tiny), config)
    plan = planner.memory(workload)
    tensors = (*model.parameters(), *model.buffers())
    assert plan.weights == sum(t.numel() * t.itemsize for t in tensors)
    assert plan.factors == 0
    assert plan.gradients == sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)


def test_phases_and_sharding(untied):
    planner = Planner(untied)
    workload = make("molf")
    one, four = (planner.memory(replace(workload, num_gpus=n)) for n in (1, 4))
    assert one.held == one.weights + one.moments + one.factors
    assert one.pass_peak == one.held + one.pass_gradients + one.activations
    assert one.step_peak == one.held + one.gradients + one.transient
    assert one.peak == max(one.pass_peak, one.step_peak)
    assert planner.step_peak(workload) == one.step_peak
    for name in ("weights", "gradients", "moments", "factors", "transient"):
        assert getattr(four, name) == pytest.approx(getattr(one, name) / 4, abs=1)
    assert four.activations == one.activations
    assert four.pass_peak == (four.held + four.pass_gradients + four.activations + four.gathered)
    # Layers: one, the next one, and gradients, made and reduced; the rest with its gradients.
    shape = planner.shape(workload)
    layer, rest = shape.layer_bytes, shape.outside_bytes
    assert four.gathered == max(4 * layer + 2 * rest, 3 * rest)
    mixed = planner.memory(replace(workload, num_gpus=4, bf16=True))
    assert mixed.gathered == max(2.5 * layer + rest, 2 * rest)
    frozen = planner.memory(make("molf-e", num_gpus=4))
    assert 2 * layer + rest < frozen.gathered < 3 * layer + rest
    assert four.step_peak == four.held + four.gradients + four.transient + four.exchanged
    assert four.exchanged > one.exchanged == 0
    # Two machines of two GPUs are four; two replicas of two shards hold more.
    assert planner.memory(replace(workload, num_gpus=2, num_nodes=2)) == four
    replicas = planner.memory(replace(workload, num_gpus=4, shards=2))
    assert replicas.weights == pytest.approx(2 * four.weights, abs=1)


def test_offloaded_shards_leave_activations_and_buffers_on_the_device(untied):
    planner = Planner(untied)
    workload = make("molf", num_gpus=4)
    kept, offloaded = (planner.memory(replace(workload, cpu_offload=x)) for x in (False, True))
    assert offloaded.held == offloaded.gradients == offloaded.transient == kept.host == 0
    assert offloaded.host == kept.held + kept.gradients + kept.transient
    assert offloaded.pass_peak == kept.activations + kept.gathered
    assert offloaded.step_peak == kept.exchanged > 0
    assert offloaded.peak == offloaded.pass_peak < kept.peak


def test_bfloat16_weights(untied):
    """Weights and gradients take half; moments stay float32, and each weight has a low half."""
    planner = Planner(untied)
    for method in ("molf", "fft"):
        full, half = (planner.memory(make(method, dtype=d)) for d in ("float32", "bfloat16"))
        assert half.weights == pytest.approx(full.weights / 2, rel=0.01)
        assert half.gradients == full.gradients / 2
        assert half.moments == pytest.approx(full.moments + full.weights / 2, rel=0.01)


def test_steps_in_the_backward_pass_exclude_several_devices():
    with pytest.raises(InputError, match="Invalid optimizer_in_backward with num_gpus=2"):
        make("fft", optimizer_in_backward=True, num_gpus=2)


def test_a_model_that_cannot_be_planned(capfd):
    """A line that says why, and none of torch's own beside it."""
    from transformers import MixtralConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=300, **sizes, **heads)
    with pytest.raises(InputError, match=r"pass of mixtral cannot be planned without data: \w+"):
        trace_pass(config, make("fft"))
    assert capfd.readouterr().err == ""
