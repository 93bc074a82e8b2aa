"""More shards, replicas, methods, models and types of `molf train --fsdp`; DDP of the methods."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from checkpoints import write_checkpoint
from near_runs import STEPS, assert_near_runs, entries, facts_command
from process_faults import allow_offload
from resumed_runs import assert_same_runs
from tiny_models import byte_level_tokenizer

pytestmark = pytest.mark.slow

METHODS = {
    "fft": ["--method", "fft"],
    "lora": ["--method", "lora", "--lora_dropout", "0"],
    "lora+": ["--method", "lora+", "--lora_dropout", "0"],
    "dora": ["--method", "dora", "--lora_dropout", "0"],
    "pissa": ["--method", "pissa", "--lora_dropout", "0"],
    "eva": ["--method", "eva", "--lora_dropout", "0"],
    "adalora": ["--method", "adalora", "--lora_dropout", "0"],
    "molf-e": ["--method", "molf-e", "--lora_dropout", "0"],
    "hybrid": ["--method", "hybrid", "--lora_dropout", "0", "--use_dora"],
    # So little that it drops nothing, for the form that dropout needs.
    "explicit": ["--lora_dropout", "1e-9"],
    "8bit": ["--state_dtype", "8bit"],
    "checkpointing": ["--gradient_checkpointing"],
    "unclipped": ["--method", "fft", "--max_grad_norm", "0"],
}
WAYS = {"ddp": [], "fsdp": ["--fsdp", "all"]}


@pytest.fixture(scope="module")
def folder(folder):
    """With a model of Conv1D layers, and an assignment."""
    write_checkpoint(folder / "conv" / "base", "gpt2", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    (folder / "assignment.yaml").write_text("full: [down_proj]\ndefault: {r: 4, alpha: 4}\n")
    return folder


@pytest.fixture(scope="module")
def one(launch, command, folder):
    """A run of one process, with steps of 12 examples."""
    path = folder / "one"
    launch.to_the_end(command(path, 3, 4), 1)
    return path


@pytest.mark.parametrize(
    ("count", "size", "passes", "shards"),
    [(3, 4, 1, "all"), (4, 3, 1, "all"), (4, 3, 1, "2"), (2, 2, 3, "2"), (4, 1, 3, "4")],
)
def test_any_number_of_shards_trains_as_one_process(
    launch, command, folder, one, count, size, passes, shards
):
    path = folder / f"{shards} of {count}, {size}"
    main, *_ = launch.to_the_end(command(path, size, passes, "--fsdp", shards), count)
    assert_near_runs(one, path, tolerance=1e-6)
    if shards == "2" and count == 4:
        assert "float32, on cpu, in 2 replicas of 2 shards\n" in main.errors


@pytest.fixture(scope="module", params=METHODS)
def method(request, launch, command, folder):
    """Options of a method, and its run in one process."""
    further = list(METHODS[request.param])
    if request.param == "hybrid":
        further += ["--assignment", str(folder / "assignment.yaml")]
    path = folder / request.param
    launch.to_the_end(command(path, 5, 2, *further), 1)
    return path, further


@pytest.mark.parametrize("way", WAYS)
def test_methods_train_as_in_one_process(launch, command, folder, method, way):
    one, further = method
    path = folder / f"{one.name} {way}"
    launch.to_the_end(command(path, 5, 1, *further, *WAYS[way]))
    assert_near_runs(one, path, tolerance=1e-6)
    assert (one / "adapter").exists() == (path / "adapter").exists()
    if (one / "adapter").exists():
        name = "adapter/adapter_model.safetensors"
        pairs = load_file(one / name), load_file(path / name)
        assert pairs[0].keys() == pairs[1].keys()
        for key, value in pairs[0].items():
            assert torch.allclose(value, pairs[1][key], rtol=0, atol=1e-5), key
        files = [
            json.loads((run / "adapter/adapter_config.json").read_text()) for run in (one, path)
        ]
        for name in ("rank_pattern", "alpha_pattern"):
            assert files[0][name] == files[1][name], name


def test_offloaded_shards_train_as_one_process(launch, command, folder, one):
    """On a CPU the shards stay where they are; the calls are those of a GPU."""
    path = folder / "offloaded"
    before = dict.fromkeys(range(3), allow_offload)
    given = command(path, 4, 1, "--fsdp", "all", "--fsdp_cpu_offload")
    launch.to_the_end(given, 3, before=before)
    assert_near_runs(one, path, tolerance=1e-6)
    ended = launch(command(folder / "refused", 5, 1, "--fsdp", "all", "--fsdp_cpu_offload"))
    assert [process.code for process in ended] == [2, 2]
    assert "Invalid fsdp_cpu_offload on cpu: it keeps shards in host memory" in ended[0].errors
    assert not (folder / "refused").exists()


def test_conv1d_in_shards(launch, folder):
    """Weights stored as [in, out], biases, no block of transformers' own plans."""
    command = facts_command(folder, folder / "conv" / "base")
    launch.to_the_end(command(folder / "conv one", 5, 2), 1)
    launch.to_the_end(command(folder / "conv two", 5, 1, "--fsdp", "all"))
    assert_near_runs(folder / "conv one", folder / "conv two")


def test_fused_experts_and_latent_attention_in_shards(launch, folder):
    """DeepSeek-V3: 3-D weights, a router with a buffer, projections of other sizes than heads."""
    config = DeepseekV3Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=6,
        q_lora_rank=12,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).save_pretrained(folder / "deepseek")
    byte_level_tokenizer().save_pretrained(folder / "deepseek")
    command = facts_command(folder, folder / "deepseek")
    launch.to_the_end(command(folder / "deepseek one", 3, 4), 1)
    launch.to_the_end(command(folder / "deepseek four", 3, 1, "--fsdp", "all"), 4)
    assert_near_runs(folder / "deepseek one", folder / "deepseek four")


