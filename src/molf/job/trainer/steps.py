"""Count the optimizer steps of a training in advance, with the trainer's own code.

Dropped batches, accumulation, fractions of epochs and other arguments change the number, and the
schedule, AdaLoRA's ranks and the progress depend on it. So a trainer with the run's arguments and a
tiny model is started, and stopped before its first step.
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

from molf.disk.files import scratch_directory
from molf.errors import InputError
from molf.job.trainer.ending import Ending


class _CountedError(Exception):
    """Stops the trainer after its steps are counted."""


class _Counter(TrainerCallback):
    """Reads the trainer's step count, and stops it."""

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
        """Store the counts, and stop before the first step."""
        self.steps, self.batches = state.max_steps, len(train_dataloader)
        raise _CountedError


class AllStepsTakenError(Exception):
    """Ends a resumed training that has taken all steps; the trainer would take one more."""


class StepsCheck(TrainerCallback):
    """Stops a training whose number of steps differs from that of its schedule.

    Args:
        steps: The result of `count_steps`.
        ending: Whether a resumed training has ended before these.
    """

    def __init__(self, steps: int, ending: Ending) -> None:
        self._steps = steps
        self._ending = ending

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare with the trainer's count for the real model.

        Raises:
            AllStepsTakenError: A resumed training has no step left.
        """
        if state.max_steps != self._steps:
            raise RuntimeError(
                f"The trainer takes {state.max_steps} steps, and {self._steps} were counted "
                "beforehand."
            )
        if self._ending.is_at(state):
            raise AllStepsTakenError


def count_steps(arguments: SFTConfig, samples: int) -> int:
    """Return the number of optimizer steps that the trainer will take.

    Args:
        arguments: The trainer's arguments.
        samples: Number of examples.

    Raises:
        InputError: There is no batch.
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
        # Its garbage collection would take longer than the rest.
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
    """Return the arguments without side effects; these do not change the number of steps."""
    arguments = copy.copy(arguments)
    # Copied, because trainers change it.
    arguments.accelerator_config = copy.deepcopy(arguments.accelerator_config)
    arguments.output_dir = directory  # always created by the trainer
    arguments.report_to = []
    arguments.use_liger_kernel = False  # patches model classes
    # Its backend stays: accelerate keeps that of the first trainer with these arguments for the
    # next one. Nothing is compiled before the first step.
    arguments.torch_compile = False
    arguments.full_determinism = False  # set for the whole process
    return arguments


def _model_of_nothing() -> LlamaForCausalLM:
    """Return a tiny model for the trainer, which never runs it."""
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
