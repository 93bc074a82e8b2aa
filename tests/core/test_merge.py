"""From PEFT models back to plain ones: what is computed, what is refused, what is reported."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import molf
from core_helpers import tiny_model
from molf.core.model.quantised import is_quantised
from peft_helpers import IDS, logits, quantised_qwen2, spread, tiny_qwen2


def adapted(model: nn.Module, **config) -> nn.Module:
    """A model with an adapter whose factors are not zero."""
    config = molf.MoLFConfig(**{"ranks": (2, 3), "alpha": 4.0, "freeze_base": True, **config})
    return spread(molf.with_adapter(model, config))


def expected_weights(model) -> dict[str, torch.Tensor]:
    """`W + s B A` of every adapted layer of a PEFT model, in float64."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            W = layer.get_base_layer().weight.double()
            found[name] = (W + layer.scaling["default"] * B.double() @ A.double()).detach()
    return found


def test_plain_models_come_back_untouched():
    model = tiny_qwen2()
    before = copy.deepcopy(model.state_dict())
    assert molf.merge(model) is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    wrapped = nn.DataParallel(tiny_model())
    assert molf.merge(wrapped) is wrapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_formed_in_float32_and_rounded_once(dtype):
    model = adapted(tiny_qwen2().to(dtype))
    expected = expected_weights(model)
    plain = molf.merge(model)
    assert type(plain).__name__ == "Qwen2ForCausalLM"
    assert len(expected) == 7
    for name, exact in expected.items():
        weight = plain.get_submodule(name).weight
        assert weight.dtype == dtype
        best = (exact.to(dtype).double() - exact).abs()
        assert ((weight.double() - exact).abs() <= best + 1e-6 * exact.abs().max()).all(), name
    assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())


def test_report_has_the_logit_difference(capsys):
    reports = []
    model = adapted(tiny_qwen2())
    model.train()
    with torch.no_grad():
        before = copy.deepcopy(model).eval()(input_ids=IDS).logits
    plain = molf.merge(model, sample=IDS, report=reports.append)
    assert plain.training
    (report,) = reports
    after = plain.eval()(input_ids=IDS).logits
    assert report.logit_difference == {"base": (after - before).abs().max().item()}
    assert 0 < report.logit_difference["base"] < 1e-5
    assert report.largest_logit == pytest.approx(before.abs().max().item())
    assert report.weight_error["base"] == 0.0  # float32 weights are what was computed
    assert report.layers == 7
    assert capsys.readouterr().out == ""

    molf.merge(adapted(tiny_qwen2().bfloat16()), sample={"input_ids": IDS})  # printed by default
    printed = capsys.readouterr().out
    assert "Largest logit difference from the unmerged model: 0." in printed
    assert printed.count("\n") == 1


def test_rounding_of_low_precision_weights_is_reported():
    reports = []
    model = adapted(tiny_qwen2().bfloat16())
    expected = expected_weights(model)
    plain = molf.merge(model, sample=IDS, report=reports.append)
    pairs = [(plain.get_submodule(name).weight.double(), exact) for name, exact in expected.items()]
    distance = sum((stored - exact).square().sum() for stored, exact in pairs)
    size = sum(exact.square().sum() for _, exact in pairs)
    error = (distance / size).sqrt().item()
    assert reports[0].weight_error["base"] == pytest.approx(error, rel=1e-3)
    assert 1e-4 < error < 2**-8


def test_ties_stay_ties(tmp_path):
    model = adapted(tiny_qwen2(tied=True))
    plain = molf.merge(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_ties_that_training_has_broken_are_not_tied_again_on_loading(tmp_path):
    config = molf.MoLFConfig(ranks=(2,), freeze_base=True)
    settings = molf.peft_config(config, modules_to_save=["embed_tokens"])
    model = spread(peft.get_peft_model(tiny_qwen2(tied=True), settings))
    copy_ = model.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    with torch.no_grad():
        copy_ += 1.0
        before = model.eval()(input_ids=IDS).logits
    with pytest.warns(UserWarning, match="tie_word_embeddings=False"):
        plain = molf.merge(model)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, before, rtol=0, atol=1e-5)


def test_adapter_on_a_tied_weight_is_refused():
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"])
    model = peft.get_peft_model(tiny_qwen2(tied=True), settings)
    with pytest.raises(
        ValueError, match=r"lm_head shares .* merging its adapter would change both"
    ):
        molf.merge(model)


