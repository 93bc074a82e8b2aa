"""Models come out as whole as they came in, and what no text reaches is left as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import multimodal
from molf.cli import main
from multimodal import write_multimodal
from slow_cases import slow_after

WEIGHTS = "model.safetensors"


def stored(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def with_model(options, model, *further, **replaced):
    arguments = [*options, *further]
    for name, value in {"model": model, **replaced}.items():
        arguments[arguments.index(f"--{name}") + 1] = str(value)
    return arguments


@pytest.fixture(scope="module", params=["gemma3", "qwen3_5", "qwen2_5_vl", "llava"])
def multimodal_base(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("multimodal") / request.param
    return path, write_multimodal(path, getattr(multimodal, request.param)())


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma") / "gemma3"
    write_multimodal(path, multimodal.gemma3())
    return path


def is_text(name):
    return "vision" not in name and "visual" not in name and "multi_modal_projector" not in name


def test_a_multimodal_model_comes_out_whole(multimodal_base, options, tmp_path, capsys):
    path, kind = multimodal_base
    run = tmp_path / "run"
    assert main([*with_model(options, path), "--output_dir", str(run)]) == 0
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("Left out of the training: ") == 1
    before, after = stored(path), stored(run / "model")
    assert set(after) == set(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(map(is_text, moved))
    for key in ("model_type", "architectures", "vision_config"):
        assert config_of(run / "model")[key] == config_of(path)[key]
    _, found = kind.from_pretrained(run / "model", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    record = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert record[0]["loss"] > record[-1]["loss"]


@pytest.mark.parametrize("method", slow_after(2, ["molf-dropout", "fft", "lora", "molf-e", "eva"]))
def test_every_method_leaves_out_what_no_text_reaches(gemma, options, tmp_path, method):
    import yaml

    further = {"molf-dropout": ["--method", "molf", "--lora_dropout", "0.1"]}
    given = further.get(method, ["--method", method])
    if method == "eva":
        given += ["--target_modules", r".*mlp\.(up|gate)_proj|.*vision.*fc1"]
    run = tmp_path / "run"
    ranks = {"eva": "2", "molf-e": "2,4"}.get(method, "4")
    arguments = with_model(options, gemma, *given, ranks=ranks)
    assert main([*arguments, "--output_dir", str(run)]) == 0
    before, after = stored(gemma), stored(run / "model")
    assert set(after) == set(before)
    assert all(torch.equal(before[name], after[name]) for name in before if not is_text(name))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    record = yaml.safe_load((run / "config.yaml").read_text())
    text = sum(tensor.numel() for name, tensor in before.items() if is_text(name))
    if method == "fft":
        assert record["run"]["model"]["trained_parameters"] == text
    elif method != "eva":
        assert record["run"]["model"]["adapted_layers"] == 14
    assert record["run"]["model"]["not_reached"] == [
        "model.vision_tower",
        "model.multi_modal_projector",
    ]
    assert "unreached" not in record
    if (run / "adapter").is_dir():
        assert all(map(is_text, load_file(run / "adapter" / "adapter_model.safetensors")))


def test_layers_that_no_text_reaches_cannot_be_chosen(gemma, options, tmp_path, capsys):
    arguments = with_model(options, gemma, "--target_modules", ".*vision_tower.*")
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 2
    assert "No text reaches the 6 layers that the settings choose" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluation_and_export_see_the_same_model(gemma, options, facts, tmp_path):
    run = tmp_path / "run"
    arguments = with_model(options, gemma, "--method", "lora", "--save_dtype", "bfloat16")
    assert main([*arguments, "--output_dir", str(run)]) == 0
    assert main(["export", str(run), "--dtype", "float32"]) == 0
    exported = stored(run / "model-float32")
    assert set(exported) == set(stored(gemma))
    assert all(
        torch.equal(value, exported[name])
        for name, value in stored(gemma).items()
        if not is_text(name)
    )
    assert main(["eval", str(gemma), "--task", "fact", "--data", str(facts)]) == 0


def test_a_plan_counts_the_whole_model(gemma):
    from molf.job.model.config import read_config
    from molf.planning.memory import Planner
    from molf.planning.workload import Workload

    before = stored(gemma)
    planner = Planner(read_config(str(gemma)))
    shape = planner.shape(Workload(method="fft", config=None, batch_size=1, length=8))
    assert shape.parameters == sum(tensor.numel() for tensor in before.values())
    assert shape.trained == sum(x.numel() for name, x in before.items() if is_text(name))


@pytest.mark.parametrize("shards", [False, True])
def test_heads_that_predict_further_tokens_are_carried(options, tmp_path, capsys, shards):
    from transformers import Qwen3_5ForConditionalGeneration

    path, run = tmp_path / "base", tmp_path / "run"
    write_multimodal(path, multimodal.qwen3_5())
    added = {"mtp.fc.weight": torch.randn(4, 8, dtype=torch.bfloat16), "mtp.norm": torch.ones(3)}
    tensors = load_file(path / WEIGHTS) | added
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    arguments = with_model(options, path, "--method", "lora", max_steps=1)
    if shards:
        save = Qwen3_5ForConditionalGeneration.save_pretrained
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Qwen3_5ForConditionalGeneration,
                "save_pretrained",
                lambda self, path, **given: save(self, path, max_shard_size="200KB", **given),
            )
            assert main([*arguments, "--output_dir", str(run)]) == 0
        index = json.loads((run / "model" / f"{WEIGHTS}.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    else:
        assert main([*arguments, "--output_dir", str(run)]) == 0
        assert [file.name for file in (run / "model").glob("*.safetensors")] == [WEIGHTS]
    printed = capsys.readouterr()
    assert "unchanged: 2 stored tensors" in printed.out + printed.err
    after = stored(run / "model")
    assert set(after) == set(tensors)
    for name, tensor in added.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert main(["export", str(run), "--dtype", "bfloat16"]) == 0
    assert torch.equal(stored(run / "model-bfloat16")["mtp.norm"], torch.ones(3))


def test_a_head_that_the_trainer_leaves_out_is_refused(options, facts, tmp_path, capsys):
    """TRL multiplies hidden states by the embeddings; this head has a layer and a norm as well."""
    from transformers import BertConfig, BertLMHeadModel

    from tiny_models import byte_level_tokenizer

    torch.manual_seed(0)
    config = BertConfig(
        is_decoder=True,
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    arguments = with_model(options, tmp_path / "base")
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "TRL's trainer skips operations of BertLMHeadModel" in error
    assert "cls.predictions.transform" in error
    assert not (tmp_path / "run").exists()
    assert main(["eval", str(tmp_path / "base"), "--task", "fact", "--data", str(facts)]) == 0


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["Qwen3_5ForConditionalGeneration"], "AutoModelForMultimodalLM"),
        (["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),
        (["SomethingElse"], "AutoModelForMultimodalLM"),
        (None, "AutoModelForMultimodalLM"),
    ],
)
def test_the_class_is_the_one_that_the_checkpoint_names(architectures, expected):
    from molf.planning.model_class import auto_class

    config = multimodal.qwen3_5()
    config.architectures = architectures
    assert auto_class(config).__name__ == expected


def test_answers_of_models_with_positions_in_several_dimensions(tmp_path):
    """They keep a number for each row beside the cache; rows that end early must not shift it."""
    from molf.job.model.loading import load_model
    from molf.measure.generate import generate_greedy

    write_multimodal(tmp_path, multimodal.qwen2_5_vl())
    base = load_model(str(tmp_path))
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.normal_(std=0.3)
    rows = [[7, 8, 9], [10] * 9, [11, 12] * 6, [13]]
    most = [2, 9, 3, 12]

    def answers(which):
        return generate_greedy(
            base.model,
            base.tokenizer,
            [rows[i] for i in which],
            batch_size=4,
            max_new_tokens=12,
            stop=lambda i, text: len(text) >= most[which[i]],
        )

    assert answers([0, 1, 2, 3]) == [answers([i])[0] for i in range(4)]
