"""`molf export --what adapter --rank R`: the change of any run as one adapter, and its losses."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from checkpoints import make_model, write_checkpoint
from molf.cli import main
from recorded import logits_of
from tiny_models import byte_level_tokenizer

FULL_RANK = "32"  # the smaller side of every layer of the tiny model


@pytest.fixture
def extract(tmp_path, capsys):
    """Extract into a fresh directory; return it, its record, and what was printed."""

    def call(run, *arguments):
        out = tmp_path / "extracted"
        given = ["export", str(run), "--what", "adapter", "--output_dir", str(out), *arguments]
        capsys.readouterr()
        assert main(given) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines()[-1] == str(out)
        record = (out / "extraction.json").read_text()
        return out, json.loads(record, parse_constant=pytest.fail), printed

    return call


def on(base, adapter):
    """The base with an adapter, loaded by PEFT."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


@pytest.fixture
def fake_run(run_of, tmp_path):
    """A run on another base, changed by hand: `change` edits the tensors of its model."""

    def make(base, change):
        run = tmp_path / "run"
        (run / "model").parent.mkdir()
        shutil.copytree(base, run / "model")
        config = yaml.safe_load((run_of("fft").path / "config.yaml").read_text())
        del config["run"]["model"]["contents"]  # of the other base
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": str(base)}))
        tensors = load_file(run / "model" / "model.safetensors")
        torch.manual_seed(1)
        change(tensors)
        save_file(tensors, run / "model" / "model.safetensors", {"format": "pt"})
        return run

    return make


def change_all(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.02 * torch.randn_like(tensor)


@pytest.mark.parametrize("name", ["fft", "molf", "lora", "hybrid"])
def test_full_rank_is_exact(run_of, base, extract, name):
    """With the rest kept, the base and the adapter are the trained model; also once merged."""
    run = run_of(name)
    out, record, printed = extract(run.path, "--rank", FULL_RANK, "--modules_to_save")
    model = on(base, out)
    torch.testing.assert_close(logits_of(model), run.trained_logits, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), run.trained_logits, rtol=0, atol=1e-5)
    assert all(one["kept"] > 0.99999 for one in record["layers"])
    assert all(one["error"] < 1e-3 for one in record["layers"])
    before, after = (load_file(place / "model.safetensors") for place in (base, run.path / "model"))
    changed = {
        key.removesuffix(".weight")
        for key, tensor in before.items()
        if "_proj.weight" in key and not torch.equal(tensor, after[key])
    }
    assert {one["name"] for one in record["layers"]} == changed
    assert len(changed) == 14 or name == "hybrid"  # some are frozen by the assignment
    assert all(one["kept"] for one in record["rest"])
    assert "leaves out" not in printed.err


def test_tied_embeddings_are_kept_at_both_ends(run_of, base, extract):
    _, record, _ = extract(run_of("fft").path, "--rank", "4", "--modules_to_save")
    assert {"model.embed_tokens", "lm_head"} < set(record["modules_to_save"])
    (embeddings,) = (one for one in record["rest"] if one["kind"] == "embeddings")
    assert embeddings["also"] == ["lm_head.weight"]


def test_errors_are_those_of_the_written_factors(run_of, base, extract):
    """Recomputed from the files alone, layer by layer; the best of this rank (Eckart, Young)."""
    run = run_of("fft")
    out, record, _ = extract(run.path, "--rank", "4")
    factors = load_file(out / "adapter_model.safetensors")
    before = load_file(base / "model.safetensors")
    after = load_file(run.path / "model" / "model.safetensors")
    for one in record["layers"]:
        change = after[f"{one['name']}.weight"] - before[f"{one['name']}.weight"]
        A, B = (
            factors[f"base_model.model.{one['name']}.lora_{part}.weight"] for part in ("A", "B")
        )
        assert A.shape[0] == 4
        values = torch.linalg.svdvals(change)
        squares = values.square()
        missing = (change - B @ A).norm()
        torch.testing.assert_close(missing, squares[4:].sum().sqrt(), rtol=1e-3, atol=1e-6)
        assert one["error"] == pytest.approx((missing / change.norm()).item(), rel=1e-3)
        assert one["kept"] == pytest.approx((squares[:4].sum() / squares.sum()).item(), rel=1e-4)
        share = squares.cumsum(0) / squares.sum()
        assert one["rank_90"] == int((share < 0.9).sum()) + 1


