"""The command of the training that `molf probe` prints has the options that the probe was given."""

import copy
import pickle
import warnings
from dataclasses import fields
from pathlib import Path

import pytest

from molf.cli.advice.training import OF_THE_PROBE, training_command
from molf.cli.app import app, join_booleans, join_stdin
from molf.errors import InputError
from molf.job.settings.probe import ProbeSettings
from molf.job.settings.settings import TrainSettings

MED = {"task": "demo-med"}
MEASURED = {"eval_steps": 4}
SAVED = {"save_steps": 5}
# A value of each option, with others that it needs.
CARRIED = {
    "task": ("demo-forms", {}),
    "data": ("a.jsonl:2,-", {"task": "custom"}),
    "eval_data": ("-", {"task": "custom"}),
    "validation_data": ("b c.jsonl", {"task": "custom", **MEASURED}),
    "format": ("alpaca", {"task": "custom"}),
    "max_samples": (7, {}),
    "max_eval_samples": (8, {}),
    "few_shot": (2, MED),
    "eval_part": ("validation", MED),
    "validation_share": (0.2, MED),
    "label_noise": (0.3, MED),
    "max_length": (77, {}),
    "split_special_tokens": (True, {}),
    "dataset_num_proc": (2, {}),
    "token_cache": (Path("to kens"), {}),
    "model": ("-model", {}),
    "gradient_checkpointing": (True, {}),
    "bf16": (False, {}),
    "attn_implementation": ("eager", {}),
    "merge_base": ("original", {}),
    "lora_dropout": (0.0, {}),
    "use_dora": (True, {}),
    "state_offload": (True, {}),
    "kernels": ("triton", {}),
    "fsdp": ("all", {"optimizer_in_backward": False}),
    "fsdp_cpu_offload": (True, {"fsdp": 2, "optimizer_in_backward": False}),
    "learning_rate": (1e-7, {}),
    "lora_learning_rate": (3e-5, {}),
    "weight_decay": (0.0, {}),
    "lora_weight_decay": (0.5, {}),
    "num_train_epochs": (3.5, {}),
    "max_time": (5400.0, {}),
    "per_device_train_batch_size": (3, {}),
    "gradient_accumulation_steps": (5, {}),
    "packing": (True, {}),
    "padding_free": (True, {}),
    "train_sampling_strategy": ("group_by_length", {}),
    "warmup_ratio": (0.25, {}),
    "max_grad_norm": (0.5, {}),
    "nonfinite": ("skip", {}),
    "max_skipped_steps": (3, {"nonfinite": "skip"}),
    "adam_beta1": (0.8, {}),
    "adam_beta2": (0.95, {}),
    "adam_epsilon": (1e-6, {}),
    "seed": (0, {}),
    "eval_strategy": ("epoch", {}),
    "eval_steps": (6, {}),
    "keep_best": (True, MEASURED),
    "early_stopping_patience": (2, MEASURED),
    "per_device_eval_batch_size": (9, {}),
    "forgetting_data": ("text.txt", {}),
    "fallback_dir": (Path("elsewhere"), {}),
    "save_dtype": ("float16", {}),
    "save_rounding": ("nearest", {"save_dtype": "float16"}),
    "keep_low_halves": (True, {"save_dtype": "bfloat16"}),
    "logging_steps": (3, {}),
    "save_steps": (4, {}),
    "save_minutes": (2.5, {}),
    "save_total_limit": (3, SAVED),
    "async_save": (True, SAVED),
    "on_save_error": ("stop", {}),
    "report_to": (("wandb", "tensorboard"), {}),
    "training_args": ({"weight_decay": "0.1", "lr_scheduler_kwargs": '{"a": -1}'}, {}),
}
NAMES = [option.name for option in fields(TrainSettings)]


def command_of(**given):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Without effect in a probe")
        return training_command(vars(ProbeSettings(**given)), Path("a probe"))


def parsed(words):
    """The settings of `molf train` with these words."""
    assert words[:2] == ["molf", "train"]
    _, bound, _ = app.parse_args(
        join_stdin(join_booleans(words[1:])), exit_on_error=False, print_error=False
    )
    return bound.arguments["settings"]


REFUSED = ("load_in_4bit", "load_in_8bit")


@pytest.mark.parametrize("name", [x for x in NAMES if x not in (*OF_THE_PROBE, *REFUSED)])
def test_options_of_a_probe_belong_to_the_training(name):
    """A new option of TrainSettings needs a line above, or is named as the probe's own."""
    value, more = CARRIED[name]
    assert value != getattr(TrainSettings(), name)
    found = parsed(command_of(**{**more, name: value}))
    assert getattr(found, name) == value
    for other in set(NAMES) - {"method", "assignment", name}:
        expected = getattr(TrainSettings(), other)
        if other not in OF_THE_PROBE:
            expected = more.get(other, expected)
        assert getattr(found, other) == expected, other


def test_options_of_the_probe_alone():
    """The assignment has layers and ranks; the training has its own steps, storage and place."""
    assert not OF_THE_PROBE & CARRIED.keys()
    assert set(NAMES) >= OF_THE_PROBE
    words = command_of(
        ranks=(4, 8),
        alpha=(2.0,),
        use_rslora=False,
        score="gsnr",
        top_k=2,
        target_modules=("q_proj",),
        exclude_modules=("k_proj",),
        freeze_rest=True,
        dtype="float32",
        state_dtype="float32",
        optimizer_in_backward=False,
        grad_accumulation_dtype=None,
        max_steps=9,
        lr_scheduler_type="linear",
        output_dir=Path("there"),
        overwrite=True,
    )
    assert words == ["molf", "train", "--method", "hybrid", "--assignment", "a probe"]


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_no_probe_has(name):
    with pytest.raises(InputError, match=f"Invalid {name} with method=molf"):
        ProbeSettings(**{name: True})


def test_copies_of_the_options_have_what_was_given():
    with pytest.warns(UserWarning, match="Without effect in a probe"):
        settings = ProbeSettings(gradient_accumulation_steps=4)
    for made in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        assert made == settings
        assert vars(made) == vars(settings)
        assert vars(made)["gradient_accumulation_steps"] == 4
