"""Training beside a 4-bit or 8-bit base, on the CPU."""

import json

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from molf.core.model.quantised import Quantisation
from molf.errors import InputError
from molf.job.model import quantised as quantised_base
from recorded import logits_of
from slow_cases import slow_after

pytest.importorskip("bitsandbytes", reason="4-bit and 8-bit bases need the extra bitsandbytes")


@pytest.fixture(scope="module")
def trained(record, options, workplace):
    """A run of each method, by the base that it is merged into."""
    runs = {}

    def run(method="molf-e", base="dequantised", *further):
        key = (method, base, *further)
        if key not in runs:
            arguments = [*options, "--method", method, "--merge_base", base, "--warmup_ratio", "0"]
            if method == "molf-e":
                arguments[arguments.index("--ranks") + 1] = "2,4"
            how = further or ("--load_in_4bit",)
            path = workplace / "-".join(key).replace("--", "").replace(" ", "")
            runs[key] = record([*arguments, *how], path)
        return runs[key]

    return run


def merge_record(run):
    return yaml.safe_load((run.path / "config.yaml").read_text())["run"]["merge"]


@pytest.mark.parametrize("method", slow_after(2, ["molf-e", "eva", "lora", "lora+"]))
def test_trains_the_adapter_alone(trained, method):
    run = trained(method)
    moved = {name for name, start in run.start.items() if not torch.equal(start, run.end[name])}
    assert moved
    assert all(".lora_A." in name or ".lora_B." in name for name in moved)
    # TRL would have rounded the factors.
    assert {run.end[name].dtype for name in moved} == {torch.float32}
    packed = [name for name, p in run.end.items() if p.dtype == torch.uint8]
    assert len(packed) == 14
    losses = [json.loads(x)["loss"] for x in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert (run.start_logits - run.base_logits).abs().max() < 1e-5


def test_saved_model_is_what_was_trained(trained):
    run = trained()
    record = merge_record(run)
    assert record["base"] == "dequantised"
    assert record["logit_difference"]["dequantised"] < 1e-5
    saved = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert not hasattr(saved.config, "quantization_config")
    torch.testing.assert_close(logits_of(saved), run.adapter_logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits_of(saved), run.trained_logits)


def test_merged_into_the_original(trained, base):
    """Both errors are on record; the model is the base with the saved adapter."""
    run = trained("molf-e", "original")
    record = merge_record(run)
    assert record["base"] == "original"
    assert record["logit_difference"]["dequantised"] < 1e-5 < record["logit_difference"]["original"]
    assert record["weight_error"]["dequantised"] < 1e-6 < 0.01 < record["weight_error"]["original"]
    saved = AutoModelForCausalLM.from_pretrained(run.path / "model")
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, run.path / "adapter")
    torch.testing.assert_close(logits_of(saved), logits_of(model), rtol=1e-4, atol=1e-5)
    card = (run.path / "adapter" / "README.md").read_text()
    assert "beside the base in 4 bits" in card


def test_eight_bits(trained, base):
    run = trained("molf-e", "original", "--load_in_8bit")
    errors = merge_record(run)["weight_error"]
    assert errors["dequantised"] < 1e-6
    four = merge_record(trained("molf-e", "original"))["weight_error"]
    assert errors["original"] < four["original"] / 3
    assert any(p.dtype == torch.int8 for p in run.end.values())


def test_autocast_does_not_round_the_base(trained, record, facts, workplace):
    """bitsandbytes rounds biases to the type that it computes in."""
    base = write_checkpoint(workplace / "base-with-biases")
    model = AutoModelForCausalLM.from_pretrained(base)
    biases = {name: p for name, p in model.named_parameters() if name.endswith(".bias")}
    assert biases
    with torch.no_grad():
        for bias in biases.values():
            bias += 1 / 3
    model.save_pretrained(base)
    arguments = ["train", "--task", "fact", "--model", str(base), "--data", str(facts)]
    arguments += ["--method", "molf-e", "--ranks", "2,4", "--max_steps", "2", "--load_in_4bit"]
    run = record([*arguments, "--bf16", "--gradient_checkpointing"], workplace / "4bit-bf16")
    saved = load_file(run.path / "model" / "model.safetensors")
    for name, bias in biases.items():
        assert torch.equal(saved[name], bias)
    assert merge_record(run)["logit_difference"]["dequantised"] < 1e-5


def test_gradient_checkpointing_changes_nothing(record, trained, workplace):
    run = trained()
    arguments = [*run.arguments, "--gradient_checkpointing"]
    again = record(arguments, workplace / "4bit-checkpointing")
    torch.testing.assert_close(again.trained_logits, run.trained_logits, rtol=1e-4, atol=1e-5)


def test_device_that_cannot(monkeypatch):
    import bitsandbytes

    def fail(self, x):
        raise RuntimeError("no kernel image is available\nfor execution")

    four_bits = Quantisation("bitsandbytes", "4-bit")
    quantised_base.check_device(four_bits, torch.device("cpu"))
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", fail)
    with pytest.raises(InputError, match=r"4-bit layers do not work on cpu.*: no kernel image"):
        quantised_base.check_device(four_bits, torch.device("cpu"))
