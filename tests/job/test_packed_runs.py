"""Runs with packing, without padding and by length: the same training, resumed to the same bits."""

import json
import re
from datetime import datetime

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from core_helpers import assert_same_bits
from molf.cli import main
from molf.data.encoding import EncodedSamples
from molf.job.methods import TrainingData
from molf.job.settings.resolved import resolve
from molf.job.settings.settings import TrainSettings
from molf.job.trainer.split_data import FilledSampler, LengthGroups, training_set
from molf.job.trainer.trainer import Trainer
from near_runs import assert_near_runs, entries, facts_command
from resumed_runs import row_of
from slow_cases import slow_after
from tiny_models import byte_level_tokenizer

PACKED = ["--packing", "--max_length", "40"]
GROUPED = ["--train_sampling_strategy", "group_by_length"]


@pytest.fixture(scope="module")
def whole_epochs(command, folder):
    """A run whose steps have all 12 examples, padded to one batch."""
    path = folder / "whole epochs"
    assert main(command(path, 12, 1)) == 0
    return path


def record_of(path):
    return yaml.safe_load((path / "config.yaml").read_text())


def test_packed_run_equals_the_padded_one(command, folder, whole_epochs, tmp_path, capsys):
    """Loss, gradient norm, tokens, winners and weights of steps with the same examples."""
    path = tmp_path / "packed"
    assert main(command(path, 9, 1, *PACKED)) == 0
    assert_near_runs(whole_epochs, path)
    shown = capsys.readouterr().err
    data = record_of(path)["run"]["data"]
    rows = data["packed_rows"]
    assert data["examples"] == 12 > rows > 1
    assert f"12 examples of fact, packed into {rows} rows of at most 40 tokens (" in shown
    assert "8 of 9 packed rows (9 x 1), 8 epochs" in shown
    assert f"warning: Each step takes all examples: they are packed into {rows} rows" in shown
    assert record_of(path)["packing"] is True
    assert "packed_rows" not in record_of(whole_epochs)["run"]["data"]
    # The same in one forward pass for each row.
    path = tmp_path / "accumulated"
    assert main(command(path, 1, rows, *PACKED, "--gradient_checkpointing")) == 0
    assert_near_runs(whole_epochs, path)


def test_padding_free_run_equals_the_padded_one(command, tmp_path, capsys):
    """The same examples in the same steps, with a shorter last step in each epoch."""
    paths = [tmp_path / name for name in ("padded", "joined")]
    for path, further in zip(paths, ([], ["--padding_free"]), strict=True):
        assert main(command(path, 5, 2, *further)) == 0
    assert_near_runs(*paths)
    assert "8 of 10 examples (5 x 2, padding-free), 4 epochs" in capsys.readouterr().err


@pytest.fixture(scope="module")
def records(folder):
    path = folder / "records.jsonl"
    lines = [{"prompt": f"{n} and " * (n % 7 + 1), "completion": f" {2 * n}"} for n in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def resumable(folder, records):
    """A training of 6 steps in 2 epochs, with dropout, evaluations and early stopping."""
    base = write_checkpoint(folder / "dropping", attention_dropout=0.1)
    byte_level_tokenizer(pad=False).save_pretrained(base)  # EOS is the padding token then

    def build(path, size, *further):
        return [
            *("train", "--task", "custom", "--model", str(base), "--data", str(records)),
            *("--forgetting_data", str(folder / "plain.txt"), "--max_eval_samples", "3"),
            *("--ranks", "4", "--alpha", "4", "--logging_steps", "1", "--num_train_epochs", "2"),
            *("--learning_rate", "1e-2", "--lora_learning_rate", "3e-2"),
            *("--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", "2"),
            *("--eval_steps", "2", "--early_stopping_patience", "9", "--save_steps", "1"),
            *("--output_dir", str(path), *further),
        ]

    return build


@pytest.mark.parametrize(
    ("size", "further"),
    slow_after(1, [(1, ["--packing", "--max_length", "80"]), (4, GROUPED)]),
    ids=["packed", "by length"],
)
def test_resumed_run_has_the_same_bits(resumable, size, further, tmp_path, monkeypatch, capsys):
    """Stopped by a fault in the second epoch."""
    whole, path = tmp_path / "whole", tmp_path / "resumed"
    assert main(resumable(whole, size, *further)) == 0
    logged = [entry for entry in entries(whole) if "loss" in entry]
    assert logged[-1]["epoch"] == 2
    assert row_of(whole)["tokens"] == str(int(logged[-1]["num_tokens"]))
    fault = 2 * len(logged) - 2  # before the last step
    step, calls = Trainer.training_step, []

    def failing(self, *given, **named):
        calls.append(self)
        if len(calls) == fault:
            raise RuntimeError("a fault")
        return step(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", failing)
        assert main(resumable(path, size, *further)) == 1
    assert main(["train", "--output_dir", str(path), "--resume"]) == 0
    assert f"Resuming {path} from checkpoint-{len(logged) - 2}." in capsys.readouterr().err
    for name in ("loss", "grad_norm", "eval_loss", "num_tokens", "num_input_tokens_seen"):
        found = [[entry.get(name) for entry in entries(one)] for one in (whole, path)]
        assert found[0] == found[1], name
    weights = [load_file(one / "model/model.safetensors") for one in (whole, path)]
    assert_same_bits(*weights)


def test_order_by_length_is_that_of_seed_and_epoch():
    lengths = [n % 13 + 1 for n in range(100)]
    orders = []
    for _ in range(2):
        groups = FilledSampler(100, 8, LengthGroups(lengths, 8, 1))
        torch.manual_seed(len(orders))  # another state of the global generator
        for epoch in (0, 1):
            groups.set_epoch(epoch)
            orders.append(list(groups))
    assert orders[:2] == orders[2:]
    assert orders[0] != orders[1]
    assert orders[0][100:] == [100] * 4  # blank rows
    assert sorted(orders[0][:100]) == list(range(100))
    spread = [
        max(steps) - min(steps)
        for start in range(0, 96, 8)
        for steps in [[lengths[i] for i in orders[0][start : start + 8]]]
    ]
    assert sum(spread) / len(spread) < 6  # of 12 in a random order


def test_rows_of_packed_examples_and_the_blank_one():
    samples = EncodedSamples([[1, 2], [3], [4, 5, 6]], [[-100, 2], [3], [-100, 5, 6]], [], 0, 3)
    rows = training_set(TrainingData(samples, 1, [[2, 1], [0]]), with_blank_row=True)
    assert isinstance(rows, Dataset)
    assert rows[0] == {
        "input_ids": [4, 5, 6, 3],
        "labels": [-100, 5, 6, 3],
        "seq_lengths": [3, 1],
    }
    assert rows[1:]["seq_lengths"] == [[2], [2]]
    assert rows[2]["labels"] == [-100, -100]


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["--packing", *GROUPED], "train_sampling_strategy=group_by_length with packing: rows"),
        (["--padding_free", *GROUPED], "group_by_length with padding_free: rows"),
        (
            ["--packing", "--training_args.neftune_noise_alpha", "5"],
            "neftune_noise_alpha=5 with packing: its noise depends on the length of a row",
        ),
        (["--padding_free", "--training_args.pad_to_multiple_of", "8"], "there is no padding"),
        (["--train_sampling_strategy", "batch_rebalance"], '"sequential", "group_by_length"'),
        (["--training_args.eval_packing", "true"], "examples are never packed in evaluation"),
    ],
)
def test_refusals(command, further, said, tmp_path, capsys):
    path = tmp_path / "run"
    assert main(command(path, 2, 1, *further)) == 2
    error = capsys.readouterr().err.splitlines()
    assert said in error[-1]
    assert not path.exists()


