"""Open a training or a dry run: check settings and model, load it, encode, plan."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import set_seed
from trl import SFTConfig

from molf.core.model.linear_layers import matching_linears
from molf.core.model.quantised import Quantisation
from molf.data.encoding import EncodedSamples, Show
from molf.data.packing import pack
from molf.data.rows import lengths_of
from molf.data.samples import Sample
from molf.errors import InputError
from molf.job.attention import check_attention, set_attention
from molf.job.inputs import Inputs
from molf.job.loss_check import check_joined, check_loss
from molf.job.methods import Plan, TrainingData, assigned, check, plan
from molf.job.methods.storage import check_kernels
from molf.job.model.factors_memory import check_factors
from molf.job.model.loading import LoadedModel, load_skeleton
from molf.job.model.quantised import check_device, check_quantisation
from molf.job.model.room_needed import Needed
from molf.job.model.saved_tensors import Storing, default_dtype, dtype_name
from molf.job.model.saving_check import check_saving, storing_of
from molf.job.progress import Reporter
from molf.job.settings.defaults import MERGE_BASES
from molf.job.settings.resolved import ResolvedSettings
from molf.job.settings.sharding import not_quantised
from molf.job.shards import Sharding, check_shardable
from molf.job.trainer.encoder import Encoder
from molf.job.trainer.sft_config import sft_config
from molf.job.trainer.steps import count_steps
from molf.measure.causality import check_causal
from molf.measure.generate import padding_id
from molf.measure.inference import last_logits, length_limit
from molf.measure.padding import right_padding_counts
from molf.planning.reach import Reach, describe, find_reach
from molf.ranks import ALONE, ranks
from molf.shown import counted
from molf.tasks import Task

_TRIED_TOKENS = 256


@dataclass(kw_only=True)
class Opening:
    """A checked training with its model and data. Nothing was written for it yet.

    Attributes:
        settings: The settings, with all that follows from device and model.
        arguments: The trainer's arguments.
        base: The base model, which is trained in place.
        quantisation: The quantisation of the base in training; None for none.
        sharding: Processes that share the model; None if each has a whole one. With it, `base` has
            values in host memory of rank 0 alone.
        data: The examples, and the number of steps with these.
        validation: The encoded samples of the evaluations during the training; None without any.
        rows: The number of rows (examples, or packed ones) with all of the task's examples.
        steps: The number of steps with all of the task's examples.
        plan: The layers and parameters that the method will train.
        storing: Type and rounding of the saved model.
        room: Estimated bytes that the training will write.
        notes: Notes on the model for the user, one line each.
        asked: Options that the model has changed, with the values before, as plain values.
    """

    settings: ResolvedSettings
    arguments: SFTConfig
    base: LoadedModel
    quantisation: Quantisation | None
    sharding: Sharding | None
    data: TrainingData
    validation: EncodedSamples | None
    rows: int
    steps: int
    plan: Plan
    storing: Storing
    room: Needed
    notes: tuple[str, ...]
    asked: dict[str, Any] = field(default_factory=dict)


def open_training(
    settings: ResolvedSettings,
    task: Task,
    inputs: Inputs,
    reporter: Reporter,
    samples: Sequence[Sample] | None = None,
) -> Opening:
    """Check the settings on the device, load the model, encode the examples, and plan the training.

    Args:
        settings: The settings, without what follows from the model.
        task: The task with its records.
        inputs: Returns the base.
        reporter: Shows the progress.
        samples: A part of the task's training samples to open instead of all. The space on the
            disk is still that of the whole training.

    Raises:
        InputError: The model cannot be used or saved, or the settings or the examples do not fit
            it. Nothing was written.
    """
    samples = task.training_samples if samples is None else samples
    count = counted(len(samples), "example")
    with reporter.working(f"Loading {settings.model}, and tokenizing {count}") as show_state:

        def show(done: int, total: int) -> None:
            show_state(f"{done:,} of {total:,} tokenized")

        return _open(settings, task, inputs, samples, show)


def _open(
    settings: ResolvedSettings,
    task: Task,
    inputs: Inputs,
    samples: Sequence[Sample],
    show: Show,
) -> Opening:
    # Options and layers, before the model is loaded.
    arguments = sft_config(settings)
    device = arguments.device
    check_kernels(settings, device)
    set_seed(settings.seed)  # before random initialisation, such as that of adapters
    sharding = Sharding.of(settings, ranks(), device)
    settings, quantisation = _check_layers(settings, device)

    # The model and its examples.
    base = _load_base(settings, device, inputs, sharding)
    if sharding is not None:
        check_shardable(base.model, settings)
    max_length = length_limit(base.model, settings.max_length)
    encoder = Encoder(base, settings, max_length, show)
    # A part of the samples is that of a dry run, which writes nothing.
    encoded = encoder.training(samples, is_stored=samples is task.training_samples)
    validation = encoder.validation(task.validation_samples)
    encoder.check(encoded)
    if validation is not None:
        encoder.check(validation)

    # The modules that the text of an example reaches.
    if sharding is None:
        base.model.to(device)
    # Rank 0 alone has the values of a model in shards, on the CPU.
    processes = ALONE if sharding is None else sharding.ranks
    reach = processes.on_main(lambda: _try_example(base, encoded, settings, arguments, max_length))
    _check_reached(base.model, settings, reach)
    settings = replace(settings, unreached=reach.unreached, bypassed=reach.bypassed)

    # The steps, what they train, and the space for it.
    data = _training_data(arguments, encoded, settings, max_length)
    planned = plan(base.model, settings, data)
    rows, steps = _of_all(data, arguments, len(samples), len(task.training_samples))
    if settings.packing:
        _warn_of_few_rows(rows, settings)
    room = processes.on_main(
        lambda: check_saving(base, settings, planned, steps, task.evaluation_count)
    )
    found: dict[str, Any] = {
        "merge_base": _merge_base(settings, quantisation),
        "max_length": max_length,
        "save_dtype": settings.save_dtype or dtype_name(default_dtype(base)),
    }
    asked = {name: getattr(settings, name) for name in found}
    return Opening(
        settings=replace(settings, bf16=arguments.bf16, **found),
        arguments=arguments,
        base=base,
        quantisation=quantisation,
        sharding=sharding,
        data=data,
        validation=validation,
        rows=rows,
        steps=steps,
        plan=planned,
        storing=storing_of(base, settings),  # of the user's `save_dtype`
        room=room,
        notes=_notes(settings, base, reach, encoded),
        asked={name: value for name, value in asked.items() if value != found[name]},
    )


def _training_data(
    arguments: SFTConfig, encoded: EncodedSamples, settings: ResolvedSettings, max_length: int
) -> TrainingData:
    """Return the examples, packed if the settings ask for it, and the number of their steps."""
    packed = pack(encoded.lengths(), max_length) if settings.packing else None
    data = TrainingData(encoded, 0, packed)
    return replace(data, steps=count_steps(arguments, data.rows))


def _of_all(data: TrainingData, arguments: SFTConfig, opened: int, every: int) -> tuple[int, int]:
    """Return the numbers of rows and of steps with every example, from those of the opened ones."""
    if opened == every:
        return data.rows, data.steps
    rows = max(1, round(every * data.rows / opened))
    return rows, count_steps(arguments, rows)


def _notes(
    settings: ResolvedSettings, base: LoadedModel, reach: Reach, encoded: EncodedSamples
) -> tuple[str, ...]:
    notes = (
        None if settings.assigned is None else f"Assignment: {settings.reached_assignment}.",
        describe(base.model, reach, in_adapter=settings.has_adapter),
        base.unused_tensors.describe(),
        encoded.source,
    )
    return tuple(filter(None, notes))


def _warn_of_few_rows(rows: int, settings: ResolvedSettings) -> None:
    """Warn if one step takes all packed rows, which are far fewer than the examples."""
    size, passes = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    step = size * passes * ranks().count
    if rows < step:
        warnings.warn(
            f"Each step takes all examples: they are packed into {counted(rows, 'row')}, and a "
            f"step has up to {step}. Give a smaller --gradient_accumulation_steps for more steps.",
            stacklevel=3,
        )


def _check_layers(
    settings: ResolvedSettings, device: torch.device
) -> tuple[ResolvedSettings, Quantisation | None]:
    """Check on the configuration alone.

    Returns:
        The settings with the assignment of the layers, if the method has one, and the quantisation
        of the base in training.
    """
    # The configuration gives the layers, so that wrong patterns fail before a download.
    skeleton = load_skeleton(settings.model)
    quantisation = check_quantisation(skeleton.config, settings)
    if settings.fsdp is not None and quantisation is not None:
        raise not_quantised(settings.fsdp, f"model {settings.model} (quantised: {quantisation})")
    check_device(quantisation, device)
    check_attention(settings, skeleton, device)
    settings = assigned(settings, skeleton)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Rank .* exceeds the smaller side")  # see `plan`
        check_factors(skeleton, settings, device)
        check(skeleton, settings)
    return settings, quantisation


def _load_base(
    settings: ResolvedSettings, device: torch.device, inputs: Inputs, sharding: Sharding | None
) -> LoadedModel:
    """Return the base model in host memory."""
    dtype = getattr(torch, settings.dtype)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # loading and a copy must give the same training
        if sharding is None:
            base = inputs.base(settings.model, dtype)
        else:
            base = sharding.load(inputs.base, settings.model, dtype)
    set_attention(base.model, settings.attn_implementation, settings.model)
    if settings.split_special_tokens:  # if False, the tokenizer's own setting stays
        base.tokenizer.split_special_tokens = True
    return base


def _merge_base(settings: ResolvedSettings, quantisation: Quantisation | None) -> str | None:
    """Return the base that the adapter is merged into; None if the base is not quantised."""
    return None if quantisation is None else settings.merge_base or MERGE_BASES[0]


def _try_example(
    base: LoadedModel,
    encoded: EncodedSamples,
    settings: ResolvedSettings,
    arguments: SFTConfig,
    max_length: int,
) -> Reach:
    """Return the modules that an example does not reach, and check the loss of a batch.

    Raises:
        InputError: The model cannot be trained on text, or not in such batches.
    """
    reach = _reach(base, encoded, settings.model, arguments.router_aux_loss_coef)
    if settings.joins_examples:
        most = settings.per_device_train_batch_size * max_length
        check_joined(settings.model, base.model, padding_id(base.tokenizer), most)
    else:
        _check_padding(base, encoded, settings)
    return reach


def _reach(
    base: LoadedModel, encoded: EncodedSamples, model: str, router_coefficient: float | None
) -> Reach:
    """Run the beginning of the longest example, and return the modules it does not reach.

    Raises:
        InputError: The model needs more than text, or TRL's trainer does not support it.
    """
    lengths = lengths_of(encoded.tokenized)
    longest = encoded.tokenized[lengths.index(max(lengths))][:_TRIED_TOKENS]
    pad = padding_id(base.tokenizer)
    devices = [base.model.device] if base.model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):  # a model in training mode may use random numbers
            reach = find_reach(base.model, lambda: last_logits(base.model, [longest], pad, keep=1))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # without their other inputs, models raise errors of many types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"model {model}: {type(base.model).__name__} fails on the text of an example: {reason}"
        ) from error
    check_loss(model, base.model, longest, pad, router_coefficient)
    check_causal(model, base.model, pad)
    return reach


def _check_reached(model: Any, settings: ResolvedSettings, reach: Reach) -> None:
    """Reject settings whose chosen layers are all left out of the training."""
    config = settings.method_config
    if config is None:
        return
    left_out = (*reach.unreached, *(reach.bypassed if settings.has_adapter else ()))
    chosen = matching_linears(model, config)
    if all(any(f"{name}.".startswith(f"{one}.") for one in left_out) for name in chosen):
        raise InputError(
            f"No text reaches the {len(chosen)} layers that the settings choose, such as "
            f"{next(iter(chosen))}: training would not move them. Choose others with "
            "--target_modules and --exclude_modules."
        )


def _check_padding(base: LoadedModel, encoded: EncodedSamples, settings: ResolvedSettings) -> None:
    """Reject batches whose padding would change the loss.

    Padding follows the text, so this concerns only models whose tokens depend on later ones.
    """
    lengths = set(lengths_of(encoded.tokenized))
    size = settings.per_device_train_batch_size
    if size == 1 or len(lengths) == 1:
        return
    if right_padding_counts(base.model, padding_id(base.tokenizer)):
        raise InputError(
            f"Invalid per_device_train_batch_size={size} with model {settings.model}: "
            f"{type(base.model).__name__} takes the padding after a text into account, so the loss "
            "would depend on the batch. Give --per_device_train_batch_size 1 and as many "
            "--gradient_accumulation_steps as a step has examples."
        )
