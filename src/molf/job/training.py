"""Train a model with TRL's SFTTrainer and the method's optimizer."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig

from molf.checkpoint.states import frozen_checksums
from molf.core.adamw import AdamW
from molf.core.model.quantised import quantisation_of
from molf.job.attention import set_attention
from molf.job.methods import Prepared, prepare
from molf.job.model.merging import merge_trained
from molf.job.model.quantised import Precision, load_quantised
from molf.job.model.saving import save_adapter
from molf.job.opening import Opening
from molf.job.progress import Reporter, ShowTraining
from molf.job.record.directory import RunDirectory
from molf.job.record.ownership import ADAPTER, CHECKPOINTS, METRICS, ROUTING
from molf.job.record.result import RunError, StoppedError
from molf.job.record.resumed_run import command_to_resume
from molf.job.record.routing_log import NoRoutingLog, RoutingWriter
from molf.job.record.routing_meaning import routing_meaning
from molf.job.record.wins import Wins
from molf.job.settings.defaults import ADAPTERS
from molf.job.settings.during import BY_LOSS, eval_strategy_of
from molf.job.settings.resolved import ResolvedSettings
from molf.job.shards import free_trained
from molf.job.trainer.best import Best
from molf.job.trainer.callbacks import (
    Clock,
    FidelityCallback,
    MetricsCallback,
    RandomByStep,
    RoutingCallback,
    unwrapped,
)
from molf.job.trainer.checkpoints import Checkpoints
from molf.job.trainer.ending import Ending, TimeLimit
from molf.job.trainer.result import Training
from molf.job.trainer.run_parts import RunParts
from molf.job.trainer.split_data import training_set
from molf.job.trainer.step_guard import StepGuard
from molf.job.trainer.steps import StepsCheck
from molf.job.trainer.stopping import StopRequest
from molf.job.trainer.tracking import Tracking, TrackingCallback
from molf.job.trainer.trainer import Trainer
from molf.job.trainer.validation import EarlyStopping, EvaluationCallback, Validation
from molf.measure import Evaluation
from molf.measure.generate import padding_id
from molf.ranks import ranks
from molf.shown import counted


def run_training(
    opening: Opening,
    directory: RunDirectory,
    reporter: Reporter,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint: Path | None = None,
    tracking: Tracking | None = None,
    before: Evaluation | None = None,
    *,
    keeps_model: bool = True,
) -> Training:
    """Train the opening's model on its samples, in place, and merge its adapter.

    A trained adapter is saved before the merge.

    Args:
        opening: The run's settings, model and data.
        directory: The run's directory.
        reporter: Shows the progress.
        callbacks: Added to the run's own.
        checkpoint: The checkpoint to continue from, whose hashes were checked; None starts from
            the beginning.
        tracking: Opened trackers; None for none.
        before: Metrics of the base, for the trackers.
        keeps_model: Save the adapter and merge it; False frees the trained model.

    Raises:
        ResumeError: The checkpoint is that of another model or other data.
        StoppedError: A signal stopped the training after a step; its checkpoint is written.
        DivergedError: A loss, a gradient or a trained weight is not finite.
        RunError: A checkpoint cannot be written, or a library has ended the training.
    """
    settings, steps = opening.settings, opening.data.steps
    ready = _ready(opening, reporter)
    stop, ending, best = StopRequest(), Ending(), Best()
    checkpoints = Checkpoints(settings, directory, opening.room, stop, ending, best)
    _warn_of_warmup(steps, opening.arguments)
    with (
        _routing_log(opening, directory) as writer,
        reporter.training(steps) as show,
        stop.listening() if settings.has_checkpoints else nullcontext(),
    ):
        evaluating = _evaluating(settings, best, ending)
        parts = RunParts(
            writer=writer,
            metrics=_metrics_log(settings, directory, show, ending),
            wins=Wins(ready.prepared.experts),
            guard=StepGuard(settings),
            ending=ending,
            best=best,
            callbacks=(*ready.prepared.callbacks, *evaluating),
            frozen=ready.frozen,
            data=opening.data,
        )
        if checkpoint is None:
            parts.clear_logs()
        own = [*evaluating, parts.metrics, *ready.prepared.callbacks, checkpoints, *callbacks]
        trainer = _trainer(opening, directory, ready, parts, checkpoints, own)
        if tracking is not None:
            _track(trainer, tracking, settings, before if checkpoint is None else None)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        seconds = ready.clock.seconds()
        checkpoints.finish()
    taken = trainer.state.global_step
    if stop.name is not None:
        raise StoppedError(_stopped(stop.name, taken, steps, checkpoints.latest, directory))
    if keeps_model and taken < steps and not ending.option:
        raise RunError(
            f"Training was ended after step {taken} of {steps} by a callback of a library."
        )
    if ending.option:
        reporter.say(f"Training ended after step {taken} of {steps}: {ending.reason}.")
    saved_step = _load_best(trainer, best, reporter) if settings.keep_best else taken
    parts.guard.check_weights(trainer.model, trainer.state)
    result = _result(trainer, settings, seconds, saved_step)
    if keeps_model:
        result.model, result.merge = _kept(opening, trainer, ready, directory, reporter)
    else:
        opening.base.model = None
    return result


@dataclass(frozen=True)
class _Ready:
    """A base that is ready for its training.

    Attributes:
        prepared: The model as the method trains it, on the device.
        whole: The whole model that it is made of; the same unless it is in shards.
        precision: The type of quantised layers during the training.
        frozen: Checksums of the frozen weights; empty without checkpoints.
        clock: Time of the preparation, and of the steps.
    """

    prepared: Prepared
    whole: Any
    precision: Precision
    frozen: dict[str, int]
    clock: Clock


def _ready(opening: Opening, reporter: Reporter) -> _Ready:
    """Prepare the base for the training, in place."""
    settings = opening.settings
    _quantise(opening, reporter)
    if settings.method in ADAPTERS:  # takes long for PiSSA and EVA
        reporter.say("Putting in the adapter")
    precision = Precision(opening.base.model, bf16=opening.arguments.bf16)
    started = time.perf_counter()
    prepared, whole = _prepared(opening)
    frozen = _frozen_checksums(opening, whole) if settings.has_checkpoints else {}
    if opening.sharding is not None:
        free_trained(whole)
    return _Ready(prepared, whole, precision, frozen, Clock(time.perf_counter() - started))


def _result(
    trainer: Trainer, settings: ResolvedSettings, seconds: float, saved_step: int
) -> Training:
    """Return the result of a training, still without its model."""
    parts, steps, config = trainer.parts, trainer.state.global_step, settings.method_config
    routing = parts.wins.summary()
    return Training(
        model=None,
        trained_parameters=trainer.prepared.trained_parameters,
        steps=steps,
        skipped_steps=parts.guard.skipped_steps,
        seconds=seconds,
        preparation_seconds=trainer.clock.preparation_seconds,
        tokens=trainer.state.num_input_tokens_seen,
        loss=parts.guard.mean_loss(),
        routing=routing,
        meaning=routing_meaning(routing, config, steps) if routing and config else "",
        merge={},
        checkpoints=trainer.checkpoints.totals,
        ended_by=parts.ending.option,
        planned_steps=parts.data.steps,
        validation=parts.best.record(saved_step),
    )


def _trainer(
    opening: Opening,
    directory: RunDirectory,
    ready: _Ready,
    parts: RunParts,
    checkpoints: Checkpoints,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """Return the trainer with the callbacks of every run, then the given ones."""
    settings, arguments, processes = opening.settings, opening.arguments, ranks()
    prepared, clock = ready.prepared, ready.clock
    arguments.output_dir = str(directory / CHECKPOINTS)  # created by the trainer
    trainer = Trainer(
        opening.base,
        prepared,
        parts,
        checkpoints,
        clock,
        _validation(opening),
        is_in_shards=opening.sharding is not None,
        model=prepared.model,
        args=arguments,
        train_dataset=training_set(opening.data, with_blank_row=processes.count > 1),
        processing_class=copy.deepcopy(opening.base.tokenizer),  # the trainer changes its padding
        optimizer_cls_and_kwargs=prepared.optimizer,
        callbacks=[
            TimeLimit(settings.max_time, clock, parts.ending),
            StepsCheck(opening.data.steps, parts.ending),
            *([RandomByStep(settings.seed, processes.rank)] if processes.count > 1 else ()),
            parts.guard,
            RoutingCallback(prepared, parts.writer, parts.wins),
            FidelityCallback(),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _metrics_log(
    settings: ResolvedSettings, directory: RunDirectory, show: ShowTraining, ending: Ending
) -> MetricsCallback:
    """Return the log of metrics, which rank 0 writes."""
    return MetricsCallback(
        (lambda: directory / METRICS) if ranks().is_main else None,
        show,
        ending.is_at,
        # Gradients freed in the backward pass would be logged with a norm of 0.
        without=("grad_norm",) if settings.optimizer_in_backward else (),
    )


def _track(
    trainer: Trainer, tracking: Tracking, settings: ResolvedSettings, before: Evaluation | None
) -> None:
    """Send the training to its trackers."""
    tracking.attach(trainer.callback_handler.callbacks)
    writer = trainer.parts.writer if trainer.prepared.experts else None
    # After transformers' callbacks, which begin their trackers' runs.
    trainer.add_callback(TrackingCallback(tracking, settings.as_options(), before, writer))


def _quantise(opening: Opening, reporter: Reporter) -> None:
    """Load the base again in 4 or 8 bits where the settings ask for it."""
    settings, base = opening.settings, opening.base
    if settings.quantised is None or quantisation_of(base.model.config) is not None:
        return
    reporter.say(f"Loading the base again ({settings.quantised}); it was measured without")
    base.model = None  # free memory for the quantised base
    # Layers that are trained in full are not quantised.
    full = settings.reached_assignment.full if settings.reached_assignment else ()
    base.model = load_quantised(
        settings.model,
        settings.quantised,
        opening.arguments.device,
        dtype=getattr(torch, settings.dtype),
        unquantised=[layer.name for layer in full],
    )
    set_attention(base.model, settings.attn_implementation, settings.model)


def _routing_log(opening: Opening, directory: RunDirectory) -> RoutingWriter | NoRoutingLog:
    """Return the log of the routing, which rank 0 writes."""
    if not ranks().is_main:
        return NoRoutingLog()
    shapes = {one.name: (one.out_features, one.in_features) for one in opening.plan.layers}
    return RoutingWriter(lambda: directory / ROUTING, shapes=shapes)


def _load_best(trainer: Trainer, best: Best, reporter: Reporter) -> int:
    """Load the weights of the best step, if another one is last; return the step of the weights."""
    last: int = trainer.state.global_step
    if best.step is None or best.step == last or not trainer.load_best(best.step):
        return last
    reporter.say(f"The model is that of step {best.step}, with the lowest loss {best.loss:.4f}.")
    return best.step


def _kept(
    opening: Opening,
    trainer: Trainer,
    ready: _Ready,
    directory: RunDirectory,
    reporter: Reporter,
) -> tuple[Any, dict[str, Any]]:
    """Save a trained adapter, and return the plain model and the record of the merge."""
    settings = opening.settings
    # Remove the trainer's autocast, which would affect the measurement of the merge.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    ready.precision.restore()
    if opening.sharding is not None:
        opening.sharding.gather(model, ready.whole, unwrapped(trainer.optimizer))
        model = ready.whole  # with values in rank 0 alone
    else:
        restore_float32(trainer.optimizer)
    if settings.state_offload and isinstance(model, PeftModel):
        model.to(opening.arguments.device)  # the merge needs base and adapter on one device
    if (save := ready.prepared.save_adapter) is not None:
        ranks().on_main(lambda: save_adapter(save, model, settings, directory / ADAPTER))
    return _merged(opening, model, reporter)


def _evaluating(
    settings: ResolvedSettings, best: Best, ending: Ending
) -> tuple[TrainerCallback, ...]:
    """Return the callbacks of evaluations and of early stopping that are asked for."""
    if eval_strategy_of(settings) == "no":
        return ()
    evaluating = EvaluationCallback(settings, best, ending)
    if settings.early_stopping_patience is None:
        return (evaluating,)
    return evaluating, EarlyStopping(settings, ending)


def _validation(opening: Opening) -> Validation | None:
    """Return the validation part; None without one."""
    if opening.validation is None:
        return None
    return Validation(
        opening.validation,
        padding_id(opening.base.tokenizer),
        opening.settings.per_device_eval_batch_size,
    )


def _prepared(opening: Opening) -> tuple[Prepared, Any]:
    """Return the model prepared for training, on the device, and the whole one that it is made of.

    Both are the same unless the model is in shards.
    """
    base, settings, sharding = opening.base.model, opening.settings, opening.sharding
    if sharding is None:
        prepared = prepare(base, settings, opening.data)
        return prepared, prepared.model
    prepared = sharding.change(lambda: prepare(base, settings, opening.data))
    cut = sharding.cut(prepared.model, bf16=bool(opening.arguments.bf16))
    prepared.attach(cut)
    return replace(prepared, model=cut), prepared.model


def _frozen_checksums(opening: Opening, whole: Any) -> dict[str, int]:
    """Return the checksums of the frozen weights; those of one process for any number of shards."""
    if opening.sharding is None:
        return frozen_checksums(whole)
    return opening.sharding.ranks.on_main(lambda: frozen_checksums(whole))


def _merged(opening: Opening, model: Any, reporter: Reporter) -> tuple[Any, dict[str, Any]]:
    """Return the plain model, of shards in rank 0 alone, and the record of the merge."""
    if opening.sharding is None:
        return merge_trained(model, opening.settings, opening.data, reporter)
    merged: list[Any] = [model]

    def merge() -> dict[str, Any]:
        merged[0], record = merge_trained(model, opening.settings, opening.data, reporter)
        return record

    record = opening.sharding.ranks.on_main(merge)
    return merged[0], record


def _stopped(
    signal: str, step: int, steps: int, latest: int | None, directory: RunDirectory
) -> str:
    """Return the line for a training that a signal has stopped."""
    line = f"{signal} after step {step} of {steps}"
    if latest is None:
        return f"{line}; no checkpoint could be written, so a resumed run starts anew."
    line += "" if latest == step else f"; the newest checkpoint is that of step {latest}"
    return f"{line}. {command_to_resume(directory.path)}"


def restore_float32(optimizer: Any) -> None:
    """Convert bfloat16 weights with low halves in the optimizer to exact float32."""
    optimizer = unwrapped(optimizer)
    if isinstance(optimizer, AdamW):
        optimizer.restore_float32()


def _warn_of_warmup(steps: int, arguments: SFTConfig) -> None:
    """Warn if the warm-up takes all steps."""
    # It starts at rate 0 and its share is rounded up: a run of one step would not train at all.
    without = ("constant", *BY_LOSS)
    if arguments.lr_scheduler_type not in without and arguments.get_warmup_steps(steps) >= steps:
        warnings.warn(
            f"The warm-up takes the whole training ({counted(steps, 'step')}) and starts at "
            "learning rate 0. Give --warmup_ratio 0 to train at the full rate from the start.",
            stacklevel=2,
        )
