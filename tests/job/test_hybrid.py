"""Runs of method hybrid: reductions to fft and lora, files, sources of assignments, wrong input."""

import json
import re

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import molf
import multimodal
from checkpoints import make_model, write_checkpoint
from molf.cli import main
from molf.job.model.loading import load_skeleton
from molf.job.record.assignment_source import read_assignment
from multimodal import write_multimodal
from recorded import logits_of

ALL_FULL = "full: [layers]\n"
ALL_LORA = "default: {r: 4, alpha: 4}\nuse_rslora: true\n"


@pytest.fixture
def write(tmp_path):
    def made(text, name="assignment.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return made


def without_ranks(options):
    """The options of a training, without those that an assignment has."""
    return [x for x in options if x not in ("--ranks", "--alpha", "4")]


@pytest.fixture
def hybrid(record, options, tmp_path):
    def run(assignment, *further, name="hybrid"):
        arguments = [*without_ranks(options), "--method", "hybrid", "--assignment", assignment]
        return record([*arguments, *further], tmp_path / name)

    return run


def plain(name):
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def test_all_full_is_fft_bit_for_bit(hybrid, run_of, write, capsys):
    fft, run = run_of("fft"), hybrid(write(ALL_FULL))
    assert (
        "All 14 layers are full: this is full fine-tuning (method fft)" in capsys.readouterr().err
    )
    assert run.end.keys() == fft.end.keys()
    assert all(torch.equal(run.end[name], value) for name, value in fft.end.items())
    assert not (run.path / "adapter").exists()


def test_all_full_is_fft_in_exact_bfloat16(hybrid, record, options, write, workplace):
    further = ["--dtype", "bfloat16"]
    fft = record([*options, "--method", "fft", *further], workplace / "fft-bfloat16-exact")
    run = hybrid(write(ALL_FULL), *further)
    assert {value.dtype for value in run.end.values()} == {torch.float32}  # low halves are joined
    assert all(torch.equal(run.end[name], value) for name, value in fft.end.items())


def test_all_lora_is_lora_bit_for_bit(hybrid, run_of, write, capsys):
    """With the rest frozen, as lora does; its own defaults of dropout, rates and decay."""
    lora, run = run_of("lora"), hybrid(write(ALL_LORA), "--freeze_rest")
    assert "All 14 layers are lora: this is LoRA (method lora)" in capsys.readouterr().err
    assert run.end.keys() == lora.end.keys()
    assert all(torch.equal(run.end[name], value) for name, value in lora.end.items())
    for part in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        own, other = load_file(run.path / part), load_file(lora.path / part)
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)


def test_all_lora_is_dora_by_option(hybrid, run_of, write):
    run = hybrid(write(ALL_LORA.replace("true", "false")), "--freeze_rest", "--use_dora")
    dora = run_of("dora")
    assert all(torch.equal(run.end[name], value) for name, value in dora.end.items())


def test_what_moves_is_what_the_assignment_trains(run_of):
    run = run_of("hybrid")
    assignment = read_assignment(run.path / "assignment.yaml")
    still = {f"{layer.name}.weight" for layer in (*assignment.lora, *assignment.frozen)}
    for name, start in run.start.items():
        assert torch.equal(start, run.end[name]) == (plain(name) in still), name
    ranks = {
        plain(name).split(".lora_")[0]: len(end)
        for name, end in run.end.items()
        if ".lora_A." in name
    }
    assert ranks == {layer.name: layer.r for layer in assignment.lora}
    assert run.prepared.trained_parameters == sum(
        end.numel() for name, end in run.end.items() if plain(name) not in still
    )
    trained = load_file(run.path / "model" / "model.safetensors")
    base = make_model("qwen2").state_dict()
    frozen = {f"{layer.name}.weight" for layer in assignment.frozen}
    assert {name for name, value in trained.items() if torch.equal(value, base[name])} == frozen


def test_the_run_holds_its_assignment_and_what_it_trains(run_of):
    run = run_of("hybrid")
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    model = config["run"]["model"]
    assert (model["full_layers"], model["adapted_layers"], model["frozen_layers"]) == (4, 9, 1)
    assert model["trained_parameters"] == run.prepared.trained_parameters
    assert config["run"]["merge"]["layers"] == 9
    assert config["run"]["merge"]["logit_difference"]["base"] < 1e-4
    entries = [json.loads(x) for x in (run.path / "metrics.jsonl").read_text().splitlines()]
    for entry in entries:
        assert entry["lora_learning_rate"] == pytest.approx(3 * entry["learning_rate"])
    text = (run.path / "assignment.yaml").read_text()
    assert molf.Assignment.from_yaml(text, make_model("qwen2")).to_yaml() == text
    card = (run.path / "model" / "README.md").read_text()
    assert "each layer trained in full, by LoRA or not at all" in card


