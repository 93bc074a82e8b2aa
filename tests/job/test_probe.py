"""`molf probe`: the options of molf train, small memory, no model, an assignment with evidence."""

import json
import shlex

import pytest
import torch
import yaml

from molf.cli import main
from molf.core.optimizer import MoLFAdamW
from molf.errors import InputError
from molf.job.advice.advice import advise
from molf.job.advice.cost import plan_costs
from molf.job.model.loading import load_skeleton
from molf.job.record.assignment_source import read_assignment
from molf.job.record.finished_run import read_run
from molf.job.record.routing_arrays import read_arrays
from molf.job.settings.probe import ProbeSettings
from molf.job.settings.settings import TrainSettings


@pytest.fixture(scope="module")
def given(base, facts):
    return [
        *("--task", "fact", "--model", str(base), "--data", str(facts)),
        *("--ranks", "4", "--learning_rate", "1e-2", "--lora_learning_rate", "3e-2"),
    ]


@pytest.fixture(scope="module")
def probed(given, workplace):
    """A probe of four steps, and the optimizer that took them."""
    path, optimizers = workplace / "probe", []
    step = MoLFAdamW.step

    def stepping(self, closure=None):
        optimizers.append(self)
        return step(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoLFAdamW, "step", stepping)
        assert main(["probe", *given, "--max_steps", "4", "--output_dir", str(path)]) == 0
    return path, optimizers[0]  # planning takes steps too


def test_files(probed, base):
    """A run's directory without model, checkpoints or adapter; the assignment has its evidence."""
    path, _ = probed
    assert sorted(entry.name for entry in path.iterdir()) == [
        "assignment.yaml",
        "config.yaml",
        "environment.json",
        "examples.jsonl",
        "metrics.jsonl",
        "routing",
    ]
    assignment = read_assignment(path, load_skeleton(str(base)))
    assert len(assignment.entries) == 14
    assert read_arrays(path).layers == [one.name for one in assignment.entries]
    assert {one.evidence.decisions for one in assignment.entries} == {3}  # the first is at rate 0
    config = yaml.safe_load((path / "config.yaml").read_text())
    assert config["run"]["probe"] is True
    assert config["method"] == "molf"


def test_small_memory(probed):
    """bfloat16 weights without low halves, 8-bit moments, gradients freed in the backward pass."""
    _, optimizer = probed
    assert optimizer.optimizer_in_backward
    weights = [group["params"][0] for group in optimizer.param_groups if group["layer"]]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert {group["state_dtype"] for group in optimizer.param_groups if group["layer"]} == {"8bit"}
    assert {group["weight_rounding"] for group in optimizer.param_groups} == {"stochastic"}
    assert all(weight.grad is None for weight in weights)


def test_rank_above_a_layers_side(given, tmp_path, capsys):
    """It is a warning, as in a training, and the assignment has adapters that fit."""
    path = tmp_path / "probe"
    alone = [word for word in given if word not in ("--ranks", "4")]
    alone += ["--ranks", "20", "--score", "lora", "--max_steps", "2", "--no_plan"]
    assert main(["probe", *alone, "--output_dir", str(path)]) == 0
    assert "Rank 20 exceeds the smaller side of 4 of 14 routed layers" in capsys.readouterr().err
    found = advise(read_run(path))
    assert [layer.r for layer in found.assignment.lora] == [
        16 if name.endswith(("k_proj", "v_proj")) else 20 for name in found.assignment.layers
    ]
    assert sum(found.assigned_to(group, "lora0_r20") for group in found.by_kind) == 14


def test_a_share_reads_the_log_of_a_probe(probed, base):
    """Its assignment.yaml has the wins."""
    path, _ = probed
    model = load_skeleton(str(base))
    made = read_assignment(path, model, share=0.5)
    assert len(made.full) == 7
    assert made == advise(read_run(path), share=0.5).assignment
    with pytest.raises(InputError, match="a share is for the routing log of a run"):
        read_assignment(path / "assignment.yaml", model, share=0.5)