def test_exact_bfloat16_shards_keep_their_low_halves(launch, command, folder):
    paths = [folder / "exact one", folder / "exact two"]
    launch.to_the_end(command(paths[0], 5, 2, "--dtype", "bfloat16"), 1)
    launch.to_the_end(command(paths[1], 5, 1, "--dtype", "bfloat16", "--fsdp", "all"))
    one, two = (load_file(path / "model/model.safetensors") for path in paths)
    for name, weight in two.items():
        assert weight.dtype == torch.float32
        assert torch.allclose(one[name], weight, rtol=0, atol=0.02), name
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(two[name], two[name].bfloat16().float())


def test_bfloat16_is_computed_with_float32_shards(launch, command, folder):
    paths = [folder / "bf16 one", folder / "bf16 two"]
    launch.to_the_end(command(paths[0], 5, 2, "--bf16"), 1)
    launch.to_the_end(command(paths[1], 5, 1, "--bf16", "--fsdp", "all"))
    losses = [[entry["loss"] for entry in entries(path)] for path in paths]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    one, two = (load_file(path / "model/model.safetensors") for path in paths)
    for name, weight in two.items():
        assert torch.allclose(one[name], weight, rtol=0, atol=0.02), name
        is_rounded = torch.equal(weight, weight.bfloat16().float())
        assert weight.dim() == 1 or not is_rounded, name


def test_accelerate_launch(launch, command, folder):
    """The same bits as under torchrun."""
    launch.to_the_end(command(folder / "launched", 5, 1, "--fsdp", "all"))
    launcher = "accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2"
    further = "--num_machines 1 --mixed_precision no --dynamo_backend no -m molf"
    given = [*launcher.split(), *further.split()]
    given += command(folder / "accelerated", 5, 1, "--fsdp", "all")
    ended = subprocess.run([sys.executable, "-m", *given], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert_same_runs(folder / "launched", folder / "accelerated")


@pytest.mark.parametrize("method", ["lora", "molf-e"])
def test_float32_factors_beside_frozen_bfloat16_shards(launch, command, folder, method):
    paths = [folder / f"{method} low {count}" for count in (1, 2)]
    further = [*METHODS[method], "--dtype", "bfloat16"]
    launch.to_the_end(command(paths[0], 5, 2, *further), 1)
    launch.to_the_end(command(paths[1], 5, 1, *further, "--fsdp", "all"))
    one, two = (load_file(path / "adapter/adapter_model.safetensors") for path in paths)
    for name, weight in two.items():
        assert weight.dtype == torch.float32
        assert torch.allclose(one[name], weight, rtol=0, atol=0.02), name


def test_four_processes_are_resumed_in_three_two_and_one(launch, command, folder, one):
    path = folder / "four"
    ended = launch(command(path, 3, 1, "--fsdp", "2"), 4, at=(3, ("step", 3, signal.SIGTERM)))
    assert [process.code for process in ended] == [3] * 4
    again = ["train", "--output_dir", str(path), "--resume"]
    # 4 x 3 examples per step, then 3 x 2 x 2: one forward pass does not divide by 3.
    ended = launch(again, 3, at=(2, ("step", 2, signal.SIGTERM)))
    assert [process.code for process in ended] == [3] * 3
    assert "of 12 examples (2 x 2 x 3 processes)" in ended[0].errors
    ended = launch(again, 2, at=(0, ("step", 1, signal.SIGTERM)))
    assert [process.code for process in ended] == [3, 3]
    launch.to_the_end(again, 1)
    assert_near_runs(one, path)


@pytest.mark.parametrize("name", ["fft", "lora", "pissa", "adalora", "molf-e", "8bit"])
def test_methods_are_resumed_in_one_process(launch, command, folder, name):
    """Frozen weights have the same checksums; copies of the state in the background."""
    further = [*METHODS[name], "--async_save"]
    one, path = folder / f"{name} whole", folder / f"{name} stopped"
    launch.to_the_end(command(one, 5, 2, *further), 1)
    given = command(path, 5, 1, *further, "--fsdp", "all")
    ended = launch(given, at=(1, ("step", 3, signal.SIGTERM)))
    assert [process.code for process in ended] == [3, 3]
    launch.to_the_end(["train", "--output_dir", str(path), "--resume"], 1)
    assert_near_runs(one, path)


def test_types_of_trained_parameters_are_refused(launch, command, folder):
    path = folder / "refused"
    further = ["--fsdp", "all", "--dtype", "bfloat16", "--lora_dropout", "0.1"]
    ended = launch(command(path, 5, 1, *further))
    assert [process.code for process in ended] == [2, 2]
    assert "Invalid fsdp with dtype=bfloat16: fully_shard needs one type" in ended[0].errors
    assert "the LoRA factors in float32. Give --dtype float32." in ended[0].errors
    assert not path.exists()


def test_one_process_is_resumed_in_four(launch, command, folder, one):
    path = folder / "one to four"
    (ended,) = launch(command(path, 3, 4), 1, at=(0, ("step", 3, signal.SIGTERM)))
    assert ended.code == 3
    launch.to_the_end(["train", "--output_dir", str(path), "--resume", "--fsdp", "2"], 4)
    assert_near_runs(one, path)
    steps = [json.loads(line)["step"] for line in (path / "metrics.jsonl").open()]
    assert steps == list(range(1, STEPS + 1))
