"""`molf plan` and `molf train --dry_run`, as commands."""

import json
import re

import pytest
import yaml

from checkpoints import write_checkpoint, write_facts
from molf.cli import main
from slow_cases import slow_after

COMMON = ("--task", "custom", "--per_device_train_batch_size", "2", "--max_length", "64")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plan") / "base")


@pytest.fixture
def config_alone(base, tmp_path):
    """What there is before anything is downloaded in full."""
    path = tmp_path / "config-alone"
    path.mkdir()
    (path / "config.json").write_text((base / "config.json").read_text())
    return path


@pytest.mark.parametrize("method", ["fft", "lora", "molf", "molf-e"])
def test_json(config_alone, capsys, method):
    assert main(["plan", "--model", str(config_alone), "--method", method, "--json", *COMMON]) == 0
    plan = json.loads(capsys.readouterr().out)
    parameters = plan["parameters"]
    assert parameters["total"] == sum(part["total"] for part in parameters["parts"].values())
    assert parameters["trained"] == sum(parameters["experts"].values())
    assert plan["bytes"] == plan["bytes_without_checkpointing"]
    assert plan["bytes_with_checkpointing"]["peak"] <= plan["bytes"]["peak"]
    assert plan["planned"]["method"] == method
    assert plan["planned"]["bf16"]
    assert plan["planned"]["accumulates"]
    assert all(device["fits"] for device in plan["devices"])


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "fft"],
        ["--method", "molf", "--dtype", "bfloat16", "--save_total_limit", "1"],
        ["--method", "molf-e", "--async_save"],
        ["--method", "lora"],
    ],
    ids=" ".join,
)
def test_checkpoints_are_those_of_a_training(base, tmp_path, capsys, options):
    data = write_facts(tmp_path / "facts.jsonl")
    given = ["--task", "fact", "--model", str(base), "--data", str(data), *options]
    assert main(["plan", "--json", "--device", "cpu", *given]) == 0
    plan = json.loads(capsys.readouterr().out)["checkpoints"]
    kept = 1 if "--save_total_limit" in options else 2
    assert (plan["kept"], plan["disk"]) == (kept, (kept + 1) * plan["checkpoint"])
    assert plan["host_copy"] == (plan["checkpoint"] if "--async_save" in options else 0)
    assert main(["train", *given, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]) == 0
    assert "saves    1 checkpoint of" in capsys.readouterr().out
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run"]["checkpoints"]
    tensors = 200  # at most, with less than 2 kB each beside their numbers
    assert plan["checkpoint"] < written["bytes"] < plan["checkpoint"] + 2_000 * tensors
    assert written["pause_seconds"] > 0


def test_no_checkpoints_are_planned_where_none_are_written(config_alone, capsys):
    given = ["plan", "--model", str(config_alone), "--save_minutes", "0", *COMMON]
    assert main(given) == 0
    assert "Checkpoints:" not in capsys.readouterr().out
    assert main(["plan", "--model", str(config_alone), "--save_steps", "5", *COMMON]) == 0
    assert re.search(r"Checkpoints: \S+ MiB each, all are kept; about", capsys.readouterr().out)


@pytest.fixture
def asked_for(config_alone, monkeypatch):
    """What the command asks to be planned; nothing is."""
    from types import SimpleNamespace

    from molf.planning import request

    def run(*options):
        asked = []

        def record(model, config, workload, frozen_base, saving):
            asked.append(workload)
            return SimpleNamespace(record=dict)

        monkeypatch.setattr(request, "plan_training", record)
        task = [] if "--task" in options else ["--task", "custom"]
        arguments = ["--model", str(config_alone), "--json", *task, *options]
        assert main(["plan", *arguments]) == 0
        return asked[0]

    return run


def test_defaults_are_those_of_training(asked_for):
    from molf.job.settings.defaults import COMMON

    workload = asked_for()
    assert workload.batch_size == COMMON["per_device_train_batch_size"]
    assert workload.accumulates == (COMMON["gradient_accumulation_steps"] > 1)
    assert (workload.method, workload.config.ranks) == ("molf", (128,))
    assert (workload.dtype, workload.device) == ("float32", "cuda")
    assert workload.bf16
    assert workload.padded
    assert not workload.checkpointing
    assert asked_for("--method", "lora").config.ranks == (32,)
    assert asked_for("--method", "molf-e").config.ranks == (32, 128)
    assert asked_for("--method", "fft").config is None