def test_what_it_leaves_out(run_of, extract):
    """Without modules_to_save the changed rest is named with its size, and warned of."""
    out, record, printed = extract(run_of("fft").path, "--rank", "4")
    assert not any(one["kept"] for one in record["rest"])
    assert {one["kind"] for one in record["rest"]} == {"embeddings", "norm", "bias"}
    assert all(one["largest"] > 0 for one in record["rest"])
    assert all(one["relative"] > 0 for one in record["rest"] if one["relative"] is not None)
    # The biases of the base are zero.
    assert {one["kind"] for one in record["rest"] if one["relative"] is None} == {"bias"}
    assert "The adapter leaves out" in printed.err
    assert "--modules_to_save keeps them" in printed.err
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert "0 of 1" in printed.out


def test_a_run_that_changed_no_rest(run_of, base, extract):
    """PEFT's LoRA trains factors alone: rank 4 is exact, and nothing is left out."""
    run = run_of("lora")
    out, record, printed = extract(run.path, "--rank", "4")
    assert record["rest"] == []
    assert "leaves out" not in printed.err
    torch.testing.assert_close(logits_of(on(base, out)), run.trained_logits, rtol=0, atol=1e-5)
    assert all(one["rank_90"] <= 4 for one in record["layers"])


def test_evaluation(run_of, extract):
    """The run's own metrics, then what rank and rest cost."""
    run = run_of("fft")
    _, record, printed = extract(run.path, "--rank", FULL_RANK, "--evaluate")
    metrics = record["metrics"]
    assert list(metrics) == ["model", "adapter, all of the rest", "adapter alone"]
    after = json.loads((run.path / "eval.json").read_text())["after"]
    for name, metric in metrics["model"].items():
        assert metric["value"] == pytest.approx(after[name]["value"], abs=1e-5)
        exact = metrics["adapter, all of the rest"][name]["value"]
        assert exact == pytest.approx(metric["value"], abs=1e-4)
    alone = metrics["adapter alone"]["forgetting_loss"]["value"]
    assert abs(alone - metrics["model"]["forgetting_loss"]["value"]) > 1e-3
    assert "forgetting_loss" in printed.out


def test_evaluation_of_what_is_written(run_of, base, extract):
    run = run_of("fft")
    _, record, _ = extract(run.path, "--rank", FULL_RANK, "--evaluate", "--modules_to_save")
    names = ["model", "adapter, all of the rest", "adapter alone"]
    assert list(record["metrics"]) == names  # as written has all of the rest


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_other_architectures(fake_run, tmp_path, extract, architecture):
    """GPT-2: Conv1D, [in, out], biases everywhere. Llama: a head of its own, a linear layer."""
    base = write_checkpoint(tmp_path / "base", architecture)
    run = fake_run(base, change_all)
    out, record, _ = extract(run, "--rank", FULL_RANK, "--modules_to_save")
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    assert (logits_of(trained) - logits_of(AutoModelForCausalLM.from_pretrained(base))).norm() > 1
    model = on(base, out)
    torch.testing.assert_close(logits_of(model), logits_of(trained), rtol=0, atol=1e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (architecture == "gpt2")
    assert config["bias"] == ("lora_only" if architecture == "gpt2" else "none")
    assert ("lm_head" in {one["name"] for one in record["layers"]}) == (architecture == "llama")


def test_smaller_layers_have_their_own_rank(fake_run, tmp_path, extract):
    """With grouped queries k and v are [16, 32]."""
    base = write_checkpoint(tmp_path / "base", "llama")
    out, record, _ = extract(fake_run(base, change_all), "--rank", "20", "--modules_to_save")
    ranks = {one["name"].rpartition(".")[2]: one["rank"] for one in record["layers"]}
    assert ranks["k_proj"] == 16
    assert ranks["q_proj"] == 20
    loaded = on(base, out)
    layer = loaded.base_model.model.model.layers[0].self_attn.k_proj
    assert layer.r["default"] == 16
    assert layer.scaling["default"] == 1


def test_unchanged_layers_have_no_factors(fake_run, base, extract):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0] += 1

    out, record, _ = extract(fake_run(base, change), "--rank", "1")
    assert [one["name"] for one in record["layers"]] == ["model.layers.1.mlp.up_proj"]
    assert record["layers"][0]["rank_90"] == 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert list(config["target_modules"]) == ["model.layers.1.mlp.up_proj"]