def test_the_difference_of_the_merge_is_printed(run_of, hybrid, write, capsys):
    hybrid(write("full: [mlp]\ndefault: {r: 2}\n"))
    said = capsys.readouterr().err
    assert "Assignment: 14 layers: 6 full" in said
    assert re.search(r"Merged 8 layers. Largest logit difference from the unmerged model", said)
    assert said.count("Merged") == 1


def test_from_a_run_of_molf_by_its_log(hybrid, run_of):
    routed = run_of("molf")
    run = hybrid(str(routed.path))
    assignment = read_assignment(run.path / "assignment.yaml")
    steps = routed.routing[1:]  # the rate of the first is 0
    for name, layer in assignment.layers.items():
        wins = [step[name].winners[0] for step in steps]
        most = max(("full", "lora0_r4"), key=wins.count)
        assert layer.train == ("full" if most == "full" else "lora")
        assert layer.evidence.decisions == len(steps)
        assert dict(layer.evidence.wins) == {x: wins.count(x) for x in ("full", "lora0_r4")}
        if layer.train == "lora":  # --ranks 4 --alpha 4
            assert (layer.r, layer.alpha) == (4, 4)
    assert assignment.use_rslora
    assert assignment.source.startswith("the expert with the most wins, 2 steps of molf")


def test_the_log_and_the_optimizer_give_one_assignment(run_of):
    routed = run_of("molf")
    model = make_model("qwen2")
    made = read_assignment(routed.path, model, share=0.5)
    assert len(made.full) == 7
    margins = {}
    for name in made.layers:
        pairs = [step[name].scores for step in routed.routing[1:]]
        terms = [(x["full"] - x["lora0_r4"]) / (x["full"] + x["lora0_r4"]) for x in pairs]
        margins[name] = sum(terms) / len(terms)
        assert made[name].evidence.margin == pytest.approx(margins[name], abs=1e-6)
    assert {x.name for x in made.full} == set(sorted(margins, key=lambda n: -margins[n])[:7])


def test_from_a_run_of_hybrid_and_of_molf_e(hybrid, run_of, write):
    again = hybrid(str(run_of("hybrid").path))
    first, second = (run.path / "assignment.yaml" for run in (run_of("hybrid"), again))
    assert first.read_text() == second.read_text()
    assert all(torch.equal(again.end[name], end) for name, end in run_of("hybrid").end.items())
    from_molf_e = read_assignment(run_of("molf-e").path, make_model("qwen2"))
    assert from_molf_e.freeze_rest
    assert {layer.r for layer in from_molf_e.lora} <= {2, 4}
    assert len(from_molf_e.lora) == 14
    with pytest.raises(ValueError, match="there is no full expert to be compared"):
        read_assignment(run_of("molf-e").path, make_model("qwen2"), share=0.5)


def test_read_without_a_model(run_of, write):
    made = read_assignment(run_of("hybrid").path)
    assert made == molf.read_assignment(str(run_of("hybrid").path / "assignment.yaml"))
    for path, what in ((run_of("molf").path, "log is"), (write(ALL_FULL), "patterns are")):
        with pytest.raises(ValueError, match=f"{what} read with model="):
            read_assignment(path)


def test_options_replace_those_of_the_assignment(hybrid, write):
    run = hybrid(write("full: [mlp]\ndefault: {r: 4, alpha: 6}\n"), "--freeze_rest", "--use_rslora")
    made = read_assignment(run.path)
    assert (made.freeze_rest, made.use_rslora) == (True, True)
    moved = [n for n, start in run.start.items() if not torch.equal(start, run.end[n])]
    assert all(".lora_" in name or ".mlp." in name for name in moved)


def test_peft_loads_the_checkpoints(run_of, record, base, workplace):
    run = record([*run_of("hybrid").arguments, "--save_steps", "3"], workplace / "hybrid-saved")
    plain_base = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(plain_base, run.path / "checkpoints" / "checkpoint-3")
    values = loaded.state_dict()
    assert run.end.keys() <= values.keys()
    assert all(torch.equal(values[name], end) for name, end in run.end.items())