def test_the_length_is_what_fits_the_model(asked_for, config_alone):
    positions = json.loads((config_alone / "config.json").read_text())["max_position_embeddings"]
    assert asked_for().length == min(positions, 1024) < 1024
    assert asked_for("--max_length", str(positions - 1)).length == positions - 1


def test_a_recipe_is_planned_as_it_is_trained(asked_for):
    from datetime import datetime

    from molf.job.settings.resolved import resolve
    from molf.job.settings.settings import TrainSettings

    settings = TrainSettings(task="demo-fact", method="molf", ranks=(16,))
    resolved = resolve(settings, datetime(2026, 1, 1))
    workload = asked_for("--task", "demo-fact", "--config", "demo-fact-molf")
    assert workload.config == resolved.method_config
    assert workload.batch_size == resolved.per_device_train_batch_size
    assert workload.accumulates == (resolved.gradient_accumulation_steps > 1)


@pytest.mark.parametrize(
    "options",
    ["--learning_rate 3 --num_train_epochs 9", "--report_to nothing", "--data nowhere --dry_run"],
)
def test_options_of_training_alone_are_ignored(asked_for, capsys, options):
    assert asked_for(*options.split()) == asked_for()
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "--method dora",
            "Invalid method=dora. Only fft, lora, molf, molf-e, hybrid can be planned.",
        ),
        ("--kernels triton", "Invalid kernels=triton"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, options, line):
    assert main(["plan", *options.split()]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ("--max_length 77", "length", 77),
        ("--per_device_train_batch_size 1", "padded", False),
        ("--gradient_accumulation_steps 1", "accumulates", False),
        ("--gradient_checkpointing", "checkpointing", True),
        ("--gradient_checkpointing true", "checkpointing", True),
        ("--no-bf16", "bf16", False),
        ("--device cpu", "bf16", False),
        ("--device cpu --bf16", "bf16", True),
        ("--dtype bfloat16", "dtype", "bfloat16"),
        ("--num-gpus 4", "num_gpus", 4),
        ("--optimizer_in_backward", "optimizer_in_backward", True),
        ("--optimizer_in_backward", "accumulates", False),
        ("--state_dtype 8bit", "state_dtype", "8bit"),
        ("--state_offload", "state_offload", True),
        ("--num_gpus 4 --fsdp 2 --fsdp_cpu_offload", "cpu_offload", True),
        ("--fsdp 2 --fsdp_cpu_offload", "cpu_offload", False),  # one GPU
        ("--dtype bfloat16 --weight_rounding stochastic", "weight_rounding", "stochastic"),
        (
            "--dtype bfloat16 --grad_accumulation_dtype float32",
            "grad_accumulation_dtype",
            "float32",
        ),
        ("--method lora --load_in_4bit", "quantised", "load_in_4bit"),
        ("--method molf-e --load_in_8bit", "quantised", "load_in_8bit"),
        ("--ranks 4,8", "config.ranks", (4, 8)),
        ("--method lora --ranks 4,8", "config.ranks", (12,)),
        ("--target_modules q_proj,k_proj", "config.target_modules", ("q_proj", "k_proj")),
        ("--exclude_modules up_proj", "config.exclude_modules", ("up_proj",)),
        ("--freeze_rest true", "config.freeze_rest", True),
        ("--lora_dropout 0.1", "has_adapter", True),
    ],
)
def test_options_reach_the_plan(asked_for, options, name, value):
    from operator import attrgetter

    assert attrgetter(name)(asked_for(*options.split())) == value


def test_shards_on_one_gpu_are_named(asked_for, capsys):
    asked_for("--fsdp", "all")
    assert "Without effect with one GPU: fsdp=all. Give --num_gpus N" in capsys.readouterr().err
    asked_for("--fsdp", "all", "--num_nodes", "2")
    assert capsys.readouterr().err == ""


