"""Checkpoints of which something is missing, left over or broken: one line, and nothing runs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from checkpoints import make_model, write_checkpoint
from molf.cli import main
from molf.errors import InputError
from molf.job.model.loading import load_model
from tiny_models import byte_level_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def rewritten(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


def configured(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def sharded(path):
    make_model("llama").save_pretrained(path, max_shard_size="40KB")
    (path / WEIGHTS).unlink()
    return sorted(file.name for file in path.glob("model-*.safetensors"))


def more_layers(path):
    configured(path, num_hidden_layers=4, layer_types=None)


def fewer_layers(path):
    configured(path, num_hidden_layers=1, layer_types=None)


def without_a_weight(path):
    rewritten(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def without_its_head(path):
    rewritten(path, lambda tensors: tensors.pop("lm_head.weight"))


def with_a_value_head(path):
    rewritten(path, lambda tensors: tensors.update({"v_head.weight": torch.ones(1, 32)}))


def wrong_shape(path):
    name = "model.layers.0.mlp.up_proj.weight"
    rewritten(path, lambda tensors: tensors.update({name: torch.ones(47, 32)}))


def cut_short(path):
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def empty_weights(path):
    (path / WEIGHTS).write_bytes(b"")


def pickled(path):
    torch.save(load_file(path / WEIGHTS), path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


def without_weights(path):
    (path / WEIGHTS).unlink()


def missing_shard(path):
    (path / sharded(path)[1]).unlink()


def cut_shard(path):
    shard = path / sharded(path)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def broken_index(path):
    sharded(path)
    (path / INDEX).write_text('{"weight_map": ')


def index_without_a_map(path):
    sharded(path)
    (path / INDEX).write_text('{"metadata": {}}')


def without_tokenizer(path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()


def tokenizer_without_tokens(path):
    (path / "tokenizer.json").unlink()
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), eos_token="<|end|>"
    ).save_pretrained(path)


def broken_tokenizer(path):
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text[: len(text) // 2])


def broken_tokenizer_config(path):
    (path / "tokenizer_config.json").write_text('{"eos_token": ')


def broken_config(path):
    (path / "config.json").write_text('{"model_type": ')


def config_of_an_encoder_decoder(path):
    (path / "config.json").write_text('{"model_type": "t5"}')


def config_that_fits_nothing(path):
    configured(path, num_key_value_heads="two")


def broken_generation_config(path):
    (path / "generation_config.json").write_text('{"do_sample": ')


def list_as_generation_config(path):
    (path / "generation_config.json").write_text("[1]")


def end_token_that_is_no_id(path):
    (path / "generation_config.json").write_text('{"eos_token_id": [0, "<|end|>"]}')


def only_said_to_be_4bit(path):
    pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
    configured(path, quantization_config={"load_in_4bit": True})


def only_said_to_be_8bit(path):
    pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes")
    quantisation = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    configured(path, quantization_config=quantisation)


CASES = {
    more_layers: "lack weights of LlamaForCausalLM, as config.json describes it, which would be "
    "random: model.layers.2.input_layernorm.weight, ",
    fewer_layers: "have tensors without a place in LlamaForCausalLM, as config.json describes it, "
    "which would be lost: model.layers.1.input_layernorm.weight, ",
    without_a_weight: "which would be random: model.layers.1.mlp.up_proj.weight. ",
    without_its_head: "would be random: lm_head.weight. ",
    with_a_value_head: "would be lost: v_head.weight. ",
    wrong_shape: "model.layers.0.mlp.up_proj.weight is [47, 32] in its files and [48, 32] by",
    cut_short: "model.safetensors cannot be read",
    empty_weights: "model.safetensors cannot be read",
    pickled: "has no model.safetensors, and pytorch_model.bin is not read",
    without_weights: "has no model.safetensors",
    missing_shard: "names 1 of ",
    cut_shard: "model-00002-of-",
    broken_index: "model.safetensors.index.json is no index",
    index_without_a_map: "model.safetensors.index.json is no index",
    without_tokenizer: "has no tokenizer.json",
    tokenizer_without_tokens: "gives no tokens for text",
    broken_tokenizer: "tokenizer.json is broken",
    broken_tokenizer_config: "tokenizer_config.json is broken",
    broken_config: "config.json",
    config_of_an_encoder_decoder: "model_type=t5",
    config_that_fits_nothing: "num_key_value_heads",
    broken_generation_config: "generation_config.json is broken: Expecting value",
    list_as_generation_config: "generation_config.json is broken: it is a list",
    end_token_that_is_no_id: "eos_token_id is [0, '<|end|>'] in its generation configuration",
    only_said_to_be_4bit: "declares quantised weights (bitsandbytes 4-bit), but its files",
    only_said_to_be_8bit: "declares quantised weights (bitsandbytes 8-bit), but its files",
}


@pytest.fixture(scope="module")
def llama(workplace):
    return write_checkpoint(workplace / "whole-llama", "llama")


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
def test_the_line_says_what_and_where(llama, tmp_path, damage):
    path = tmp_path / "base"
    shutil.copytree(llama, path)
    damage(path)
    with pytest.raises(InputError) as raised:
        load_model(str(path))
    text = str(raised.value)
    assert CASES[damage] in text
    assert str(path) in text
    assert "\n" not in text


@pytest.mark.parametrize("damage", [more_layers, without_tokenizer], ids=lambda x: x.__name__)
def test_nothing_is_written(llama, options, facts, tmp_path, capsys, damage):
    path = tmp_path / "base"
    shutil.copytree(llama, path)
    damage(path)
    arguments = [*options]
    arguments[arguments.index("--model") + 1] = str(path)
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 2
    assert "LOAD REPORT" not in capsys.readouterr().err
    measuring = ["eval", str(path), "--task", "fact", "--data", str(facts)]
    assert main([*measuring, "--output_dir", str(tmp_path / "eval")]) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_whole_checkpoints_load_in_silence(llama, tmp_path, recwarn):
    """Tied, sharded, and saved without the head's prefix, as base models are."""
    load_model(str(llama))
    (path := tmp_path / "sharded").mkdir()
    sharded_model = make_model("llama")
    sharded_model.save_pretrained(path, max_shard_size="40KB")
    byte_level_tokenizer().save_pretrained(path)
    load_model(str(path))
    tied = make_model("qwen2")
    tied.model.save_pretrained(tmp_path / "body")
    byte_level_tokenizer().save_pretrained(tmp_path / "body")
    loaded = load_model(str(tmp_path / "body")).model
    assert torch.equal(loaded.lm_head.weight, tied.lm_head.weight)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_model_without_a_declared_type_is_loaded_once(llama, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    path = tmp_path / "base"
    shutil.copytree(llama, path)
    rewritten(path, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    config = json.loads((path / "config.json").read_text())
    del config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    made = []
    init = LlamaForCausalLM.__init__
    monkeypatch.setattr(
        LlamaForCausalLM, "__init__", lambda self, *args: (made.append(1), init(self, *args))[1]
    )
    assert load_model(str(path)).dtype == torch.float16
    assert len(made) == 1


def test_a_missing_buffer_is_a_warning(llama, tmp_path):
    from molf.job.model.whole import check_whole

    base = load_model(str(llama))
    base.model.register_buffer("scale", torch.ones(1))
    found = {"missing_keys": {"scale"}, "mismatched_keys": set()}
    with pytest.warns(UserWarning, match="lack buffers of LlamaForCausalLM"):
        check_whole("x", base.model, {}, found)


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = Qwen3MoeConfig(
        **sizes, vocab_size=512, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        intermediate_size=48, num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x.pop("model.layers.0.mlp.experts.1.up_proj.weight"), "gate_up_proj"),
        (
            lambda x: x.update({"model.layers.0.mlp.experts.1.up_proj.weight": torch.ones(3, 32)}),
            "stored for model.layers.0.mlp.experts.gate_up_proj differ",
        ),
    ],
)
def test_experts_that_are_stored_one_by_one(tmp_path, change, text):
    """Their tensors are joined when they are loaded, and no stored name is one of the model."""
    qwen3_moe().save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    load_model(str(tmp_path))
    rewritten(tmp_path, change)
    with pytest.raises(InputError, match=text):
        load_model(str(tmp_path))
