"""bfloat16 weights, 8-bit states and steps in the backward pass, through the command line."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from molf.cli import main
from molf.errors import InputError
from molf.job.settings.resolved import resolve
from molf.job.settings.settings import TrainSettings
from offload_helpers import LateCarrier, carried_by
from slow_cases import slow_after


def settings_of(**given):
    from datetime import datetime

    return resolve(TrainSettings(**{"task": "demo-fact", **given}), datetime(2026, 1, 1))


@pytest.fixture(scope="module")
def train(facts, tmp_path_factory):
    """A short run; its metrics, configuration and saved weights."""
    base = tmp_path_factory.mktemp("wide") / "base"
    wide = {"hidden_size": 64, "intermediate_size": 128}  # tensors that have 8-bit moments
    write_checkpoint(base, **wide)

    def run(path, *options: str, steps: int = 3, logging: int = 1):
        arguments = ["train", "--task", "fact", "--model", str(base), "--data", str(facts)]
        arguments += ["--max_steps", str(steps), "--max_eval_samples", "4"]
        arguments += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
        arguments += ["--warmup_ratio", "0", "--logging_steps", str(logging)]
        arguments += ["--learning_rate", "2e-5", "--ranks", "4"]
        assert main([*arguments, "--output_dir", str(path), *options]) == 0
        lines = (path / "metrics.jsonl").read_text().splitlines()
        config = yaml.safe_load((path / "config.yaml").read_text())
        weights = load_file(path / "model/model.safetensors")
        return [json.loads(line) for line in lines], config, weights

    return run


FULL = ("--method", "molf", "--score", "full")  # `full` wins every layer: fft and molf are one


@pytest.fixture(scope="module")
def float32(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "float32", *FULL)


@pytest.mark.parametrize(
    ("method", "rounding", "lost", "kept"),
    slow_after(
        2,
        [
            ("molf", None, (0.0, 0.02), 0.01),
            ("fft", "nearest", (0.3, 1.0), math.inf),
            ("fft", "exact", (0.0, 0.02), 0.01),
            ("molf", "stochastic", (0.3, 1.0), 0.2),
        ],
    ),
)
def test_bfloat16_runs_record_how_they_round_and_what_is_lost(
    method, rounding, lost, kept, train, tmp_path
):
    options = [] if rounding is None else ["--weight_rounding", rounding]
    metrics, config, weights = train(
        tmp_path / "run", "--method", method, "--dtype", "bfloat16", *options
    )
    assert config["dtype"] == "bfloat16"
    assert config["weight_rounding"] == (rounding or "exact")
    assert len(metrics) == 3
    for line in metrics:
        assert lost[0] <= line["lost_updates"] <= lost[1]
        assert abs(line["update_kept"] - 1) < kept
    if rounding == "nearest":
        assert max(line["update_kept"] for line in metrics) < 0.7
    stored = config["run"]["model"]["dtype"]
    assert {str(w.dtype).removeprefix("torch.") for w in weights.values()} == {stored}


def test_only_logged_steps_are_measured(train, tmp_path, monkeypatch):
    from molf.core.step.fidelity import UpdateTally

    made = []
    init = UpdateTally.__init__
    monkeypatch.setattr(UpdateTally, "__init__", lambda self: (made.append(1), init(self))[1])
    metrics, _, _ = train(tmp_path / "run", steps=5, logging=2)
    assert [line["step"] for line in metrics] == [1, 2, 4, 5]
    assert len(made) == 4
    assert all("lost_updates" in line for line in metrics)


def test_exact_bfloat16_saves_float32_weights_with_their_lower_halves(train, tmp_path):
    _, _, weights = train(tmp_path / "run", "--dtype", "bfloat16", "--save_dtype", "float32", *FULL)
    moved = [w for w in weights.values() if not torch.equal(w.bfloat16().float(), w)]
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert len(moved) == len(weights)


@pytest.mark.parametrize(
    "options", slow_after(1, [[*FULL], ["--method", "fft", "--optimizer_in_backward"]]), ids=str
)
def test_8bit_states_through_the_command_line(options, train, tmp_path, float32):
    _, _, expected = float32
    metrics, config, weights = train(tmp_path / "run", "--state_dtype", "8bit", *options)
    assert len(metrics) == 3
    assert all("lost_updates" in line for line in metrics)
    assert config["state_dtype"] == "8bit"
    assert config["optimizer_in_backward"] == ("--optimizer_in_backward" in options)
    # Clipping, which steps in the backward pass lack, hardly matters.
    changes = [(w.float() - expected[name].float()).abs().max() for name, w in weights.items()]
    assert max(changes) < 2e-4


def test_in_backward_is_the_ordinary_run_without_clipping(train, tmp_path):
    runs = {}
    for name, options in (
        ("ordinary", ["--max_grad_norm", "0"]),
        ("backward", ["--optimizer_in_backward"]),
    ):
        metrics, _, runs[name] = train(tmp_path / name, "--save_dtype", "float32", *options)
        # Freed gradients would leave a norm of 0.
        assert all(("grad_norm" in line) == (name == "ordinary") for line in metrics)
    assert all(torch.equal(runs["ordinary"][k], w) for k, w in runs["backward"].items())


@pytest.mark.parametrize(
    "options", [("--method", "molf", "--dtype", "bfloat16"), ("--method", "fft")], ids=str
)
def test_state_in_host_memory_changes_no_bit(options, train, tmp_path):
    # fft with a plain state would be torch's own AdamW.
    options = (*options, "--state_dtype", "8bit")
    _, config, ordinary = train(tmp_path / "ordinary", *options)
    assert config["state_offload"] is False
    carrier = LateCarrier()
    with carried_by(lambda _: carrier):
        _, config, offloaded = train(tmp_path / "offloaded", *options, "--state_offload")
    assert config["state_offload"] is True
    assert carrier.peak > 0
    assert all(torch.equal(ordinary[name], w) for name, w in offloaded.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has an effect on CUDA")
def test_state_in_host_memory_is_without_effect_on_a_cpu(train, tmp_path, capsys):
    train(tmp_path / "run", "--state_offload", steps=1)
    error = capsys.readouterr().err
    assert error.count("state_offload=True is without effect: no trained parameter is on") == 1
    with pytest.warns(UserWarning, match="Without effect with method=lora: state_offload"):
        assert settings_of(method="lora", state_offload=True).state_offload is False


def test_lora_beside_a_bfloat16_base_is_merged_in_float32(train, tmp_path):
    metrics, config, weights = train(
        tmp_path / "run", "--method", "lora", "--dtype", "bfloat16", "--save_dtype", "float32"
    )
    assert config["weight_rounding"] is None
    assert "lost_updates" not in metrics[0]  # PEFT keeps adapters in float32, under torch's AdamW
    merged = [w for k, w in weights.items() if "q_proj.weight" in k or "down_proj" in k]
    assert merged
    assert all(not torch.equal(w.bfloat16().float(), w) for w in merged)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_rounding": "exact"}, "with dtype=float32: there is nothing to round"),
        ({"dtype": "float16"}, "Must be one of float32, bfloat16"),
        ({"dtype": "bfloat16", "weight_rounding": "up"}, "exact, stochastic, nearest"),
        ({"state_dtype": "4bit"}, "Must be one of float32, 8bit"),
        (
            {"optimizer_in_backward": True, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2 with optimizer_in_backward",
        ),
        ({"optimizer_in_backward": True, "max_grad_norm": 1.0}, "max_grad_norm=1.0 with"),
        ({"optimizer_in_backward": True, "nonfinite": "skip"}, "nonfinite=skip with"),
        ({"optimizer_in_backward": True, "grad_accumulation_dtype": "float32"}, "grad_accum"),
        ({"kernels": "cuda"}, "Invalid kernels='cuda'. Must be one of eager, triton"),
        ({"kernels": "triton", "method": "molf-e"}, "kernels=triton with method=molf-e: .* eager"),
        ({"kernels": "triton", "lora_dropout": 0.1}, "with method=molf and lora_dropout"),
        ({"kernels": "triton", "state_dtype": "8bit"}, "with state_dtype=8bit: .* Leave one"),
        ({"kernels": "triton", "state_offload": True}, "with state_offload: .* Leave one"),
    ],
)
def test_what_cannot_be_is_one_line(given, message):
    with pytest.raises(InputError, match=message):
        TrainSettings(**given)


def test_8bit_without_torchao_names_the_extra(monkeypatch):
    monkeypatch.setattr("molf.core.options.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"molf\[torchao\]"):
        TrainSettings(state_dtype="8bit")


def test_kernels_without_triton_name_the_extra(monkeypatch):
    monkeypatch.setattr("molf.core.options.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"kernels=triton: it needs triton.*molf\[triton\]"):
        TrainSettings(kernels="triton")


def test_kernels_do_nothing_for_an_adapter_and_that_is_said():
    pytest.importorskip("triton")
    with pytest.warns(UserWarning, match="Without effect with method=lora: kernels"):
        assert settings_of(method="lora", kernels="triton").kernels == "eager"


@pytest.mark.parametrize("options", [["--method", "fft"], ["--method", "molf", "--dry_run"]])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on CUDA")
def test_kernels_on_a_cpu_are_one_line(options, tmp_path, capsys):
    pytest.importorskip("triton")
    path = tmp_path / "run"
    code = main(["train", *options, "--kernels", "triton", "--output_dir", str(path)])
    error = capsys.readouterr().err
    assert code == 2
    assert "kernels='triton' needs CUDA, and the training is on cpu." in error
    assert "Traceback" not in error
    assert not path.exists()


def test_clipping_and_accumulation_go_where_nobody_asked_for_them():
    assert settings_of().max_grad_norm == 1.0
    with pytest.warns(UserWarning, match="8 examples instead of 32"):
        found = settings_of(task="custom", data="x", model="owner/name", optimizer_in_backward=True)
    assert (found.max_grad_norm, found.gradient_accumulation_steps) == (0.0, 1)
    with pytest.warns(UserWarning, match="Without effect with method=lora"):
        found = settings_of(method="lora", optimizer_in_backward=True)
    assert (found.max_grad_norm, found.optimizer_in_backward) == (1.0, False)