def test_bfloat16(run_of, base, extract, facts, tmp_path):
    run = run_of("fft")
    arguments = ["--rank", FULL_RANK, "--modules_to_save", "--dtype", "bfloat16"]
    out, record, _ = extract(run.path, *arguments, "--evaluate")
    tensors = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    torch.testing.assert_close(logits_of(on(base, out)), run.trained_logits, rtol=0, atol=0.05)
    # The errors and metrics are those of the rounded numbers.
    before, after = (load_file(place / "model.safetensors") for place in (base, run.path / "model"))
    for one in record["layers"]:
        name = f"{one['name']}.weight"
        A, B = (tensors[f"base_model.model.{one['name']}.lora_{x}.weight"].float() for x in "AB")
        error = (after[name] - before[name] - B @ A).norm() / (after[name] - before[name]).norm()
        assert error > 1e-4
        assert one["error"] == pytest.approx(error.item(), rel=1e-3)
    (norm,) = (one for one in record["rest"] if one["name"] == "model.norm.weight")
    new = after["model.norm.weight"]
    error = tensors["base_model.model.model.norm.weight"].float() - new
    error = error.norm() / (new - before["model.norm.weight"]).norm()
    assert norm["error"] == pytest.approx(error.item(), rel=1e-3)
    written = on(base, out).merge_and_unload()
    written.save_pretrained(tmp_path / "written")
    byte_level_tokenizer().save_pretrained(tmp_path / "written")
    given = ["eval", str(tmp_path / "written"), "--task", "fact", "--data", str(facts)]
    assert main([*given, "--output_dir", str(tmp_path / "eval")]) == 0
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())["metrics"]
    as_written = record["metrics"]["adapter as written"]
    for name in ("em", "forgetting_loss"):
        assert as_written[name]["value"] == pytest.approx(found[name]["value"], abs=1e-6)
    exact = record["metrics"]["adapter, all of the rest"]["forgetting_loss"]["value"]
    assert abs(exact - found["forgetting_loss"]["value"]) > 1e-5


def test_bfloat16_rounds_small_changes_away(fake_run, base, extract):
    """The numbers of bfloat16 next to 1 are 2**-8 below and 2**-7 above it."""

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0] += 1
        tensors["model.norm.weight"] += 1e-3

    arguments = ["--rank", "1", "--modules_to_save", "--dtype"]
    run = fake_run(base, change)
    _, record, printed = extract(run, *arguments, "bfloat16")
    assert [one["error"] for one in record["rest"]] == [pytest.approx(1)]
    assert (
        "bfloat16 rounds away most of the change of 1 parameter that the adapter keeps (1 norm)"
        in (printed.err)
    )
    _, record, printed = extract(run, *arguments, "float32", "--overwrite")
    assert [one["error"] for one in record["rest"]] == [0]
    assert "rounds away" not in printed.err


def test_low_halves_are_used(record, facts, workplace, tmp_path, extract):
    """A model that was saved in bfloat16 is compared as it was trained, where halves are kept."""
    base = write_checkpoint(workplace / "base-for-halves", dtype=torch.bfloat16)
    arguments = ["train", "--task", "fact", "--model", str(base), "--data", str(facts)]
    arguments += ["--max_steps", "2", "--warmup_ratio", "0", "--method", "fft"]
    arguments += ["--learning_rate", "1e-3", "--keep_low_halves"]
    run = record(arguments, workplace / "with-halves")
    out, _, _ = extract(run.path, "--rank", FULL_RANK, "--modules_to_save")
    base32 = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base32, out)
    torch.testing.assert_close(logits_of(model), run.trained_logits, rtol=0, atol=1e-5)


