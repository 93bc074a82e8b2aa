"""The family of methods: each moves what it claims to move, nothing else, and ends as a model."""

import csv
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import molf
from checkpoints import make_model
from molf.cli import main
from molf.data.encoding import EncodedSamples
from molf.errors import InputError
from molf.job.methods import TrainingData, check, plan, prepare
from molf.job.methods.eva import Eva, _batches
from molf.job.methods.matching import matching_rank
from molf.job.settings.defaults import ADAPTERS
from molf.job.settings.resolved import resolve
from molf.job.settings.settings import TrainSettings
from recorded import PROBE, logits_of, parameters_of
from slow_cases import slow_after

LAYERS = 14  # of the tiny checkpoints: 2 blocks of 7
TRAINED = {  # per adapter and layer, by the names that PEFT gives
    "lora": {"lora_A", "lora_B"},
    "lora+": {"lora_A", "lora_B"},
    "dora": {"lora_A", "lora_B", "lora_magnitude_vector"},
    "pissa": {"lora_A", "lora_B"},
    "eva": {"lora_A", "lora_B"},
    "adalora": {"lora_A", "lora_B", "lora_E"},
    "molf-e": {"lora_A", "lora_B"},
}
SAVED = (*ADAPTERS, "molf-e")  # methods whose result is an adapter
LOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapters, probe = json.loads(sys.argv[1])
logits = {}
for method, adapter in adapters.items():
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        logits[method] = model(torch.tensor(probe)).logits
assert not any(name.partition(".")[0] == "molf" for name in sys.modules)
torch.save(logits, sys.argv[2])
"""


def settings_of(method, **given):
    given = {"ranks": (4,), "model": "owner/name", "task": "custom", "data": "x", **given}
    return resolve(TrainSettings(method=method, **given), datetime(2026, 1, 1))


def training_data(count=40, steps=12, tokens=8):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 500, (tokens,), generator=generator).tolist() for _ in range(count)]
    labels = [[-100, *row[1:]] for row in ids]
    return TrainingData(EncodedSamples(ids, labels, list(range(count)), 0, tokens), steps)


def read_metrics(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def read_config(run):
    return yaml.safe_load((run.path / "config.yaml").read_text())


def adapter_config(run):
    return json.loads((run.path / "adapter" / "adapter_config.json").read_text())


def parts(run, kind):
    """Tensors of one kind, by layer, at the start and at the end of a training."""
    found = {}
    for name, start in run.start.items():
        match = re.fullmatch(rf"base_model\.model\.(.*)\.{kind}\.default(\.weight)?", name)
        if match:
            found[match[1]] = (start, run.end[name])
    return found


@pytest.mark.parametrize("method", SAVED)
def test_only_the_adapter_moves(run_of, method):
    run = run_of(method)
    assert run.start.keys() == run.end.keys()
    moved = {name for name in run.start if not torch.equal(run.start[name], run.end[name])}
    expected = {
        f"base_model.model.{layer}.{kind}.default"
        for kind in TRAINED[method]
        for layer in parts(run, kind)
    }
    assert {name.removesuffix(".weight") for name in moved} == expected
    layers = {layer for kind in TRAINED[method] for layer in parts(run, kind)}
    assert len(layers) == LAYERS or method == "eva"  # which takes all ranks from some
    assert {name.rpartition(".")[2] for name in layers} <= {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("method", SAVED)
def test_saved_model_differs_in_the_adapted_weights_alone(run_of, base, method):
    run = run_of(method)
    before = load_file(base / "model.safetensors")
    after = load_file(run.path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # PiSSA takes apart and puts together; AdaLoRA's layers without ranks keep their weight.
    adapted = {f"{layer}.weight" for layer in parts(run, "lora_A")}
    if method == "adalora":
        adapted = {name for name in adapted if _final_rank(run, name.removesuffix(".weight"))}
    assert changed == adapted


def _final_rank(run, layer):
    return sum(adapter_config(run)["rank_pattern"][f"{layer}.lora_E"])


def winning_experts(run):
    """By layer, who won a step at a rate above 0."""
    steps = run.routing[1:]  # the rate of the first is 0
    return {name: {w for step in steps for w in step[name].winners} for name in steps[0]}


def test_molf_e_moves_the_slices_of_the_winners_alone(run_of):
    run = run_of("molf-e")
    won = winning_experts(run)
    assert set().union(*won.values()) == {"lora0_r2", "lora1_r4"}  # else it would show little
    A, B = parts(run, "lora_A"), parts(run, "lora_B")
    assert A.keys() == B.keys() == won.keys()
    for layer, experts in won.items():
        for dim, (start, end) in ((0, A[layer]), (1, B[layer])):
            slices = zip(start.split([2, 4], dim), end.split([2, 4], dim), strict=True)
            for expert, (before, after) in zip(("lora0_r2", "lora1_r4"), slices, strict=True):
                assert torch.equal(before, after) == (expert not in experts)
    assert run.prepared.trained_parameters == sum(
        end.numel() for kind in (A, B) for _, end in kind.values()
    )


def test_explicit_molf_moves_what_has_won_and_what_is_not_routed(run_of):
    run = run_of("molf-dropout")
    won = winning_experts(run)
    assert set().union(*won.values()) == {"full", "lora0_r4"}
    for name, start in run.start.items():
        found = re.fullmatch(r"base_model\.model\.(.*)\.(base_layer|lora_[AB])\..*", name)
        owner = None if found is None else "full" if found[2] == "base_layer" else "lora0_r4"
        expected = owner is None or owner in won[found[1]]
        assert torch.equal(start, run.end[name]) == (not expected), name
    assert run.prepared.trained_parameters == sum(end.numel() for end in run.end.values())


def test_explicit_molf_keeps_no_adapter_and_whole_checkpoints(record, run_of, base, workplace):
    """Its base moves beside the adapter, and PEFT loads both."""
    run = run_of("molf-dropout")
    assert run.prepared.save_adapter is None
    again = record([*run.arguments, "--save_steps", "3"], workplace / "checkpoints-molf-dropout")
    model = AutoModelForCausalLM.from_pretrained(base)
    folder = again.path / "checkpoints" / "checkpoint-3"
    values = peft.PeftModel.from_pretrained(model, folder).state_dict()
    assert again.end.keys() <= values.keys()
    assert all(torch.equal(values[name], end) for name, end in again.end.items())


def test_checkpoints_of_an_adapter_hold_the_adapter_alone(record, run_of, workplace):
    run = record([*run_of("molf-e").arguments, "--save_steps", "3"], workplace / "checkpoints-e")
    folder = run.path / "checkpoints" / "checkpoint-3"
    assert not (folder / "model.safetensors").exists()
    assert len(load_file(folder / "adapter_model.safetensors")) == 2 * LAYERS


def test_molf_e_may_train_the_rest(record, run_of, workplace):
    """Norms, embeddings and biases by plain steps; then the adapter alone is not the result."""
    arguments = [*run_of("molf-e").arguments, "--freeze_rest", "false"]
    run = record(arguments, workplace / "molf-e-rest")
    frozen = {name for name, start in run.start.items() if torch.equal(start, run.end[name])}
    assert frozen == {name for name in run.start if name.endswith("base_layer.weight")}
    assert not (run.path / "adapter").exists()
    trained = sum(end.numel() for name, end in run.end.items() if name not in frozen)
    assert run.prepared.trained_parameters == trained
    for entry in read_metrics(run):
        assert entry["lora_learning_rate"] == pytest.approx(3 * entry["learning_rate"])


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_not_routed_may_be_frozen(frozen):
    """The plan counts what the optimizer owns, and the factors in its state."""
    settings = settings_of("molf", freeze_rest=frozen)
    model = make_model("qwen2")
    planned = plan(model, settings, training_data())
    prepared = prepare(model, settings, training_data())
    factory, arguments = prepared.optimizer
    groups = factory()(model, **arguments).param_groups
    owned = sum(parameter.numel() for group in groups for parameter in group["params"])
    factors = 4 * sum(layer.in_features + layer.out_features for layer in planned.layers)
    assert planned.trained_parameters == prepared.trained_parameters == owned + factors


def test_merge_is_reported_and_recorded(run_of):
    for name in ("molf-e", "molf-dropout", "lora"):
        record = read_config(run_of(name))["run"]["merge"]
        assert record["layers"] == LAYERS
        assert record["logit_difference"]["base"] < 1e-5 * record["largest_logit"]
    assert "merge" not in read_config(run_of("molf"))["run"]


def test_full_fine_tuning_moves_everything(run_of):
    run = run_of("fft")
    assert [name for name in run.start if torch.equal(run.start[name], run.end[name])] == []
    assert run.prepared.save_adapter is None


def test_molf_moves_all_but_the_biases_of_layers_that_full_never_won(run_of):
    run = run_of("molf")
    still = {name for name in run.start if torch.equal(run.start[name], run.end[name])}
    steps = run.routing[1:]  # the rate of the first is 0
    lost = {name for name in steps[0] if all("full" not in step[name].winners for step in steps)}
    assert still == {f"{name}.bias" for name in lost} & run.start.keys()
    assert run.prepared.save_adapter is None
    factors = 4 * sum(sum(run.start[f"{name}.weight"].shape) for name in steps[0])
    dense = sum(tensor.numel() for tensor in run.start.values())
    assert run.prepared.trained_parameters == dense + factors


@pytest.mark.parametrize("method", [*SAVED, "molf-dropout"])
def test_starts_as_the_base(run_of, method):
    run = run_of(method)
    assert (run.start_logits - run.base_logits).abs().max() < 1e-5


@pytest.fixture(scope="module")
def loaded(run_of, base, workplace):
    """What a process without molf makes of the base and each adapter."""
    out = workplace / "adapters.pt"
    adapters = {method: str(run_of(method).path / "adapter") for method in SAVED}
    given = json.dumps([str(base), adapters, PROBE.tolist()])
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, given, str(out)], check=True)
    return torch.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("method", SAVED)
def test_adapter_loads_with_peft_alone(loaded, run_of, method):
    run = run_of(method)
    torch.testing.assert_close(loaded[method], run.trained_logits, rtol=1e-4, atol=1e-5)
    card = (run.path / "adapter" / "README.md").read_text()
    assert method in card
    assert Path(adapter_config(run)["base_model_name_or_path"]).name in card


def test_rank_of_the_change(run_of, base):
    """LoRA's change of a weight has the adapter's rank; DoRA's has not, as it scales rows too."""
    name = "model.layers.0.mlp.gate_proj.weight"
    before = load_file(base / "model.safetensors")[name]
    ranks = {}
    for method in ("lora", "lora+", "dora"):
        after = load_file(run_of(method).path / "model" / "model.safetensors")[name]
        values = torch.linalg.svdvals((after - before).double())
        ranks[method] = int((values > 1e-4 * values[0]).sum())
    assert ranks["lora"] == ranks["lora+"] == 4
    assert ranks["dora"] > 4