def test_other_architectures(options, record, write, workplace, tmp_path):
    """GPT-2's transposed weights; an untied head, which is a part of the rest."""
    patterns = {
        "gpt2": "full: [c_attn]\nlora: {r: 2, modules: [c_fc]}\ndefault: frozen\n",
        "llama": "full: [v_proj, lm_head]\nlora: {r: 2, modules: [mlp]}\nfrozen: [embed_tokens]\n",
    }
    for architecture, text in patterns.items():
        base = write_checkpoint(tmp_path / f"{architecture}-base", architecture)
        arguments = without_ranks(options)
        arguments[arguments.index("--model") + 1] = str(base)
        arguments += ["--method", "hybrid", "--assignment", write(text)]
        run = record(arguments, tmp_path / architecture)
        config = yaml.safe_load((run.path / "config.yaml").read_text())
        assert config["run"]["merge"]["logit_difference"]["base"] < 1e-4
        made = read_assignment(run.path)
        still = {f"{layer.name}.weight" for layer in (*made.lora, *made.frozen)}
        for name, start in run.start.items():
            is_still = plain(name) in still or plain(name) in made.frozen_rest
            assert torch.equal(start, run.end[name]) == is_still, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_base_where_lora(hybrid, write, dtype, base):
    pytest.importorskip("bitsandbytes")
    text = "full: [v_proj]\nlora: {r: 2, modules: [gate_proj, up_proj]}\ndefault: frozen\n"
    run = hybrid(write(text), "--load_in_4bit", "--dtype", dtype)
    kinds = {plain(name): start.dtype for name, start in run.start.items()}
    made = read_assignment(run.path)
    assert {kinds[f"{layer.name}.weight"] for layer in made.full} == {getattr(torch, dtype)}
    others = (*made.lora, *made.frozen)
    assert {kinds[f"{layer.name}.weight"] for layer in others} == {torch.uint8}
    for name, start in run.start.items():
        is_trained = start.dtype != torch.uint8
        is_trained = is_trained and not re.search(r"(gate|up|down|q|k|o)_proj\S*bias$", name)
        assert torch.equal(start.float(), run.end[name].float()) != is_trained, name
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["run"]["model"]["quantised"] == "bitsandbytes 4-bit"
    model = load_file(run.path / "model" / "model.safetensors")
    exact = {plain(name): end for name, end in run.end.items()}
    for layer in made.full:  # trained and saved without quantisation
        assert torch.equal(model[f"{layer.name}.weight"], exact[f"{layer.name}.weight"].float())


def test_plan_and_dry_run(options, write, base, capsys, tmp_path):
    path = write("full: [v_proj]\ndefault: {r: 2}\n")
    given = ["--method", "hybrid", "--assignment", path]
    plan = ["plan", "--task", "fact", "--model", str(base), "--device", "cpu", *given, "--json"]
    assert main(plan) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["planned"]["assignment"].startswith("14 layers: 2 full")
    dry = [*without_ranks(options), *given, "--dry_run", "--output_dir", str(tmp_path / "out")]
    assert main(dry) == 0
    said = capsys.readouterr()
    ratio = re.search(r"planned +.*\((\d\.\d+) of the measured\)", said.out)
    assert 0.9 < float(ratio[1]) < 1.1
    assert not (tmp_path / "out").exists()


def test_export(run_of, tmp_path, capsys):
    run = run_of("hybrid")
    out = str(tmp_path / "half")
    assert main(["export", str(run.path), "--dtype", "bfloat16", "--output_dir", out]) == 0
    exported = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in exported.values()} == {torch.bfloat16}
    capsys.readouterr()
    assert main(["export", str(run.path), "--what", "adapter"]) == 2
    assert "method=hybrid also trained weights outside of the adapter" in capsys.readouterr().err


def test_low_halves_give_the_exact_weights_back(hybrid, write, tmp_path):
    further = ["--dtype", "bfloat16", "--save_dtype", "bfloat16", "--keep_low_halves"]
    run = hybrid(write("full: [v_proj]\ndefault: {r: 2}\n"), *further)
    assert main(["export", str(run.path), "--dtype", "float32"]) == 0
    (path,) = run.path.glob("*/molf_export.json")
    exported = load_file(path.parent / "model.safetensors")
    exact = {plain(name): end for name, end in run.end.items()}
    for layer in read_assignment(run.path).full:
        assert torch.equal(exported[f"{layer.name}.weight"], exact[f"{layer.name}.weight"])


def test_an_adapter_of_several_ranks_loads_with_peft(hybrid, write, base):
    text = "lora:\n  - {r: 4, modules: [mlp]}\n  - {r: 2, alpha: 9, modules: [self_attn]}\n"
    run = hybrid(write(text), "--freeze_rest", "--use_rslora")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, run.path / "adapter")
    torch.testing.assert_close(logits_of(model), run.trained_logits, rtol=1e-4, atol=1e-5)
    card = (run.path / "adapter" / "README.md").read_text()
    assert "method `hybrid`" in card


