"""One number of steps for progress, schedule, AdaLoRA and the record: the trainer's own."""

import json
from datetime import datetime
from types import SimpleNamespace

import pytest
import yaml

from molf.cli import main
from molf.job.settings.resolved import resolve
from molf.job.settings.settings import TrainSettings

EPOCHS = ["--num_train_epochs", "2", "--warmup_ratio", "0", "--lr_scheduler_type", "linear"]


def arguments_of(training_args=None, **given):
    from molf.job.trainer.sft_config import sft_config

    given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, **given}
    settings = TrainSettings(method="fft", training_args=training_args or {}, **given)
    return sft_config(resolve(settings, datetime.now()))


@pytest.mark.parametrize(
    ("given", "training_args", "steps"),
    [
        ({}, {}, 4),  # 4 batches, 2 steps an epoch
        ({}, {"dataloader_drop_last": "true"}, 2),  # 3 batches
        ({"num_train_epochs": 1.4}, {}, 3),
        ({"num_train_epochs": 0.1}, {}, 1),
        ({"max_steps": 7}, {"dataloader_drop_last": "true"}, 7),
        ({"gradient_accumulation_steps": 40}, {}, 2),
        ({"train_sampling_strategy": "group_by_length"}, {}, 4),
        ({}, {"accelerator_config": '{"split_batches": true}'}, 4),
        ({}, {"accelerator_config": '{"gradient_accumulation_kwargs": {"sync_each_batch": 1}}'}, 4),
        ({}, {"neftune_noise_alpha": "5", "torch_compile": "true", "full_determinism": "1"}, 4),
        ({"gradient_checkpointing": True}, {"dataloader_num_workers": "2"}, 4),
    ],
)
def test_steps_are_counted_by_the_trainer(given, training_args, steps, tmp_path, monkeypatch):
    from molf.job.trainer.steps import count_steps

    monkeypatch.chdir(tmp_path)
    arguments = arguments_of(training_args, **{"num_train_epochs": 2.0, **given})
    before = arguments.to_dict()
    assert count_steps(arguments, 29) == steps
    assert arguments.to_dict() == before, "the real trainer gets them as they were"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["fft", "adalora", "molf"])
def test_dropped_batches_leave_one_number_of_steps(method, options, tmp_path, capsys):
    """12 examples in batches of 5: 2 steps an epoch, not 3."""
    path = tmp_path / "run"
    arguments = options[: options.index("--max_steps")]
    arguments += [*EPOCHS, "--per_device_train_batch_size", "5", "--method", method]
    arguments += ["--training_args.dataloader_drop_last", "true"]
    assert main([*arguments, "--output_dir", str(path)]) == 0
    config = yaml.safe_load((path / "config.yaml").read_text())
    assert config["run"]["training"]["steps"] == 4
    entries = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    highest = entries[0]["learning_rate"]
    assert entries[-1]["learning_rate"] == pytest.approx(highest / 4)  # it would end at zero
    if method == "adalora":
        assert entries[-1]["mean_rank"] == 4  # the final one
    assert "step 4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--training_args.auto_find_batch_size", "true"], "auto_find_batch_size cannot be set"),
        (
            [
                "--training_args.accelerator_config",
                '{"gradient_accumulation_kwargs": {"num_steps": 4}}',
            ],
            "give --gradient_accumulation_steps",
        ),
        (["--training_args.lr_scheduler_kwargs", '{"last_epoch": 5}'], "lr_scheduler_kwargs"),
        (
            ["--training_args.dataloader_drop_last", "1", "--per_device_train_batch_size", "50"],
            "dataloader_drop_last drops the only batch, which has 12 of 50 examples",
        ),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_what_has_no_certain_number_of_steps_is_refused(
    given, words, dry, options, tmp_path, capsys
):
    path = tmp_path / "run"
    assert main([*options, *given, *(["--dry_run"] * dry), "--output_dir", str(path)]) == 2
    assert words in capsys.readouterr().err
    assert not path.exists()


def test_a_training_of_another_length_than_counted_is_stopped():
    from molf.job.trainer.ending import Ending
    from molf.job.trainer.steps import StepsCheck

    with pytest.raises(RuntimeError, match="takes 5 steps, and 4 were counted"):
        StepsCheck(4, Ending()).on_train_begin(None, SimpleNamespace(max_steps=5), None)