def test_rank_stabilised_scaling(run_of):
    assert adapter_config(run_of("lora"))["use_rslora"] is True
    scalings = {}
    for use_rslora in (True, False):
        settings = settings_of("lora", alpha=(6.0,), use_rslora=use_rslora)
        model = prepare(make_model("qwen2"), settings, training_data()).model
        module = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        scalings[use_rslora] = module.scaling["default"]
    assert scalings == {True: 6 / math.sqrt(4), False: 6 / 4}


def test_loraplus_rates(run_of):
    settings = settings_of("lora+", lora_learning_rate=1e-3, lora_weight_decay=0.02)
    prepared = prepare(make_model("qwen2"), settings, training_data())
    factory, arguments = prepared.optimizer
    optimizer = factory()(prepared.model, **arguments)
    names = {parameter: name for name, parameter in prepared.model.named_parameters()}
    rates = {"lora_A": set(), "lora_B": set()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kind = "lora_A" if "lora_A" in names[parameter] else "lora_B"
            rates[kind].add((group["lr"], group["weight_decay"]))
    assert rates == {"lora_A": {(1e-3, 0.02)}, "lora_B": {(16e-3, 0.02)}}
    for entry in read_metrics(run_of("lora+")):
        assert entry["lora_B_learning_rate"] == 2 * entry["learning_rate"]


def test_dora_magnitudes_are_the_norms_of_the_merged_rows(run_of):
    run = run_of("dora")
    merged = load_file(run.path / "model" / "model.safetensors")
    for layer, (_, magnitude) in parts(run, "lora_magnitude_vector").items():
        norms = merged[f"{layer}.weight"].norm(dim=1)
        torch.testing.assert_close(norms, magnitude, rtol=1e-5, atol=1e-6)


def test_magnitudes_do_not_decay():
    prepared = prepare(make_model("qwen2"), settings_of("dora"), training_data())
    factory, arguments = prepared.optimizer
    decays = {
        parameter.dim(): group["weight_decay"]
        for group in factory()(prepared.model, **arguments).param_groups
        for parameter in group["params"]
    }
    assert decays == {2: 0.01, 1: 0.0}


def test_pissa_trains_the_largest_singular_values(run_of, base):
    run = run_of("pissa")
    weights = load_file(base / "model.safetensors")
    factors = parts(run, "lora_B")
    for layer, (A, _) in parts(run, "lora_A").items():
        B, _ = factors[layer]
        W = weights[f"{layer}.weight"]
        product = B @ A  # alpha 4, rank 4: the scaling is 1
        residual = run.start[f"base_model.model.{layer}.base_layer.weight"]
        torch.testing.assert_close(residual + product, W, rtol=1e-4, atol=1e-6)
        top = torch.linalg.svdvals(W)[:4]
        torch.testing.assert_close(torch.linalg.svdvals(product)[:4], top, rtol=1e-4, atol=1e-6)


def test_pissa_adapter_is_plain_lora_for_the_unchanged_base(run_of, base):
    """As it was trained, it would fit only a base that is decomposed again when it is loaded."""
    run = run_of("pissa")
    config = adapter_config(run)
    assert config["init_lora_weights"] is True
    assert config["r"] == 2 * 4
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, run.path / "adapter")
    with model.disable_adapter():
        assert torch.equal(logits_of(model), run.base_logits)


