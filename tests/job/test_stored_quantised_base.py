"""Bases that are stored quantised: trained beside where that works here, else refused in time."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import molf.inputs
from checkpoints import write_checkpoint
from molf.cli import main
from molf.core.model.quantised import quantisation_of
from recorded import logits_of
from slow_cases import slow_after

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BITSANDBYTES = {
    # As most are published: float16 products, in which training overflows.
    "double": (
        torch.bfloat16,
        {**_NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float16},
    ),
    "storage": (torch.bfloat16, {**_NF4, "bnb_4bit_quant_storage": torch.bfloat16}),
    "fp4": (torch.float32, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "int8": (
        torch.bfloat16,
        {"load_in_8bit": True, "llm_int8_skip_modules": ["q_proj", "lm_head"]},
    ),
}


@pytest.fixture(scope="module")
def stored(workplace):
    """A base that is stored quantised in a way; each is made once."""
    made = {}

    def make(kind):
        if kind in made:
            return made[kind]
        if kind == "torchao":
            pytest.importorskip("torchao", reason="needs the extra torchao")
            from torchao.quantization import Int8WeightOnlyConfig
            from transformers import TorchAoConfig

            dtype, quantisation = torch.bfloat16, TorchAoConfig(Int8WeightOnlyConfig())
        else:
            pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
            dtype, options = BITSANDBYTES[kind]
            quantisation = BitsAndBytesConfig(**options)
        plain = write_checkpoint(workplace / f"{kind}-plain", dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantisation)
        made[kind] = workplace / f"{kind}-stored"
        model.save_pretrained(made[kind])
        AutoTokenizer.from_pretrained(plain).save_pretrained(made[kind])
        return made[kind]

    return make


def options_with(options, model, *more):
    arguments = [*options, *more]
    arguments[arguments.index("--model") + 1] = str(model)
    return arguments


@pytest.mark.parametrize(
    ("kind", "method"),
    slow_after(
        2,
        [
            *((kind, "molf-e") for kind in (*BITSANDBYTES, "torchao")),
            *(("double", method) for method in ("lora", "lora+", "eva")),
        ],
    ),
)
def test_a_run_beside_it_is_whole(stored, options, record, workplace, kind, method):
    base = stored(kind)
    arguments = options_with(options, base, "--method", method, "--warmup_ratio", "0")
    if method == "molf-e":
        arguments[arguments.index("--ranks") + 1] = "2,4"
    if method == "lora+":
        arguments += ["--loraplus_lr_ratio", "2"]
    run = record(arguments, workplace / f"stored-{kind}-{method}")
    losses = [json.loads(x)["loss"] for x in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]

    # What is not quantised is trained beside in float32, however it is stored.
    real = {p.dtype for n, p in run.end.items() if p.numel() < 1000 or "embed" in n}
    assert torch.float32 in real
    assert torch.float16 not in real
    record_of = yaml.safe_load((run.path / "config.yaml").read_text())
    assert record_of["merge_base"] == "dequantised"
    named = {"int8": "bitsandbytes 8-bit", "torchao": "torchao int8"}
    assert record_of["run"]["model"]["quantised"] == named.get(kind, "bitsandbytes 4-bit")
    merge = record_of["run"]["merge"]
    assert merge["weight_error"]["dequantised"] < 1e-6
    if kind != "int8":  # whose products round activations
        assert merge["logit_difference"]["dequantised"] < 1e-5

    saved = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert quantisation_of(saved.config) is None
    assert saved.dtype == BITSANDBYTES.get(kind, (torch.bfloat16,))[0]
    difference = (logits_of(saved) - run.adapter_logits).abs().max()
    assert difference < (0.05 if saved.dtype == torch.bfloat16 else 1e-4)
    evaluation = json.loads((run.path / "eval.json").read_text())
    assert set(evaluation["after"]) == {*evaluation["before"], "kl_neutral", "kl_task"}
    bits = "8 bits" if kind in ("int8", "torchao") else "4 bits"
    assert f"beside the base in {bits}" in (run.path / "adapter" / "README.md").read_text()


def test_base_measures_as_when_its_products_are_float32(stored, options, facts, capsys, tmp_path):
    """`molf eval` and the run's "before" agree, and neither computes in float16."""
    base = stored("double")
    out = tmp_path / "run"
    assert main([*options_with(options, base, "--method", "lora"), "--output_dir", str(out)]) == 0
    before = json.loads((out / "eval.json").read_text())["before"]
    given = ["eval", str(base), "--task", "fact", "--data", str(facts)]
    assert main([*given, "--output_dir", str(tmp_path / "eval")]) == 0
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())["metrics"]
    assert found["forgetting_loss"]["value"] == pytest.approx(before["forgetting_loss"]["value"])
    capsys.readouterr()