@pytest.fixture
def stored(config_alone):
    """Have the model's configuration say that it is stored quantised."""

    def write(**quantisation):
        path = config_alone / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": quantisation}
        path.write_text(json.dumps(config))
        return str(config_alone)

    return write


@pytest.mark.parametrize("bits", [4, 8])
def test_base_that_is_stored_quantised_is_planned_so(asked_for, stored, bits):
    stored(quant_method="bitsandbytes", **{f"load_in_{bits}bit": True})
    for option in ([], [f"--load_in_{bits}bit"]):
        workload = asked_for("--method", "molf-e", *option)
        assert workload.quantised == f"load_in_{bits}bit"


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        ("bitsandbytes", "", ["with method=molf: its full expert trains the base", "molf-e"]),
        ("bitsandbytes", "--method fft", ["with method=fft: it trains the base", "molf-e"]),
        ("bitsandbytes", "--method lora --load_in_8bit", ["Invalid load_in_8bit", "4-bit"]),
        ("bitsandbytes", "--method lora --dtype bfloat16", ["Invalid dtype=bfloat16", "4-bit"]),
        ("gptq", "--method lora", ["stored quantised: gptq", "bitsandbytes"]),
        ("torchao", "--method lora", ["stored quantised: torchao", "bitsandbytes"]),
    ],
)
def test_base_that_is_stored_quantised_otherwise(stored, capsys, method, more, words):
    four = {"load_in_4bit": True} if method == "bitsandbytes" else {}
    model = stored(quant_method=method, **four)
    assert main(["plan", "--model", model, *more.split()]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)


def test_a_quantised_base_is_not_divided(stored, config_alone, capsys):
    """As in training, which refuses `--fsdp` for it."""
    given = ["plan", "--model", str(config_alone), "--task", "custom", "--method", "lora"]
    assert main([*given, "--load_in_4bit", "--num_gpus", "2"]) == 2
    assert "Invalid num_gpus=2 with load_in_4bit" in capsys.readouterr().err
    stored(quant_method="bitsandbytes", load_in_8bit=True)
    assert main([*given, "--num_nodes", "2"]) == 2
    assert "Invalid num_nodes=2 with load_in_8bit" in capsys.readouterr().err


def test_options_without_effect_are_named(config_alone, capsys):
    common = ["plan", "--model", str(config_alone), "--ranks", "4", *COMMON]
    given = ["--optimizer_in_backward", "--state_offload", "--method", "lora"]
    assert main([*common, *given]) == 0
    line = "molf: warning: Without effect with method=lora: optimizer_in_backward, state_offload."
    assert capsys.readouterr().err.splitlines() == [line]
    assert main([*common, "--state_offload"]) == 0
    assert not capsys.readouterr().err


def test_table(config_alone, capsys):
    assert main(["plan", "--model", str(config_alone), "--ranks", "4", *COMMON]) == 0
    printed = capsys.readouterr().out
    for word in ("embeddings", "tied", "lora0_r4", "moments", "without checkpointing", "141 GB"):
        assert word in printed
    assert printed.count("fits") == 4