def test_broken_adapter_is_refused_before_anything_is_changed():
    model = adapted(tiny_qwen2())
    last = model.base_model.model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        last.lora_B["default"].weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"down_proj: its adapter is not finite"):
        molf.merge(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)


def test_weights_that_overflow_are_an_error():
    model = adapted(tiny_qwen2().half())
    with torch.no_grad():
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        layer.lora_B["default"].weight.fill_(1e6)
    with pytest.raises(ValueError, match=r"overflow torch.float16: load the base in float32"):
        molf.merge(model)


def test_layers_without_a_weight_are_left_to_peft():
    settings = peft.LoraConfig(r=2, target_modules=["attention"])
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    model = peft.get_peft_model(attention, settings)
    with pytest.raises(
        ValueError, match=r"attention: its base layer \(MultiheadAttention\) has no"
    ):
        molf.merge(model)


@pytest.mark.parametrize(
    "settings",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=["dora", "embedding", "lora_bias", "tokens", "loha"],
)
def test_other_adapters_of_peft_are_merged_as_well(settings):
    model = spread(peft.get_peft_model(tiny_qwen2(tied=False), settings)).eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    plain = molf.merge(model)
    assert not any(hasattr(module, "base_layer") for module in plain.modules())
    torch.testing.assert_close(plain(input_ids=IDS).logits, before, rtol=0, atol=1e-5)


def test_native_adapters_of_transformers_are_merged():
    model = tiny_qwen2()
    model.add_adapter(molf.peft_config(molf.MoLFConfig(ranks=(2,)), target_modules=["up_proj"]))
    model = spread(model).eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    plain = molf.merge(model)
    assert plain is model
    torch.testing.assert_close(plain(input_ids=IDS).logits, before, rtol=0, atol=1e-5)
    assert set(plain.state_dict()) == set(tiny_qwen2().state_dict())


def test_wrapped_models_are_unwrapped():
    model = adapted(tiny_qwen2())
    expected = expected_weights(model)
    plain = molf.merge(nn.DataParallel(model))
    name = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(plain.get_submodule(name).weight.double(), expected[name])


@pytest.mark.parametrize("kind", ["bnb4", "bnb8", "torchao"])
@pytest.mark.parametrize("used_before", [False, True])
def test_quantised_base_is_merged_into_what_was_chosen(kind, used_before, tmp_path):
    original = tiny_qwen2(tied=True)
    model = adapted(quantised_qwen2(original, kind, tmp_path / "base"))
    reports: list[molf.MergeReport] = []
    with pytest.raises(ValueError, match=r"base is quantised .* base='dequantised'"):
        molf.merge(model)

    factors = {
        name: (layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone())
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    before = logits(model)
    if used_before:  # for inference, in another layout where bitsandbytes has one for this CPU
        for module in model.modules():
            if isinstance(getattr(module, "support_avx512bf16_for_cpu", None), bool):
                module.support_avx512bf16_for_cpu = type(module)(2, 2).support_avx512bf16_for_cpu
        with torch.no_grad():
            model.eval()(input_ids=IDS)
    plain = molf.merge(
        model, base="dequantised", original=original, sample=IDS, report=reports.append
    )
    assert not any(is_quantised(p) for p in plain.parameters())
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.training is not used_before
    after = logits(plain)
    # 8-bit products round activations, and inference on a CPU rounds the scales of 4-bit weights.
    rounded = kind == "bnb8" or (kind == "bnb4" and used_before)
    torch.testing.assert_close(after, before, rtol=0, atol=0.1 if rounded else 1e-5)
    (report,) = reports
    assert report.logit_difference["dequantised"] < (0.1 if rounded else 1e-5)
    assert report.logit_difference["original"] > report.logit_difference["dequantised"]
    assert report.weight_error["dequantised"] < 1e-6 < report.weight_error["original"] < 0.2
    assert "(original base)" in str(report)

    plain.save_pretrained(tmp_path / "merged")  # no trace of quantisation
    again = type(plain).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), after)

    model = adapted(quantised_qwen2(original, kind, tmp_path / "base"))
    plain = molf.merge(model, base="original", original=original, report=reports.append)
    for name, (A, B) in factors.items():
        expected = original.get_submodule(name).weight + B @ A
        torch.testing.assert_close(plain.get_submodule(name).weight, expected)
    assert set(plain.state_dict()) == set(original.state_dict())


