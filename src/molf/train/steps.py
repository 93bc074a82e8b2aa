"""How many optimizer steps a training has: the trainer counts them itself, before it begins.

Batches that are dropped, accumulation, fractions of epochs and further arguments all change the
number, and the schedule, AdaLoRA's ranks and the progress must end with the training. So a trainer
with the run's arguments and a model of nothing is started, asked, and stopped before its first
step.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig

from molf.errors import InputError
from molf.train.files import scratch_directory


class _CountedError(Exception):
    """Ends a training that was only counted."""


class _Counter(TrainerCallback):
    """Reads what the trainer has counted and stops it."""

    def __init__(self) -> None:
        self.steps = 0
        self.batches = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Nothing has been trained yet."""
        self.steps, self.batches = state.max_steps, len(train_dataloader)
        raise _CountedError


class StepsCheck(TrainerCallback):
    """Stops a training that would not end with the schedule that was made for it.

    Args:
        steps: As `count_steps` has counted them.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trainer has counted again, with the real model."""
        if state.max_steps != self._steps:
            raise RuntimeError(
                f"The trainer takes {state.max_steps} steps, and {self._steps} were counted "
                "beforehand."
            )


def count_steps(arguments: SFTConfig, samples: int) -> int:
    """Return the optimizer steps that the trainer will take; nothing is written.

    Args:
        arguments: The trainer's arguments.
        samples: How many examples there are.

    Raises:
        InputError: There is not a single batch.
    """
    counter = _Counter()
    with scratch_directory("steps") as scratch:
        trainer = Trainer(
            model=_model_of_nothing(),
            args=_without_effects(arguments, str(scratch)),
            train_dataset=Dataset.from_dict({"input_ids": [[0]] * samples}),
            callbacks=[counter],
        )
        trainer.remove_callback(PrinterCallback)
        # It collects garbage, which takes longer than all the rest.
        trainer.accelerator.free_memory = lambda *objects: None
        with suppress(_CountedError):
            trainer.train()
    if not counter.batches:
        raise InputError(
            f"The training has no step: training_args.dataloader_drop_last drops the only batch, "
            f"which has {samples} of {arguments.per_device_train_batch_size} examples. Leave it "
            "out, lower --per_device_train_batch_size, or give more data."
        )
    return counter.steps


def _without_effects(arguments: SFTConfig, directory: str) -> SFTConfig:
    """The arguments without what reaches beyond the trainer: none of it changes the steps."""
    arguments = copy.copy(arguments)
    # Trainers write to it.
    arguments.accelerator_config = copy.deepcopy(arguments.accelerator_config)
    arguments.output_dir = directory  # made by the trainer in any case
    arguments.report_to = []
    arguments.use_liger_kernel = False  # changes the classes of models
    arguments.torch_compile = False
    arguments.enable_jit_checkpoint = False  # answers signals
    arguments.full_determinism = False  # for the whole process
    return arguments


def _model_of_nothing() -> LlamaForCausalLM:
    """A model for the trainer to hold; it is never run."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1,
            hidden_size=2,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
