"""The lines at the start of a training: model, data, trained parameters, steps and place."""

from __future__ import annotations

from statistics import median

from molf.amounts import decimal_size, duration
from molf.data.rows import lengths_of
from molf.job.opening import Opening
from molf.job.settings.batches import GROUP_BY_LENGTH
from molf.job.settings.defaults import ADAPTERS
from molf.job.settings.resolved import ResolvedSettings
from molf.shown import counted
from molf.tasks import Task


def overview(opening: Opening, task: Task, processes: int = 1) -> list[str]:
    """Return the lines, for a training that has been opened.

    Args:
        opening: The training.
        task: Its task.
        processes: Number of processes that train together.
    """
    settings = opening.settings
    return [
        f"model    {_model(opening)}",
        f"data     {_data(opening, task)}",
        f"method   {_method(opening)}",
        f"steps    {_steps(opening, processes)}",
        *([] if opening.validation is None else [f"eval     {_evaluations(opening)}"]),
        f"rates    {_rates(settings)}",
        f"run      {settings.output_dir}{_disk(opening)}",
    ]


def _model(opening: Opening) -> str:
    model, settings = opening.base.model, opening.settings
    parameters = sum(one.numel() for one in model.parameters())
    words = [f"{parameters:,} parameters", settings.dtype]
    if opening.quantisation is not None:
        words.append(f"quantised: {opening.quantisation}")
    if settings.bf16:
        words.append("bfloat16 autocast")
    kind = model.config.model_type
    return f"{settings.model} ({kind}): {', '.join(words)}, on {_device(opening)}{_shards(opening)}"


def _shards(opening: Opening) -> str:
    sharding = opening.sharding
    if sharding is None:
        return ""
    replicas = f"{sharding.replicas} replicas of " if sharding.replicas > 1 else ""
    return f", in {replicas}{sharding.count} shards"


def _device(opening: Opening) -> str:
    device = opening.arguments.device
    if device.type != "cuda":
        return str(device.type)
    import torch

    return f"{torch.cuda.get_device_name(device)} ({device})"


def _data(opening: Opening, task: Task) -> str:
    samples = opening.data.samples
    lengths = lengths_of(samples.tokenized)
    count = len(samples.input_ids)
    name = task.description().get("format")
    named = f" ({name})" if name else ""
    words = [f"{counted(count, 'example')} of {opening.settings.task}{named}"]
    if opening.data.packed is not None:
        rows, most = opening.data.rows, opening.settings.max_length
        words.append(
            f"packed into {counted(rows, 'row')} of at most {most:,} tokens "
            f"({sum(lengths) / (rows * most):.0%} filled)"
        )
    if samples.left_out:
        words.append(f"{samples.left_out:,} longer than {opening.settings.max_length} left out")
    of = "" if len(lengths) == count else f" in {len(lengths):,} of them"
    words.append(
        f"{min(lengths):,} to {max(lengths):,} tokens (median {median(lengths):,.0f}, at most "
        f"{opening.settings.max_length:,}){of}"
    )
    words.append(f"{counted(task.evaluation_count, 'record')} for evaluation")
    return ", ".join(words)


def _method(opening: Opening) -> str:
    settings, plan = opening.settings, opening.plan
    words = [settings.method]
    if settings.method in ("molf", "molf-e"):
        words.append(f"score {settings.score}")
    if settings.ranks and settings.method not in ("fft", "hybrid"):
        words.append("ranks " + ",".join(map(str, settings.ranks)))
    words.append(f"{plan.trained_parameters:,} trained parameters")
    if plan.layers:
        doing = "adapted" if settings.method in (*ADAPTERS, "hybrid") else "routed"
        words.append(f"{counted(len(plan.layers), 'layer')} {doing}")
    return ", ".join(words)


def _steps(opening: Opening, processes: int) -> str:
    settings, steps = opening.settings, opening.data.steps
    size, passes = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    batch = size * passes * processes
    split = f"{size} x {passes}" + (f" x {processes} processes" if processes > 1 else "")
    # The last step of an epoch may have fewer rows.
    rows, share = opening.data.rows, size * processes
    batches = rows // share if opening.arguments.dataloader_drop_last else -(-rows // share)
    epochs = steps / max(1, -(-batches // passes))
    shown = f"{epochs:.3g}" if epochs < 1000 else f"{epochs:,.0f}"
    shown += " epoch" if shown == "1" else " epochs"
    limit = "" if settings.max_time is None else f", at most {duration(settings.max_time)}"
    unit = "example" if opening.data.packed is None else "packed row"
    how = ", padding-free" if settings.padding_free else ""
    how += ", by length" if settings.train_sampling_strategy == GROUP_BY_LENGTH else ""
    return f"{steps:,} of {counted(batch, unit)} ({split}{how}), {shown}{limit}"


def _evaluations(opening: Opening) -> str:
    settings = opening.settings
    when = "epoch"
    if settings.eval_strategy == "steps":
        when = "step" if settings.eval_steps == 1 else f"{settings.eval_steps:,} steps"
    found = opening.validation
    assert found is not None
    count = counted(len(found.input_ids), "record")
    of = "of validation_data" if settings.validation_data else "set aside from the training data"
    if found.left_out:
        of += f" ({found.left_out:,} longer than {settings.max_length:,} left out)"
    # A step that is chosen by the evaluated records would make their figures too good.
    others = "eval_data" if settings.eval_data else "the records for evaluation"
    return f"loss every {when} on {count} {of}; {others} only before and after the training"


def _rates(settings: ResolvedSettings) -> str:
    words = []
    if settings.method not in (*ADAPTERS, "molf-e"):
        words.append(f"learning_rate {settings.learning_rate:g}")
    if settings.method != "fft":
        words.append(f"lora_learning_rate {settings.lora_learning_rate:g}")
    return f"{', '.join(words)}, {settings.lr_scheduler_type}"


def _disk(opening: Opening) -> str:
    room = opening.room
    if not (total := room.checkpoint + room.at_the_end):
        return ""
    return f" (about {decimal_size(total)} on the disk)"