def test_low_halves_of_fused_experts_are_used(record, facts, workplace, extract):
    torch.manual_seed(0)
    base = workplace / "mixture-for-halves"
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=512, bos_token_id=None, eos_token_id=0, hidden_size=32, intermediate_size=48,
            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        )
    ).bfloat16().save_pretrained(base)  # fmt: skip
    byte_level_tokenizer().save_pretrained(base)
    arguments = ["train", "--task", "fact", "--model", str(base), "--data", str(facts)]
    arguments += ["--max_steps", "2", "--warmup_ratio", "0", "--method", "fft"]
    arguments += ["--learning_rate", "1e-5", "--keep_low_halves", "--save_rounding", "nearest"]
    run = record(arguments, workplace / "mixture-with-halves")
    _, said, _ = extract(run.path, "--rank", "4")
    largest = {one["name"]: one["largest"] for one in said["rest"]}
    experts = [name for name, start in run.start.items() if start.dim() == 3]
    assert len(experts) == 2
    for name in experts:  # bfloat16 holds hardly any of these changes
        change = (run.end[name] - run.start[name]).abs().max().item()
        assert largest[name] == pytest.approx(change, rel=1e-5)


def test_default_place_and_overwrite(run_of, capsys):
    run = run_of("molf").path
    given = ["export", str(run), "--what", "adapter", "--rank", "2"]
    assert main(given) == 0
    out = run / "adapter-r2-float32"
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert main(given) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*given, "--overwrite"]) == 0
    from molf.job.record.ownership import A_RUN

    assert A_RUN.fault(run) is None  # an export in it is the run's
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "33"], "Invalid rank=33. Must be at most 32: that rank holds every change"),
        (["--rank", "0"], "Invalid rank=0. Must be at least 1."),
        (["--modules_to_save"], "Invalid modules_to_save without rank"),
        (["--evaluate"], "Invalid evaluate without rank"),
        (["--rank", "4", "--output_dir", "{run}/model"], "is the run's own"),
    ],
)
def test_wrong_options(run_of, tmp_path, capsys, arguments, words):
    run = run_of("fft").path
    before = sorted(entry.name for entry in run.iterdir())
    given = [word.replace("{run}", str(run)) for word in arguments]
    capsys.readouterr()
    assert main(["export", str(run), "--what", "adapter", *given]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert main(["export", str(run), "--rank", "4"]) == 2
    assert "Invalid rank=4 with what=model. Give --what adapter." in capsys.readouterr().err
    assert error.count("\n") == 1
    assert sorted(entry.name for entry in run.iterdir()) == before


def test_wrong_runs(run_of, fake_run, base, tmp_path, capsys):
    def refused(run, words):
        capsys.readouterr()
        assert main(["export", str(run), "--what", "adapter", "--rank", "4"]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("molf: ") == 1
        assert error.splitlines()[-1].startswith("molf: error: ")

    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run_of("fft").path / "config.yaml", unfinished)
    refused(unfinished, "has no model/: the run has not ended")
    run = fake_run(base, lambda tensors: None)
    refused(run, "no linear layer that an adapter can hold differs")
    config = yaml.safe_load((run / "config.yaml").read_text())

    def configure(**changes):
        (run / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))

    configure(model=str(tmp_path / "gone"))
    refused(run, f"The base of {run} cannot be read")
    other = make_model("qwen2", intermediate_size=64)
    other.save_pretrained(tmp_path / "other")
    byte_level_tokenizer().save_pretrained(tmp_path / "other")
    configure(model=str(tmp_path / "other"))
    refused(run, "is not that of the run")
    model = {**config["run"]["model"], "quantised": "bitsandbytes, 4 bits"}
    configure(run={**config["run"], "model": model})
    refused(run, "was trained beside a quantised base")
    model = {**config["run"]["model"], "contents": "sha256:0"}
    configure(run={**config["run"], "model": model})
    refused(run, f"The base {base} has changed since {run} was trained from it.")