@pytest.mark.parametrize("kind", ["bnb4", "bnb8", "torchao"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_that_is_stored_quantised_is_forgotten(kind, dtype, tmp_path):
    """What was loaded packed is saved unpacked, and nothing says that it was quantised."""
    from transformers import AutoModelForCausalLM

    original = tiny_qwen2().to(dtype)
    quantised_qwen2(original, kind, tmp_path / "original").save_pretrained(tmp_path / "stored")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "stored", dtype=torch.float32))
    reports: list[molf.MergeReport] = []
    plain = molf.merge(model, base="dequantised", sample=IDS, report=reports.append)
    assert "quantization_config" not in plain.config.to_dict()
    assert plain.is_quantized is False
    assert not hasattr(plain, "hf_quantizer")
    plain.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(plain.float()))
    # What the numbers stand for is not rounded to the type that they were once quantised from.
    if kind == "torchao":
        assert reports[0].logit_difference["dequantised"] < 1e-5


def test_only_linear_layers_lose_their_quantisation(tmp_path):
    model = adapted(quantised_qwen2(tiny_qwen2(), "bnb4", tmp_path))
    norm = model.base_model.model.model.norm
    norm.weight = nn.Parameter(torch.ones(64, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"model.norm.weight is quantised \(torch.float8_e4m3fn"):
        molf.merge(model, base="dequantised")


def test_numbers_of_unknown_kinds_are_not_taken_for_real_ones():
    from molf.core.model.quantised import dequantised

    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"Cannot dequantise torch.float8_e4m3fn weights"):
        dequantised(layer)


@pytest.mark.parametrize("base", ["dequantised", "original"])
def test_biases_have_the_dtype_of_their_weights(base, tmp_path):
    """bitsandbytes brings them to the dtype that it computes in."""
    original = tiny_qwen2()
    model = adapted(quantised_qwen2(original, "bnb4", tmp_path))
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16
    logits(model)
    assert any(p.dtype == torch.bfloat16 for p in model.parameters())
    plain = molf.merge(model, base=base, original=original if base == "original" else None)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert logits(plain).isfinite().all()


def test_transposed_layers_are_transposed_again(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 32, "n_embd": 64, "n_layer": 1, "n_head": 2}
    original = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout))
    for base in ("dequantised", "original"):
        model = adapted(quantised_qwen2(original, "bnb4", tmp_path / "base"))
        before = logits(model)
        plain = molf.merge(model, base=base, original=original, report=lambda _: None)
        shapes = {name: value.shape for name, value in plain.state_dict().items()}
        assert shapes == {name: value.shape for name, value in original.state_dict().items()}
        if base == "dequantised":
            torch.testing.assert_close(logits(plain), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "float"}, "Invalid base='float'. Must be one of dequantised, original"),
        ({"base": "original"}, "base='original' needs original="),
        ({"base": "original", "original": nn.Linear(2, 2)}, "Invalid original: it has no layer"),
    ],
)
def test_wrong_choices_are_one_line(options, message, tmp_path):
    model = adapted(quantised_qwen2(tiny_qwen2(), "bnb4", tmp_path / "base"))
    before = sum(is_quantised(p) for p in model.parameters())
    with pytest.raises(ValueError, match=message) as raised:
        molf.merge(model, **options)
    assert "\n" not in str(raised.value)
    assert sum(is_quantised(p) for p in model.parameters()) == before == 7


def test_choice_without_a_quantised_base_is_refused():
    for options in ({"base": "dequantised"}, {"original": tiny_qwen2()}):
        with pytest.raises(ValueError, match="the base is not quantised"):
            molf.merge(adapted(tiny_qwen2()), **options)


def test_only_layers_with_the_active_adapter_count():
    reports: list[molf.MergeReport] = []
    model = adapted(tiny_qwen2())
    model.add_adapter("small", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("small")
    spread(model)
    before = logits(model)
    plain = molf.merge(model, sample=IDS, report=reports.append)
    assert reports[0].layers == 1
    torch.testing.assert_close(logits(plain), before)


def test_missing_library_names_the_extra(monkeypatch):
    from molf import inputs

    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    for library in ("bitsandbytes", "torchao"):
        with pytest.raises(
            ValueError, match=rf"^A 4-bit base needs {library}, .*molf\[{library}\]"
        ):
            inputs.check_installed(library, "A 4-bit base")