@pytest.mark.slow
def test_bfloat16_checkpointing_and_rehearsal(stored, options, tmp_path, capsys):
    # lora+ is not planned, which takes seconds.
    how = ["--method", "lora+", "--bf16", "--gradient_checkpointing"]
    arguments = options_with(options, stored("double"), *how)
    assert main([*arguments, "--output_dir", str(tmp_path / "run"), "--save_steps", "2"]) == 0
    merge = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run"]["merge"]
    assert merge["logit_difference"]["dequantised"] < 1e-5
    capsys.readouterr()
    assert main([*arguments, "--dry_run"]) == 0
    assert "measured" in capsys.readouterr().out


@pytest.mark.parametrize("by_option", slow_after(1, [True, False]))
def test_export_of_what_was_trained(stored, options, tmp_path, capsys, by_option):
    """The base is there: wider numbers than those of model/ are had from it and the adapter."""
    pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
    arguments = [*options, "--load_in_4bit"] if by_option else options_with(options, stored("fp4"))
    run = tmp_path / "run"
    how = ["--method", "lora", "--warmup_ratio", "0", "--save_dtype", "bfloat16"]
    assert main([*arguments, *how, "--output_dir", str(run)]) == 0
    assert main(["export", str(run), "--dtype", "float32"]) == 0
    error = capsys.readouterr().err
    assert "nothing more exact" not in error
    wide = load_file(run / "model-float32" / "model.safetensors")
    narrow = load_file(run / "model" / "model.safetensors")
    assert wide.keys() == narrow.keys()
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in narrow)
    moved = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(wide[moved], narrow[moved].float())
    config = json.loads((run / "model-float32" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.fixture
def described(base, tmp_path):
    """A base with a quantisation in its configuration and no weights: nothing may load them."""

    def make(quantisation, path="described"):
        folder = tmp_path / path
        shutil.copytree(base, folder, dirs_exist_ok=True)
        (folder / "model.safetensors").unlink()
        config = json.loads((folder / "config.json").read_text())
        config |= quantisation
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


_FOUR = {"quantization_config": {"quant_method": "bitsandbytes", **_NF4}}
_EIGHT = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}


def refused(options, model, *more, capsys, tmp_path):
    arguments = options_with(options, model, *more)
    for dry in ([], ["--dry_run"]):
        assert main([*arguments, *dry, "--output_dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("quantisation", "more", "words"),
    [
        (_FOUR, "--method fft", ["4-bit", "method=fft", "trains the base weights", "molf-e"]),
        (_FOUR, "--method molf", ["4-bit", "method=molf", "full expert", "lora+"]),
        (_FOUR, "--method molf --lora_dropout 0.1", ["4-bit", "method=molf", "full expert"]),
        (_EIGHT, "--method dora", ["8-bit", "method=dora", "cannot be merged"]),
        (_EIGHT, "--method pissa", ["8-bit", "method=pissa", "must be real numbers"]),
        (_EIGHT, "--method adalora", ["8-bit", "method=adalora", "cannot be merged"]),
        (_FOUR, "--method lora --load_in_8bit", ["Invalid load_in_8bit", "4-bit"]),
        (_EIGHT, "--method lora --load_in_4bit", ["Invalid load_in_4bit", "8-bit"]),
        (_FOUR, "--method lora --dtype bfloat16", ["Invalid dtype=bfloat16", "4-bit"]),
        (_FOUR, "--method molf-e --no-freeze_rest", ["Invalid freeze_rest=False", "4-bit"]),
        (
            _FOUR,
            "--method lora --merge_base original",
            ["merge_base=original", "no original weights"],
        ),
    ],
)
def test_refused_before_weights_are_read(
    described, options, capsys, tmp_path, quantisation, more, words
):
    pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
    model = described(quantisation)
    error = refused(options, model, *more.split(), capsys=capsys, tmp_path=tmp_path)
    assert all(word in error for word in [*words, "the unquantised model"])


@pytest.mark.parametrize(
    ("quantisation", "name"),
    [
        *(
            ({"quantization_config": {"quant_method": name, "bits": 4}}, name)
            for name in ("gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "hqq", "quanto")
        ),
        ({"quantization_config": {"quant_method": "torchao", "quant_type": "int4wo"}}, "int4wo"),
        ({"quantization_config": {"bits": 4}}, "an unnamed method"),
        ({"quantization_config": {"quant_method": "of-tomorrow"}}, "of-tomorrow"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_others_are_refused_by_name(described, options, capsys, tmp_path, quantisation, name):
    model = described(quantisation)
    for method in ("molf-e", "lora"):
        error = refused(options, model, "--method", method, capsys=capsys, tmp_path=tmp_path)
        assert f"stored quantised: {name}" in error.replace("torchao ", "")
        assert "Give the unquantised model, or one quantised by bitsandbytes" in error
    assert main(["plan", "--model", str(model), "--method", "lora"]) == 2
    assert name in capsys.readouterr().err


def test_quantisation_in_the_text_part_counts(described):
    from transformers import AutoConfig, Gemma3Config

    config = Gemma3Config(text_config={}, vision_config={})
    assert quantisation_of(config) is None
    config.text_config.quantization_config = {"quant_method": "awq"}
    assert str(quantisation_of(config)) == "awq"
    loaded = AutoConfig.from_pretrained(described(_FOUR))
    assert str(quantisation_of(loaded)) == "bitsandbytes 4-bit"


def test_library_that_is_not_installed(described, options, monkeypatch, capsys, tmp_path, facts):
    monkeypatch.setattr(molf.inputs, "find_spec", lambda name: None)
    ao = {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
    kinds = {
        "bitsandbytes": _FOUR,
        "torchao": {"quantization_config": {"quant_method": "torchao", **ao}},
    }
    for library, quantisation in kinds.items():
        model = described(quantisation, library)
        error = refused(options, model, "--method", "lora", capsys=capsys, tmp_path=tmp_path)
        assert f"needs {library}, which is not installed: pip install 'molf[{library}]'" in error
        assert main(["eval", str(model), "--task", "fact", "--data", str(facts)]) == 2
        assert f"pip install 'molf[{library}]'" in capsys.readouterr().err


def test_options_that_say_what_is_stored(stored, options, tmp_path, capsys):
    arguments = options_with(options, stored("double"), "--method", "lora+", "--load_in_4bit")
    assert main([*arguments, "--dry_run", "--merge_base", "dequantised"]) == 0
    error = capsys.readouterr().err
    assert "Without effect: load_in_4bit" in error
    assert "is stored in 4 bits already" in error


def test_choice_of_a_merge_for_a_base_that_is_not_quantised(options, capsys):
    assert main([*options, "--method", "lora+", "--merge_base", "original", "--dry_run"]) == 0
    assert "Without effect: merge_base=original" in capsys.readouterr().err