def test_model_that_mixes_examples_is_refused(folder, tmp_path, capsys):
    from transformers import BloomConfig, BloomForCausalLM

    base = tmp_path / "bloom"
    config = BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4, eos_token_id=0)
    BloomForCausalLM(config).save_pretrained(base)
    byte_level_tokenizer().save_pretrained(base)
    path = tmp_path / "run"
    assert main(facts_command(folder, base)(path, 2, 1, *PACKED)) == 2
    assert (
        f"model {base}: in BloomForCausalLM, joined examples change each other's loss. Train it "
        "without packing and padding_free" in capsys.readouterr().err.splitlines()[-1]
    )
    assert not path.exists()


@pytest.mark.slow
def test_dry_run_takes_the_fullest_rows(command, tmp_path, capsys):
    path = tmp_path / "run"
    assert main(command(path, 3, 1, *PACKED, "--dry_run")) == 0
    packed = capsys.readouterr().out
    assert "12 of 12 examples tokenized" in packed
    assert ", packed into " in packed
    assert "MiB at most, 3 x 3" in packed
    assert "tokens, in one row" in packed
    assert "per step with the longest packed rows" in packed
    ratio = re.search(r"planned .* \((.*) of the measured", packed)
    assert 0.95 < float(ratio[1]) < 1.05
    assert not path.exists()


def test_warning_of_padding_free_without_effect():
    given = {"model": "x", "padding_free": True, "per_device_train_batch_size": 1}
    with pytest.warns(UserWarning, match="per_device_train_batch_size=1: padding_free"):
        resolve(TrainSettings(**given), datetime.now())


@pytest.mark.parametrize(
    ("given", "size", "passes"),
    [
        ({}, 8, 4),
        ({"packing": True}, 1, 32),
        ({"packing": True, "gradient_accumulation_steps": 6}, 1, 6),
        ({"packing": True, "per_device_train_batch_size": 2}, 2, 4),
        ({"padding_free": True}, 8, 4),
    ],
)
def test_a_pass_has_one_packed_row_by_default(given, size, passes):
    settings = resolve(TrainSettings(task="custom", model="x", **given), datetime.now())
    found = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    assert found == (size, passes)


def test_steps_in_the_backward_pass_take_several_packed_rows():
    given = {"model": "x", "task": "custom", "packing": True, "optimizer_in_backward": True}
    with pytest.warns(UserWarning, match="a step has 8 packed rows instead of 32"):
        settings = resolve(TrainSettings(**given), datetime.now())
    assert settings.per_device_train_batch_size == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "further", [PACKED, [*PACKED, "--fsdp", "all"], ["--padding_free"], GROUPED]
)
def test_two_processes_train_as_one(launch, command, folder, further, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [name for name in further if name not in ("--fsdp", "all")]
    launch.to_the_end(command(one, 2, 2, *alone), 1)
    launch.to_the_end(command(two, 2, 1, *further))
    assert_near_runs(one, two)