WRONG = {
    "full: [x_proj]\n": "Invalid full pattern 'x_proj': it matches no linear layer",
    "full: [mlp]\nlora: {r: 4, modules: [up_proj]}\n": "took all its 2 layers",
    "lora: {r: 99, modules: [mlp]}\n": "r=99 exceeds its smaller side, 32",
    "lora: {r: 4, modules: [embed_tokens]}\n": "embed_tokens.weight is no linear layer",
    "default: frozen\nfreeze_rest: true\n": "Nothing would be trained",
    "full: [lm_head]\n": "lm_head is full and shares its weight with model.embed_tokens.weight",
    "ful: [mlp]\n": "unknown 'ful'",
    "[": "no YAML (line 1)",
    "3": "no assignment: must be a mapping",
    "": "no assignment: must be a mapping",
    "layers:\n  a: {train: full, shape: 4x4}\n": "the model has no a; the assignment has no model",
}


@pytest.mark.parametrize("text", WRONG, ids=list(WRONG.values()))
def test_wrong_assignments(options, write, tmp_path, capsys, text):
    path = write(text)
    arguments = [*without_ranks(options), "--method", "hybrid", "--assignment", path]
    out = tmp_path / "out"
    assert main([*arguments, "--output_dir", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert WRONG[text] in said[-1]
    assert path in said[-1]
    assert not out.exists()
    assert main(["plan", *arguments[1:]]) == 2
    assert WRONG[text] in capsys.readouterr().err


def test_wrong_paths_and_options(options, write, run_of, tmp_path, capsys):
    arguments = [*without_ranks(options), "--output_dir", str(tmp_path / "out")]
    good = write(ALL_FULL)
    for further, message in (
        (["--method", "hybrid"], "method=hybrid needs --assignment"),
        (["--method", "hybrid", "--assignment", str(tmp_path / "none")], "none"),
        (["--method", "hybrid", "--assignment", str(run_of("fft").path)], "has no routing"),
        (["--method", "hybrid", "--assignment", str(tmp_path)], "is not a run"),
        (
            ["--method", "hybrid", "--assignment", good, "--load_in_4bit", "--use_dora"],
            "Invalid use_dora with load_in_4bit",
        ),
        *(
            (
                ["--method", "hybrid", "--assignment", good, "--lora_dropout", value],
                f"Invalid lora_dropout={float(value)}. Must be in [0, 1).",
            )
            for value in ("1", "-0.1", "nan")
        ),
    ):
        assert main([*arguments, *further]) == 2, further
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1]
    assert not (tmp_path / "out").exists()


def test_an_assignment_of_another_model(options, run_of, write, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "other", "qwen2", num_hidden_layers=1)
    arguments = without_ranks(options)
    arguments[arguments.index("--model") + 1] = str(other)
    for source in (run_of("hybrid").path, run_of("molf").path):
        given = ["--method", "hybrid", "--assignment", str(source)]
        assert main([*arguments, *given, "--output_dir", str(tmp_path / "out")]) == 2
        assert "model.layers.1.self_attn.q_proj" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_the_head(options, write, tmp_path, capsys):
    """TRL's loss reads the head's weight without calling the layer."""
    base = write_checkpoint(tmp_path / "llama", "llama")
    arguments = without_ranks(options)
    arguments[arguments.index("--model") + 1] = str(base)
    path = write("lora: {r: 2, modules: [lm_head]}\n")
    assert main([*arguments, "--method", "hybrid", "--assignment", path]) == 2
    assert "lm_head is the head and cannot be lora: " in capsys.readouterr().err


def test_the_skeleton_is_enough_for_patterns(base):
    made = molf.Assignment.from_patterns(load_skeleton(str(base)), {"full": ["layers"]})
    assert len(made.full) == 14


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_layers_that_no_text_reaches(options, write, record, tmp_path, capsys, kind):
    """The same names are in the vision tower, which stays as it is."""
    base = tmp_path / kind
    write_multimodal(base, getattr(multimodal, kind)())
    arguments = without_ranks(options)
    arguments[arguments.index("--model") + 1] = str(base)
    path = write("full: [v_proj]\nlora: {r: 2, modules: [q_proj]}\ndefault: {r: 2, alpha: 3}\n")
    run = record([*arguments, "--method", "hybrid", "--assignment", path], tmp_path / "run")
    assert "Left out of the training" in capsys.readouterr().err
    made = read_assignment(run.path)
    vision = [x for x in made.entries if "vision" in x.name or "visual" in x.name]
    assert vision
    assert {layer.train for layer in vision} == {"frozen"}
    for name, start in run.start.items():
        if "vision" in name or "visual" in name:
            assert torch.equal(start, run.end[name]), name
    moved = {plain(n) for n, start in run.start.items() if not torch.equal(start, run.end[n])}
    assert {f"{layer.name}.weight" for layer in made.full} <= moved
