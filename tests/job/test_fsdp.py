"""`molf train --fsdp`: a model in shards over several processes (FSDP2), as in one process."""

from __future__ import annotations

import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from molf.checkpoint.store import complete_checkpoints
from molf.cli import main
from near_runs import assert_near_runs
from resumed_runs import assert_same_runs


@pytest.fixture(scope="module")
def two(launch, command, folder):
    path = folder / "two"
    return path, launch.to_the_end(command(path, 5, 1, "--fsdp", "all"))


@pytest.mark.slow
def test_two_shards_train_as_one_process(one, two):
    path, (first, other) = two
    assert_near_runs(one, path, tolerance=1e-6)
    assert "float32, on cpu, in 2 shards\n" in first.errors
    assert (other.output, other.errors) == ("", "")


def rows_by_process(path):
    """Rows of the parts in which the checkpoint of the last step has each tensor of a state."""
    _, checkpoint = complete_checkpoints(path / "checkpoints")[-1]
    reader = dcp.FileSystemReader(checkpoint / "tensors")
    return {
        name: [tuple(chunk.sizes) for chunk in item.chunks]
        for name, item in reader.read_metadata().state_dict_metadata.items()
    }


def test_each_process_has_its_rows_of_weights_and_state(one, two):
    """Else a silent DDP would pass."""
    whole, parts = rows_by_process(one), rows_by_process(two[0])
    assert whole.keys() == parts.keys()
    weight = "model.model.layers.0.mlp.up_proj.weight"
    assert (whole[weight], parts[weight]) == ([(48, 32)], [(24, 32)] * 2)
    for name, (shape,) in whole.items():
        assert len(parts[name]) == 2, name
        cut = 1 if "lora_A" in name else 0  # the far factor: features
        assert sum(part[cut] for part in parts[name]) == shape[cut], name


def test_the_model_loads_with_transformers_alone(two):
    path, _ = two
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    stored = load_file(path / "model/model.safetensors")
    assert sorted(file.name for file in (path / "model").iterdir() if file.is_dir()) == []
    assert "lm_head.weight" not in stored  # tied
    own = dict(model.named_parameters())
    assert own.keys() == stored.keys()
    for name, weight in stored.items():
        assert torch.equal(own[name], weight), name


@pytest.mark.slow
def test_killed_shards_are_resumed_to_the_same_bits(launch, command, folder, two):
    path = folder / "killed"
    given = [*command(path, 5, 1, "--fsdp", "2"), "--resume"]
    first, other = launch(given, at=(1, ("step", 6)))
    assert (first.code, other.code) == (1, -signal.SIGKILL)
    first, _ = launch.to_the_end(given)
    assert f"Resuming {path} from checkpoint-4." in first.errors
    assert_same_runs(two[0], path)


@pytest.mark.slow
def test_shards_are_resumed_in_one_process_and_the_reverse(launch, command, folder, one):
    path = folder / "to one"
    ended = launch(command(path, 5, 1, "--fsdp", "all"), at=(1, ("step", 3, signal.SIGTERM)))
    assert [process.code for process in ended] == [3, 3]
    launch.to_the_end(["train", "--output_dir", str(path), "--resume"], 1)
    assert_near_runs(one, path)

    path = folder / "from one"
    (ended,) = launch(command(path, 5, 2), 1, at=(0, ("step", 3, signal.SIGTERM)))
    assert ended.code == 3
    launch.to_the_end(["train", "--output_dir", str(path), "--resume", "--fsdp", "all"])
    assert_near_runs(one, path)
    assert yaml.safe_load((path / "config.yaml").read_text())["fsdp"] == "all"


@pytest.mark.slow
def test_refusals_in_one_line_each(launch, command, folder, monkeypatch, capsys):
    path = folder / "new"
    for further, said in (
        (["--fsdp", "3"], "Invalid fsdp=3 with 2 processes: each replica of the model has 3. Must"),
        (["--fsdp", "1"], "Invalid fsdp=1. Must be a number of processes of at least 2, or all."),
        (["--state_offload"], "Invalid state_offload with fsdp=all: "),
        (["--kernels", "triton"], "Invalid kernels=triton with fsdp=all: "),
        (["--method", "lora", "--load_in_4bit"], "Invalid fsdp=all with load_in_4bit: the packed"),
    ):
        given = further if "--fsdp" in further else [*further, "--fsdp", "all"]
        ended = launch(command(path, 5, 1, *given))
        assert [process.code for process in ended] == [2, 2]
        assert said in ended[0].errors
        assert len(ended[0].errors.splitlines()) == 1
    (alone,) = launch(command(path, 5, 1, "--fsdp", "all"), 1)
    assert alone.code == 2
    assert "Invalid fsdp=all with one process. Start several (torchrun " in alone.errors
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(command(path, 5, 1)) == 2
    assert "molf: error: Invalid ACCELERATE_USE_FSDP=true (" in capsys.readouterr().err
    assert not path.exists()