def test_eva_directions_come_from_the_data():
    """The first direction of the first layer's inputs, and rows of length 1."""
    data = training_data(count=60)
    model = make_model("qwen2")
    inputs = []
    first = model.get_submodule("model.layers.0.self_attn.q_proj")
    hook = first.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model.eval()(torch.tensor(data.samples.input_ids))
    hook.remove()
    X = inputs[0][:, 1:].reshape(-1, 32)  # the completion's tokens
    _, _, directions = torch.linalg.svd(X - X.mean(0), full_matrices=False)

    settings = settings_of("eva", ranks=(2,), per_device_train_batch_size=30)
    prepared = prepare(model, settings, data)
    factors = {name: p for name, p in prepared.model.named_parameters() if "lora_A" in name}
    A = next(p for name, p in factors.items() if "layers.0.self_attn.q_proj" in name)
    assert torch.abs(A[0] @ directions[0]) > 0.9
    for A in factors.values():
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=1e-4, atol=1e-4)
    ranks = [len(A) for A in factors.values()]
    assert sum(ranks) == 2 * LAYERS
    assert len(set(ranks)) > 1
    assert max(ranks) <= 2 * 2
    assert prepared.trained_parameters == sum(
        p.numel() for p in prepared.model.parameters() if p.requires_grad
    )