def test_advice_of_a_probe(probed, base, tmp_path, capsys):
    """Advice on the probe is the probe's own, and plans trainings with usual storage."""
    path, _ = probed
    out = tmp_path / "assignment.yaml"
    capsys.readouterr()
    assert main(["advise", str(path), "--output", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert out.read_text() == (path / "assignment.yaml").read_text()
    costs = {one["method"]: one for one in found["costs"]}
    # Per parameter at least a float32 weight, its two moments and its gradient.
    assert costs["fft"]["peak"] > 16 * costs["fft"]["trained"]
    cost = plan_costs(read_run(path), read_assignment(path, load_skeleton(str(base))))
    assert cost.workload.dtype == TrainSettings().dtype
    assert costs["lora"]["trained"] < costs["hybrid"]["trained"] < costs["molf"]["trained"]


def test_training_by_a_probe(probed, given, tmp_path):
    """Its directory is an assignment for method hybrid."""
    path, _ = probed
    run = tmp_path / "run"
    arguments = [word for word in given if word not in ("--ranks", "4")]
    arguments += ["--method", "hybrid", "--assignment", str(path), "--max_steps", "1"]
    assert main(["train", *arguments, "--output_dir", str(run)]) == 0
    assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", [["export"], ["export", "--what", "adapter", "--rank", "2"]])
def test_a_probe_has_no_model(probed, capsys, command):
    path, _ = probed
    capsys.readouterr()
    assert main([command[0], str(path), *command[1:]]) == 2
    error = capsys.readouterr().err
    assert "is a probe, which keeps no model" in error
    assert f"--assignment {path}" in error
    assert error.count("\n") == 1


def test_printed(given, tmp_path, capsys):
    path, figures = tmp_path / "probe", tmp_path / "figures"
    more = ["--max_steps", "2", "--share", "0.5", "--figures", str(figures), "--no-plan"]
    data = ["--max_samples", "12", "--max_length", "512", "--split_special_tokens"]
    batch = ["--gradient_accumulation_steps", "2", "--seed", "5"]
    assert main(["probe", *given, *more, *data, *batch, "--output_dir", str(path)]) == 0
    text = capsys.readouterr().out
    assert "14 layers: 7 full" in text
    assert "Few steps: 1 decision per layer" in text
    # The same data, model, rates and batch.
    task, model, records = given[:2], given[2:4], given[4:6]
    same = [*task, *records, *data, *model, "--learning_rate", "0.01"]
    same += ["--lora_learning_rate", "0.03", *batch]
    command = ["molf", "train", *same, "--method", "hybrid", "--assignment", str(path)]
    assert text.splitlines()[-1] == f"next      {shlex.join(command)}"
    assert len(list(figures.iterdir())) == 2


def test_options_of_a_training_are_taken():
    """Those that small memory excludes are left out, in one line."""
    with pytest.warns(UserWarning, match="Without effect in a probe: ") as caught:
        settings = ProbeSettings(
            gradient_accumulation_steps=4,
            max_grad_norm=1.0,
            save_steps=10,
            nonfinite="skip",
            keep_low_halves=True,
            max_steps=None,
        )
    (warning,) = caught
    for name in ("gradient_accumulation_steps", "max_grad_norm", "save_steps", "nonfinite"):
        assert name in str(warning.message)
    training = settings.training
    assert training.gradient_accumulation_steps == 1
    assert training.max_steps == 30
    assert training.optimizer_in_backward


def test_scores_that_compare_layers_take_steps_after_the_backward_pass():
    settings = ProbeSettings(score="share:0.2:gsnr").training
    assert not settings.optimizer_in_backward
    assert settings.state_dtype == "8bit"


def test_recipe_of_a_run(run_of, tmp_path):
    """The config.yaml of a training is a recipe of a probe too."""
    path = tmp_path / "probe"
    recipe = ["--config", str(run_of("molf").path / "config.yaml"), "--output_dir", str(path)]
    assert main(["probe", *recipe, "--max_steps", "2", "--no-plan"]) == 0
    assert (path / "assignment.yaml").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "lora"], "Invalid method=lora: a probe compares full with LoRA"),
        (["--method", "molf-e"], "Invalid method=molf-e"),
        (["--dry_run"], "Invalid dry_run of a probe"),
        (["--share", "2"], "Invalid share=2. Must be above 0 and below 1."),
        (["--max_steps", "0"], "Invalid max_steps=0"),
        (
            ["--max_steps", "1"],
            "Invalid max_steps=1 with warmup_ratio=0.1: a warm-up begins at rate 0, and no step of "
            "the probe has a rate above 0. Give --max_steps 2 or more, or --warmup_ratio 0.",
        ),
        (["--max_steps", "1", "--warmup_ratio", "0.9"], "with warmup_ratio=0.9: a warm-up"),
        (["--max_steps", "1", "--lr_scheduler_type", "cosine"], "Invalid max_steps=1 with warmup"),
        (["--model", "{tmp}/gone"], "gone"),
        (["--figures", "{tmp}/file"], "is a file. Give a folder."),
        (["--kernels", "fast"], "fast"),
    ],
)
def test_wrong_input(given, tmp_path, capsys, arguments, words):
    (tmp_path / "file").touch()
    path = tmp_path / "probe"
    more = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    kept = given[:2] + given[4:] if "--model" in more else given
    capsys.readouterr()
    assert main(["probe", *kept, *more, "--output_dir", str(path)]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert words in error
    assert all("a step has 8 examples" in line for line in warnings)
    assert not path.exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--max_steps", "1", "--warmup_ratio", "0"],
        ["--max_steps", "1", "--lr_scheduler_type", "constant"],
        ["--max_steps", "2", "--warmup_ratio", "0.9", "--lr_scheduler_type", "linear"],
    ],
)
def test_one_decision_suffices(given, tmp_path, more):
    path = tmp_path / "probe"
    assert main(["probe", *given, *more, "--no-plan", "--output_dir", str(path)]) == 0
    assert advise(read_run(path)).steps == 1


def test_without_torchao(given, tmp_path, capsys, monkeypatch):
    from molf.core import options as core_options

    monkeypatch.setattr(core_options, "find_spec", lambda name: None)
    assert main(["probe", *given, "--output_dir", str(tmp_path / "probe")]) == 2
    assert "torchao" in capsys.readouterr().err
