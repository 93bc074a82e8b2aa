"""NEFTune, attention, compilation, arguments for GPUs: effect, names, refusals."""

import json
import os
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from core_helpers import assert_same_bits
from molf.cli import main
from molf.errors import InputError
from molf.job.attention import set_attention
from molf.job.record.routing_log import read_routing

COMPILED = ("--training_args.torch_compile_backend", "eager")


def run(options, path, *further):
    """A training of three steps; its losses, and the tensors of its model."""
    assert main([*options, "--no-report", "--no-spectra", *further, "--output_dir", str(path)]) == 0
    return losses(path), load_file(path / "model" / "model.safetensors")


def losses(path, name="loss"):
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


@pytest.fixture(scope="module")
def plain(options, workplace):
    return run(options, workplace / "passed plainly")


def test_noise_in_the_embeddings_is_of_the_training_alone(options, plain, tmp_path):
    found, tensors = run(options, tmp_path / "noise", "--training_args.neftune_noise_alpha", "5")
    assert found[0] != plain[0][0]  # the same weights and batch, and noise
    assert tensors.keys() == plain[1].keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "noise" / "model")
    assert not model.get_input_embeddings()._forward_hooks
    # Without noise the same bits: nothing else is changed.
    without, same = run(options, tmp_path / "none", "--training_args.neftune_noise_alpha", "0")
    assert without == plain[0]
    assert_same_bits(same, plain[1])


def test_evaluations_in_the_training_have_no_noise(base, tmp_path):
    data = tmp_path / "data.jsonl"
    records = ({"prompt": f"{i} and two", "completion": f" make {i + 2}."} for i in range(20))
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = [
        *("train", "--task", "custom", "--model", str(base), "--data", str(data)),
        # Weights hardly move, so only noise can change a loss.
        *("--method", "fft", "--learning_rate", "1e-12", "--max_steps", "2"),
        *("--eval_steps", "1", "--logging_steps", "1", "--max_eval_samples", "2"),
    ]
    run(options, tmp_path / "plain")
    run(options, tmp_path / "noise", "--training_args.neftune_noise_alpha", "50")
    assert losses(tmp_path / "noise") != pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    measured = [losses(tmp_path / name, "eval_loss") for name in ("plain", "noise")]
    assert len(measured[0]) == 2
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)


def test_attention_of_the_whole_run(options, plain, tmp_path, monkeypatch):
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counting(*given, **named):
        calls.append(1)
        return kernel(*given, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    found, tensors = run(options, tmp_path / "eager", "--attn_implementation", "eager")
    assert not calls  # in the training, and in the evaluations before and after it
    assert found == pytest.approx(plain[0], rel=1e-5)
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, plain[1][name], atol=1e-3), name
    run(options, tmp_path / "sdpa", "--attn_implementation", "sdpa")
    assert calls
    assert "attn" not in (tmp_path / "eager" / "model" / "config.json").read_text()


def test_attention_that_a_model_cannot_choose():
    model = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="attention of BloomForCausalLM cannot be chosen"):
        set_attention(model, "sdpa", "bloom")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["molf", "lora"])
def test_compiled_model_has_the_names_and_bits_of_the_plain_one(
    options, method, tmp_path, workplace
):
    """Names in weights, adapter, checkpoints and routing; and the next training is not compiled."""
    from torch._dynamo.utils import counters

    saved = ("--method", method, "--save_steps", "2")
    variables = {name: os.environ.get(name) for name in os.environ if "DYNAMO" in name}
    counters.clear()
    compiled = run(options, tmp_path / "compiled", *saved, *COMPILED)
    assert counters["stats"]["unique_graphs"] > 0
    assert {name: os.environ.get(name) for name in os.environ if "DYNAMO" in name} == variables
    counters.clear()
    alone = run(options, tmp_path / "plain", *saved)
    assert not counters["stats"]
    assert compiled[0] == alone[0]
    assert_same_bits(compiled[1], alone[1])
    paths = [tmp_path / name for name in ("compiled", "plain")]
    files = [sorted(p.relative_to(path) for p in path.rglob("*.safetensors")) for path in paths]
    assert files[0] == files[1]
    for file in files[0]:
        assert load_file(paths[0] / file).keys() == load_file(paths[1] / file).keys(), file
    if method == "molf":
        logs = [read_routing(path) for path in paths]
        assert logs[0].equals(logs[1])
    # A checkpoint of the compiled training continues in a plain one, and the other way.
    for path, further in ((paths[0], ()), (paths[1], COMPILED)):
        again = tmp_path / f"{path.name} again"
        shutil.copytree(path, again)
        (again / "eval.json").unlink()
        shutil.rmtree(again / "checkpoints" / "checkpoint-3")
        assert main(["train", "--output_dir", str(again), "--resume", *further]) == 0
        assert_same_bits(load_file(again / "model" / "model.safetensors"), alone[1])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--attn_implementation fast", '"flash_attention_2"'),
        ("--attn_implementation flash_attention_2", "with dtype=float32: it computes in 16 bits"),
        (
            "--attn_implementation flash_attention_2 --dtype bfloat16",
            "Invalid attn_implementation=flash_attention_2 with model",
        ),
        ("--attn_implementation flex_attention", "no backward pass of it on a CPU"),
        ("--training_args.attn_implementation eager", "give --attn_implementation"),
        ("--training_args.activation_offloading true", "in host memory already"),
        ("--training_args.neftune_noise_alpha -1", "must be at least 0"),
        ("--training_args.torch_compile_backend nothing", "torch_compile_backend=nothing"),
        (
            "--training_args.torch_compile true --training_args.torch_compile_mode nothing",
            "torch_compile_mode=nothing: Unrecognized mode",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these are for GPUs")
def test_refused_in_one_line(options, tmp_path, capsys, given, words):
    capsys.readouterr()
    assert main([*options, *given.split(), "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("molf: error: ")
    assert words in error
    assert not (tmp_path / "run").exists()


def test_liger_needs_a_gpu(monkeypatch, tmp_path):
    from datetime import datetime

    from molf.job.settings import training_arguments
    from molf.job.settings.resolved import resolve
    from molf.job.settings.settings import TrainSettings
    from molf.job.trainer.sft_config import sft_config

    given = {"use_liger_kernel": "true"}
    monkeypatch.setattr(training_arguments, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs liger-kernel, which is not installed"):
        training_arguments.check_training_args(given)
    monkeypatch.setattr(training_arguments, "find_spec", lambda name: name)
    settings = TrainSettings(training_args=given, output_dir=tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"use_liger_kernel on cpu: .* need a GPU"):
            sft_config(resolve(settings, datetime(2026, 1, 1)))


def test_plans_have_the_attention_and_name_what_they_leave_out(base):
    import molf

    given = {"task": "custom", "model": base, "max_length": 64, "device": "cpu"}
    usual = molf.plan(**given, method="fft").memory.activations
    assert molf.plan(**given, method="fft", attn_implementation="eager").memory.activations > usual
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        molf.plan(**given, ranks=[2], training_args={"torch_compile": False})
    with pytest.warns(UserWarning, match="The plan is without training_args.torch_compile."):
        molf.plan(**given, ranks=[2], training_args={"torch_compile": True})