@pytest.mark.slow
def test_traffic_of_several_machines(config_alone, capsys):
    given = ["plan", "--model", str(config_alone), "--ranks", "4", *COMMON]
    given += ["--num_gpus", "4", "--num_nodes", "2", "--gradient_accumulation_steps", "3"]
    assert main([*given, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    traffic = plan["traffic"]
    assert (traffic["gpus"], traffic["shards"]) == (8, 8)
    assert (plan["planned"]["num_gpus"], plan["planned"]["num_nodes"]) == (4, 2)
    lora, full = (traffic["sent_by_optimizer"][name] for name in ("lora", "full"))
    assert 0 < full < lora < traffic["sent_by_fsdp"]
    seconds = 3 * 2 * 64 * 6 * plan["parameters"]["total"] / traffic["assumed_flops"]
    assert traffic["computation_seconds"] == pytest.approx(seconds)
    assert traffic["optimizer_bytes_per_second"] == pytest.approx(lora / (0.05 * seconds))
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "8 GPUs on 2 machines: fully_shard (FSDP2) divides weights" in printed
    assert "(3 forward passes; decoder layers are gathered twice in each" in printed
    assert "if lora wins everywhere" in printed
    # HSDP: two replicas of four shards.
    assert main([*given, "--fsdp", "4", "--json"]) == 0
    replicas = json.loads(capsys.readouterr().out)
    assert (replicas["traffic"]["gpus"], replicas["traffic"]["shards"]) == (8, 4)
    assert replicas["bytes"]["weights"] == pytest.approx(2 * plan["bytes"]["weights"], abs=1)
    assert main([*given, "--fsdp", "4", "--fsdp_cpu_offload"]) == 0
    printed = capsys.readouterr().out
    assert "shards and step, in host memory" in printed
    assert "moments" not in printed
    assert main([*given, "--fsdp", "3"]) == 2
    assert "Invalid fsdp=3 with 8 processes" in capsys.readouterr().err
    assert main(["plan", "--model", str(config_alone), "--num_nodes", "0", *COMMON]) == 2
    assert "Invalid num_nodes=0. Must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_table_says_what_would_fit(tmp_path, capsys):
    from transformers import Qwen2Config

    Qwen2Config(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
    ).save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--method", "fft", "--num_gpus", "2", "--task", "custom"]
    assert main(["plan", *arguments, "--per_device_train_batch_size", "64"]) == 0
    printed = capsys.readouterr().out
    assert "To fit 24 GB" in printed
    assert re.search(r"--gradient_checkpointing.*->\s+\d+\.\d+ GiB", printed)
    assert "2 GPUs: fully_shard (FSDP2) divides weights" in printed
    assert "short" in printed


@pytest.mark.parametrize(
    ("method", "options"),
    slow_after(
        2,
        [
            ("molf", ""),
            ("molf-e", ""),
            ("fft", ""),
            ("lora", ""),
            ("molf", "--dtype bfloat16"),
            ("fft", "--dtype bfloat16"),
            ("molf", "--state_dtype 8bit"),
            ("fft", "--optimizer_in_backward"),
            ("molf-e", "--load_in_4bit"),
        ],
    ),
)
def test_dry_run(base, tmp_path, capsys, monkeypatch, method, options):
    if "4bit" in options:
        pytest.importorskip("bitsandbytes")
    if "8bit" in options:
        pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    facts = write_facts(tmp_path / "facts.jsonl")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", "--dry_run", "--task", "fact", "--model", str(base), "--method", method]
    arguments += ["--data", str(facts), "--output_dir", "run", "--num_train_epochs", "3"]
    in_backward = "backward" in options
    shape = ("8", "1") if in_backward else ("4", "2")
    arguments += ["--per_device_train_batch_size", shape[0]]
    arguments += ["--gradient_accumulation_steps", shape[1], *options.split()]
    if method != "fft":
        arguments += ["--ranks", "4" if method != "molf-e" else "2,4"]
    assert main(arguments) == 0
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    printed = capsys.readouterr().out
    assert "12 of 12 examples tokenized" in printed
    assert "for 6 steps" in printed  # 12 examples, 8 in a step, 3 epochs
    (ratio,) = re.findall(r"\((\d\.\d+) of the measured\)", printed)
    assert float(ratio) == pytest.approx(1, abs=0.1)


def test_dry_run_refuses_what_a_run_refuses(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = write_facts(tmp_path / "facts.jsonl")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    common = ["train", "--dry_run", "--task", "fact", "--model", str(base), "--data", str(facts)]
    for wrong, word in (
        (["--output_dir", "taken"], "--overwrite"),
        (["--report_to", "nothing"], "report_to=nothing"),
        (["--target_modules", "nothing"], "'nothing'"),
        (["--max_length", "3"], "max_length=3"),
        (["--forgetting_data", "nowhere.txt"], "nowhere.txt"),
    ):
        assert main([*common, "--ranks", "4", *wrong]) == 2
        assert word in capsys.readouterr().err
