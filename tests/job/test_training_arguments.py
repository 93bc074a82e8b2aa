"""`--training_args` and `--report_to`, answered from the source of TRL and transformers."""

from dataclasses import fields

import pytest

from molf.errors import InputError
from molf.job.settings import training_arguments
from molf.job.settings.declared_fields import sft_config_fields
from molf.job.settings.training_arguments import check_trackers, check_training_args


def test_the_source_declares_the_fields_of_the_class():
    from trl import SFTConfig

    assert set(sft_config_fields()) == {field.name for field in fields(SFTConfig) if field.init}


def test_types_are_those_of_the_annotations():
    declared = sft_config_fields()
    assert declared["dataloader_num_workers"] == {"int"}
    assert declared["neftune_noise_alpha"] == {"float", "None"}
    assert declared["logging_first_step"] == {"bool"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("datloader_drop_last", "true", "Did you mean dataloader_drop_last?"),
        ("learning_rat", "1", "Did you mean --learning_rate?"),
        ("warmup_ration", "0.1", "Did you mean --warmup_ratio?"),
        ("zzz", "1", "no argument of TRL's SFTConfig."),
        ("dataloader_num_workers", "many", "must be a whole number"),
        ("dataloader_num_workers", "1.5", "must be a whole number"),
        ("dataloader_num_workers", "9" * 30, "must be below 2**63"),
        ("dataloader_num_workers", "1000000", "must be from 0 to"),
        ("dataloader_num_workers", "-1", "must be from 0 to"),
        ("label_smoothing_factor", "much", "must be a number"),
        ("neftune_noise_alpha", "nan", "must be finite"),
        ("tf32", "maybe", "must be true or false"),
        ("lr_scheduler_kwargs", "{a: 1}", "is not JSON"),
        ("lr_scheduler_kwargs", '{"a":' * 9000, "is not JSON"),
    ],
)
def test_refused(name, value, words):
    with pytest.raises(InputError, match=f"training_args.{name}") as raised:
        check_training_args({name: value})
    assert words in str(raised.value)


@pytest.mark.parametrize("name", ["run_name", "ddp_backend", "project"])
@pytest.mark.parametrize(
    "value", ["https://h.org/a?sig=SECRET", "ghp_" + "a1B2" * 9, "https://me:SECRET@h.org"]
)
def test_secrets_are_refused_without_torch(name, value):
    with pytest.raises(InputError, match=f"training_args.{name} holds a secret"):
        check_training_args({name: value})


def test_accepted():
    check_training_args(
        {
            "neftune_noise_alpha": "5",
            "dataloader_num_workers": "2",
            "tf32": "True",
            "dataloader_drop_last": "1",
            "lr_scheduler_kwargs": '{"num_cycles": 0.5}',
            "log_level": "error",
            "run_name": "",
        }
    )


def test_without_the_source_the_names_are_left_to_the_class(monkeypatch):
    monkeypatch.setattr(training_arguments, "sft_config_fields", dict)
    check_training_args({"zzz": "1"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "Did you mean tensorboard?"),
        ("nothing", "is no tracker of the trainer: azure_ml, "),
        ("clearml", "needs clearml, which is not installed"),
    ],
)
def test_trackers(monkeypatch, name, words):
    monkeypatch.setattr(training_arguments, "find_spec", lambda package: None)
    with pytest.raises(InputError) as raised:
        check_trackers((name,))
    assert f"report_to={name}" in str(raised.value)
    assert words in str(raised.value)


def test_trackers_of_another_environment():
    check_trackers(("none",))
    check_trackers(("all",))
    check_trackers(("wandb", "clearml"), must_be_installed=False)