def test_eva_records_what_it_trains(run_of):
    run = run_of("eva")
    trained = run.prepared.trained_parameters
    assert read_config(run)["run"]["model"]["trained_parameters"] == trained
    assert trained == sum(
        end.numel() for kind in TRAINED["eva"] for _, end in parts(run, kind).values()
    )


def test_batches_of_eva(monkeypatch):
    """Eight times the tokens that are needed, fewer where examples are long; a rest with enough."""
    samples = training_data(count=60, tokens=8).samples  # 7 of them with loss

    def sizes(needed, least_samples=1):
        found = _batches(samples, least_tokens=needed, least_samples=least_samples, seed=0)
        assert len({index for batch in found for index in batch}) == sum(map(len, found))
        return [len(batch) for batch in found]

    assert sizes(21) == [24, 24, 12]  # 168 tokens each, and a rest with 84
    assert sizes(14) == [16, 16, 16, 12]
    assert sizes(14, least_samples=25) == [25, 25]
    assert sizes(140) == [60]
    assert sizes(500) == [60]
    monkeypatch.setattr("molf.job.methods.eva._MOST_POSITIONS", 80)
    assert sizes(21) == [10] * 6
    assert sizes(84) == [12] * 5


class Counted(Sequence):
    """A list that counts the reads of its entries, each of which may tokenize a sample."""

    def __init__(self, entries):
        self.entries, self.reads = entries, 0

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        self.reads += 1
        return self.entries[index]


def test_eva_reads_no_more_samples_than_it_needs(monkeypatch):
    monkeypatch.setattr("molf.job.methods.eva._MOST_BATCHES", 2)
    samples = training_data(count=60, tokens=8).samples
    labels = Counted(samples.labels)
    found = _batches(replace(samples, labels=labels), least_tokens=14, least_samples=1, seed=0)
    assert [len(batch) for batch in found] == [16, 16]
    assert labels.reads == 2 * 32
    data = TrainingData(replace(samples, labels=(labels := Counted(samples.labels))), 12)
    Eva().plan(make_model("qwen2"), settings_of("eva"), data)
    assert labels.reads == 3  # 21 tokens with loss, of 16


def test_eva_gives_up_where_directions_never_settle(monkeypatch):
    monkeypatch.setattr("molf.job.methods.eva._MOST_BATCHES", 1)
    with pytest.raises(RuntimeError, match="no stable directions in 1 batches"):
        prepare(make_model("qwen2"), settings_of("eva"), training_data())


@pytest.fixture(scope="module")
def adalora(record, base, facts, workplace):
    """Twelve steps: two at the initial ranks, four with allocations, six at the final ranks."""
    arguments = [
        *("train", "--method", "adalora", "--task", "fact", "--model", str(base)),
        *("--data", str(facts), "--ranks", "4", "--lora_learning_rate", "5e-2"),
        *("--max_steps", "12", "--logging_steps", "1", "--warmup_ratio", "0"),
        *("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "6"),
    ]
    return record(arguments, workplace / "adalora-12")


def test_adalora_moves_ranks(adalora):
    """From 6 in every layer to 4 on average; the allocator is called at every step."""
    means = [entry["mean_rank"] for entry in read_metrics(adalora)]
    assert means[:2] == [6, 6]
    assert means[2:6] == sorted(means[2:6], reverse=True)
    assert 4 < means[2] < 6
    assert means[5:] == [4] * 7

    singular = parts(adalora, "lora_E")
    assert all(len(start) == 6 for start, _ in singular.values())
    ranks = {layer: int(end.count_nonzero()) for layer, (_, end) in singular.items()}
    assert sum(ranks.values()) == 4 * LAYERS
    assert len(set(ranks.values())) > 1
    saved = load_file(adalora.path / "adapter" / "adapter_model.safetensors")
    for layer, rank in ranks.items():
        assert _final_rank(adalora, layer) == rank
        assert len(saved[f"base_model.model.{layer}.lora_E"]) == rank


def test_adalora_loss_contains_the_penalty(adalora, record, base, facts, workplace):
    """Once a step, whatever the number of batches; the rest is the same loss as LoRA's."""
    entries = read_metrics(adalora)
    A, B = (parts(adalora, kind) for kind in ("lora_A", "lora_B"))
    norms = [torch.linalg.norm(start @ start.T - torch.eye(6)) for start, _ in A.values()]
    norms += [torch.linalg.norm(start.T @ start - torch.eye(6)) for start, _ in B.values()]
    penalty = 0.5 * float(torch.stack(norms).mean())
    arguments = adalora.arguments.copy()
    arguments[2] = "lora"
    arguments[arguments.index("--max_steps") + 1] = "1"
    lora = record([*arguments, "--lora_dropout", "0"], workplace / "lora-penalty")
    assert penalty > 1
    assert entries[0]["loss"] == pytest.approx(read_metrics(lora)[0]["loss"] + penalty, rel=1e-5)
    # It is minimised, and so is the rest.
    penalties = [penalty, *(entry["penalty"] for entry in entries)]
    assert penalties[-1] < penalties[0]
    rest = [entry["loss"] - before for entry, before in zip(entries, penalties, strict=False)]
    assert rest[-1] < rest[0]
    assert adapter_config(adalora)["orth_reg_weight"] == 0.5


@pytest.mark.parametrize("method", slow_after(1, ["adalora", "pissa"]))
def test_checkpoints_change_nothing(record, run_of, workplace, method):
    """The Trainer saves the adapter on the way, which touches PEFT's own notes of the ranks."""
    run = run_of(method)
    again = record([*run.arguments, "--save_steps", "1"], workplace / f"checkpoints-{method}")
    assert torch.equal(again.trained_logits, run.trained_logits)


@pytest.mark.parametrize("method", slow_after(2, SAVED))
def test_autocast(record, run_of, workplace, method):
    """The weights stay float32, and the training is nearly the same."""
    full = run_of(method)
    run = record([*full.arguments, "--bf16"], workplace / f"bf16-{method}")
    assert {end.dtype for end in run.end.values()} == {torch.float32}
    losses, expected = ([entry["loss"] for entry in read_metrics(x)] for x in (run, full))
    assert losses == pytest.approx(expected, rel=1e-2)
    assert losses != expected


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("method", SAVED)
def test_other_architectures(tmp_path, method, architecture):
    """Whatever the trained values are: merged, and reloaded, the model computes the same."""
    settings = settings_of(method, ranks=(2, 3) if method == "molf-e" else (2,))
    prepared = prepare(make_model(architecture), settings, training_data())
    start = parameters_of(prepared.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prepared.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    moved = {
        name for name, p in prepared.model.named_parameters() if not torch.equal(p, start[name])
    }
    assert {kind for kind in TRAINED[method] if any(kind in name for name in moved)} == TRAINED[
        method
    ]
    expected = logits_of(prepared.model)
    prepared.save_adapter(prepared.model, tmp_path / "adapter")
    merged = molf.merge(prepared.model)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-3, atol=1e-4)
    reloaded = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(reloaded), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("match", ["rank", "parameters"])
@pytest.mark.parametrize("method", slow_after(2, ADAPTERS))
def test_equal_rank_or_equal_parameters(method, match):
    settings = settings_of(method, ranks=(8,), match=match)
    model, data = make_model("qwen2"), training_data(count=80)
    planned = plan(model, settings, data)
    lora = plan(model, settings_of("lora", ranks=(8,)), data)
    details = planned.details
    assert details["lora_parameters"] == lora.trained_parameters
    assert details["lora_rank"] == 8
    if match == "rank":
        assert details["rank"] == 8
    else:  # DoRA's magnitudes take half a rank, AdaLoRA begins with 1.5 times the ranks
        assert details["rank"] == {"adalora": 5}.get(method, 8)
        per_rank = lora.trained_parameters / 8
        assert abs(planned.trained_parameters - lora.trained_parameters) <= per_rank
    prepared = prepare(model, settings, data)
    if method != "eva":  # whose ranks move between layers of other sizes
        assert prepared.trained_parameters == planned.trained_parameters
    module = next(m for m in prepared.model.modules() if hasattr(m, "lora_A") and len(m.lora_A))
    wanted = settings.method_config.scalings[0]
    scaling = module.scaling["default"] / (
        float(module.ranknum["default"]) if method == "adalora" else 1
    )
    assert method == "eva" or scaling == pytest.approx(wanted)


def test_matched_rank_keeps_the_scaling():
    """DoRA of rank 7 comes closer to LoRA of rank 8 where layers have more outputs than inputs."""
    settings = settings_of("dora", ranks=(8,), match="parameters", target_modules=("up_proj",))
    model = prepare(make_model("qwen2"), settings, training_data()).model
    module = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert module.r["default"] == 7
    assert module.scaling["default"] == pytest.approx(2)  # alpha 16, rank 8


def test_adalora_needs_steps_to_move_ranks(run_of):
    """Three will do, as in the shared run."""
    with pytest.raises(InputError, match=r"at least 3 optimizer steps.* this training has 2\."):
        plan(make_model("qwen2"), settings_of("adalora"), training_data(steps=2))
    first, *rest = [entry["mean_rank"] for entry in read_metrics(run_of("adalora"))]
    assert 4 < first < 6
    assert rest == [4, 4]


def test_matching_rank():
    assert matching_rank(lambda rank: 10 * rank, 80) == 8
    assert matching_rank(lambda rank: 10 * rank + 4, 80) == 8
    assert matching_rank(lambda rank: 10 * rank + 6, 80) == 7
    assert matching_rank(lambda rank: 10 * rank + 5, 80) == 7
    assert matching_rank(lambda rank: 100 * rank, 80) == 1


def test_both_numbers_are_recorded(record, options, workplace):
    arguments = [*options, "--method", "adalora", "--match", "parameters", "--max_length", "64"]
    run = record(arguments, workplace / "matched")
    model = read_config(run)["run"]["model"]
    assert (model["rank"], model["lora_rank"]) == (3, 4)
    trained = sum(
        end.numel() for kind in TRAINED["adalora"] for _, end in parts(run, kind).values()
    )
    assert model["trained_parameters"] == trained
    with (workplace / "results.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["run"] == "matched")
    assert row["match"] == "parameters"
    assert int(row["trained_parameters"]) == trained
    assert int(row["lora_parameters"]) == model["lora_parameters"]


def test_one_lora_of_the_summed_rank(record, options, workplace, capsys):
    arguments = [*options, "--method", "lora", "--max_length", "64"]
    arguments[arguments.index("--ranks") + 1] = "4,2"
    run = record(arguments, workplace / "summed")
    assert "ranks=4,2 give it their sum, 6" in capsys.readouterr().err
    assert {len(A) for A, _ in parts(run, "lora_A").values()} == {6}
    assert read_config(run)["ranks"] == [6]


@pytest.mark.parametrize(
    ("score", "winners"),
    slow_after(1, [("random", {"full", "lora0_r4"}), ("full", {"full"}), ("lora", {"lora0_r4"})]),
)
def test_controls(record, options, workplace, score, winners):
    """Does routing matter? What runs without it, on record as what it is."""
    run = record([*options, "--score", score], workplace / f"score-{score}")
    won = {expert for step in run.routing for d in step.values() for expert in d.winners}
    assert won == winners
    assert read_config(run)["score"] == score
    with (workplace / "results.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["run"] == f"score-{score}")
    assert row["score"] == score


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("pissa", {"ranks": (17,)}, ["rank 17", "k_proj", "16 singular values", "--ranks"]),
        ("eva", {"ranks": (9,)}, ["rank 9", "36 features", "q_proj (32)", "--ranks"]),
        ("dora", {"target_modules": ("embed_tokens",)}, ["embed_tokens", "matches no linear"]),
    ],
)
def test_layers_that_do_not_fit(method, given, words):
    with torch.device("meta"):
        skeleton = make_model("qwen2")
    with pytest.raises(InputError) as caught:
        check(skeleton, settings_of(method, **given))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("method", ADAPTERS)
def test_what_peft_cannot_adapt_is_one_line(monkeypatch, method):
    """PEFT is asked before weights are loaded, on a model that has none."""
    with torch.device("meta"):
        skeleton = make_model("qwen2")
    check(skeleton, settings_of(method))
    assert all(p.is_meta for p in skeleton.parameters() if p.dim() == 2)

    def refuse(model, config):
        raise ValueError("Target module Odd() is not supported.\nMore of it.")

    monkeypatch.setattr("molf.job.methods.adapter.get_peft_model", refuse)
    with pytest.raises(InputError) as caught:
        check(make_model("qwen2"), settings_of(method))
    assert str(caught.value) == (
        f"method={method}: PEFT cannot adapt owner/name: Target module Odd() is not supported."
    )


def test_eva_needs_data_enough():
    data = training_data(count=2, tokens=4)
    with pytest.raises(InputError, match=r"at least 16 completion tokens.*the training data has 6"):
        plan(make_model("qwen2"), settings_of("eva"), data)


def test_disk_full_while_the_adapter_is_saved(options, tmp_path, monkeypatch, capsys):
    def save(self, directory, **kwargs):
        (directory / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", save)
    path = tmp_path / "run"
    assert main([*options, "--method", "lora", "--output_dir", str(path)]) == 1
    assert f"could not be saved to {path / 'adapter'}" in capsys.readouterr().err.splitlines()[-1]
    assert not any("adapter" in entry.name for entry in path.iterdir())
