"""Print a plan: parameters, memory, devices, and changes that make it fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from molf.amounts import binary_size, decimal_size, duration
from molf.console import PlainConsole, new_table
from molf.planning.devices import DEVICES
from molf.shown import counted

if TYPE_CHECKING:  # both take seconds to import
    from molf.job.dry_run import DryRun
    from molf.planning.request import TrainingPlan
    from molf.planning.traffic import Traffic
    from molf.planning.workload import Workload


def print_plan(plan: TrainingPlan) -> None:
    """Print a plan to standard output."""
    console = PlainConsole()
    console.lines(*_header(plan))
    console.print(_parameters(plan))
    console.print(_memory(plan))
    if plan.traffic is not None:
        console.lines(*_traffic(plan.traffic, plan.workload))
    console.print(_devices(plan))
    console.lines(
        "GB are taken as GiB; usable: for tensors, after an allowance of 1 GiB and 5%.",
        *_saving(plan),
        *_advice(plan),
    )


def print_dry_run(result: DryRun) -> None:
    """Print the result of a dry run to standard output."""
    row = ", in one row" if result.joined else ""
    shape = f"{result.batch_size} x {result.length} tokens{row}"
    planned = "not known for this method"
    if result.planned is not None:
        ratio = result.planned / max(result.measured, 1)
        planned = f"{binary_size(result.planned)} ({ratio:.3f} of the measured)"
    unit = "example" if result.packed_rows is None else "packed row"
    packed = "" if result.packed_rows is None else f", packed into {result.packed_rows} rows"
    lines = [
        f"data      {result.tokenized} of {result.examples} examples tokenized, "
        f"{result.left_out} of them above {result.limit} tokens and left out{packed}",
        f"measured  {binary_size(result.measured)} at most, {shape} ({result.measured_of})",
        f"planned   {planned}",
    ]
    if result.planned_at_limit is not None and result.limit > result.length:
        lines.append(
            f"          {binary_size(result.planned_at_limit)} if {unit}s have {result.limit} "
            "tokens"
        )
    lines += [
        f"time      {duration(result.seconds)} per step with the longest {unit}s",
        f"          about {duration(result.estimated_seconds)} for "
        f"{counted(result.steps, 'step')}, by the {unit}s' lengths, without evaluations",
    ]
    PlainConsole().lines(*lines)


def _header(plan: TrainingPlan) -> list[str]:
    workload = plan.workload
    ranks = f" ranks {','.join(map(str, workload.config.ranks))}" if workload.config else ""
    return [
        f"{plan.model} ({plan.shape.model_type}), {workload.method}{ranks}",
        *([str(workload.assignment)] if workload.assignment else []),
        f"on {workload.device}: {workload.batch_size} x {workload.length} tokens per forward pass"
        f"{' in one row' if workload.joined else ''}"
        f"{', gradients accumulated' if workload.accumulates else ''}",
        ", ".join(_storage(workload)),
        "",
    ]


def _storage(workload: Workload) -> list[str]:
    """Return the storage and execution options in words."""
    words = [f"{workload.dtype} weights"]
    if workload.weight_rounding is not None:
        words.append(f"{workload.weight_rounding} rounding")
    if workload.quantised is not None:
        words.append(f"frozen {workload.quantised.removeprefix('load_in_')} base")
    if workload.state_dtype != "float32":
        words.append(f"{workload.state_dtype} states")
    if workload.grad_accumulation_dtype is not None:
        words.append(f"{workload.grad_accumulation_dtype} gradients")
    if workload.steps_in_backward:
        words.append("steps in the backward pass")
    if workload.offloads:
        words.append("state in host memory")
    return words + ["bfloat16 autocast"] * workload.bf16


def _parameters(plan: TrainingPlan) -> Table:
    shape = plan.shape
    table = new_table("Parameters", "", "total", "trained")
    for part in shape.parts:
        if part.parameters or part.name == "head":
            note = " (tied to the embeddings)" if part.name == "head" and shape.tied else ""
            table.add_row(part.name + note, f"{part.parameters:,}", f"{part.trained:,}")
    in_model = sum(part.trained for part in shape.parts)
    table.add_row("model", f"{shape.parameters:,}", f"{in_model:,}", end_section=True)
    for name, count in shape.experts.items():
        is_whole = name in ("all", "not routed", "rest") or plan.workload.assignment is not None
        where = "" if is_whole else f" in {shape.layers} layers"
        table.add_row(f"{name}{where}", "", f"{count:,}")
    table.add_row("trained in all", "", f"{shape.trained:,}")
    return table


def _memory(plan: TrainingPlan) -> Table:
    chosen = "with" if plan.workload.checkpointing else "without"
    table = new_table(f"Memory per device (requested: {chosen} checkpointing)", "", "", "")
    table.columns[1].header = "without checkpointing"
    table.columns[2].header = "with"
    plans = (plan.without_checkpointing, plan.with_checkpointing)

    def row(name: str, attribute: str, *, end: bool = False) -> None:
        sizes = [binary_size(getattr(memory, attribute)) for memory in plans]
        table.add_row(name, *sizes, end_section=end)

    is_on_host = plan.workload.cpu_offload
    if is_on_host:
        row("shards and step, in host memory", "host", end=True)
    else:
        row("weights", "weights")
        if plan.workload.offloads:
            row("optimizer state, in host memory", "host")
        else:
            row("moments", "moments")
            row("LoRA factors in the optimizer", "factors")
        if not plan.workload.steps_in_backward:
            row("gradients, all", "gradients", end=True)
    row("activations and temporaries at the peak", "activations")
    if not is_on_host:
        row("gradients by then", "pass_gradients")
    if plan.workload.devices > 1:
        row("whole weights and gradients of layers", "gathered")
    row("forward and backward, at most", "pass_peak", end=True)
    if not plan.workload.steps_in_backward:
        if not is_on_host:
            row("temporaries of the optimizer", "transient")
        if plan.workload.devices > 1:
            row("buffers of its collectives", "exchanged")
        row("optimizer step, at most", "step_peak", end=True)
    row("peak", "peak")
    return table


def _traffic(traffic: Traffic, workload: Workload) -> list[str]:
    """Return the division over several GPUs, the bytes that each sends, and the assumptions."""
    from molf.planning.traffic import FLOPS, SHARE  # imports torch

    nodes = f" on {workload.num_nodes} machines" if workload.num_nodes > 1 else ""
    passes = "1 forward pass" if workload.passes == 1 else f"{workload.passes} forward passes"
    replicas = traffic.gpus // traffic.shards
    groups = f" in {replicas} replicas of {traffic.shards}" if replicas > 1 else ""
    lines = [
        f"{traffic.gpus} GPUs{nodes}{groups}: fully_shard (FSDP2) divides weights, gradients and "
        "optimizer state; activations are those of each GPU's own batch; embeddings, head, two "
        "decoder layers and gradients of one are whole. Calculated, not measured.",
        f"Each GPU sends {decimal_size(traffic.fsdp)} per step for FSDP2 "
        f"({passes}; decoder layers are gathered twice in each, gradients reduced once).",
    ]
    if not traffic.optimizer:
        return lines
    sizes = [
        decimal_size(size) + ("" if name == "any" else f" if {name} wins everywhere")
        for name, size in traffic.optimizer.items()
    ]
    return [
        *lines,
        f"The optimizer's collectives add {', '.join(sizes)}. Below "
        f"{decimal_size(traffic.optimizer_speed)}/s per GPU they take more than {SHARE:.0%} of a "
        f"step; below {decimal_size(traffic.fsdp_speed)}/s FSDP2's take longer than the "
        "computation.",
        f"A step is taken as {traffic.seconds:.2g} s of computation: {FLOPS / 1e12:.0f} TFLOP/s "
        "per GPU, 2 operations per parameter, token and product, without attention. FSDP2's "
        "traffic runs beside it, the optimizer's after it."
        + (" Copies and the step on the host are not in it." if workload.cpu_offload else ""),
    ]


def _devices(plan: TrainingPlan) -> Table:
    table = new_table("Does it fit?", "GPU", "usable", "")
    for device in DEVICES:
        short = binary_size(plan.memory.peak - device.usable)
        fits = "fits" if device.fits(plan.memory.peak) else f"{short} short"
        table.add_row(device.name, binary_size(device.usable), fits)
    return table


def _saving(plan: TrainingPlan) -> list[str]:
    """Return the disk space and the pause of checkpoints."""
    saving = plan.saving
    if saving is None:
        return []
    disk = "all are kept" if saving.disk is None else f"{binary_size(saving.disk)} of disk at most"
    pause = f"{saving.pause_seconds:.2g} s of pause for each"
    how = "at 1 GB/s of disk and hashes"
    if saving.in_background:
        how = f"to copy the state, at 10 GB/s, into {binary_size(saving.nbytes)} of host memory"
    return ["", f"Checkpoints: {binary_size(saving.nbytes)} each, {disk}; about {pause}, {how}."]


def _advice(plan: TrainingPlan) -> list[str]:
    """Return the changes that make the plan fit each device that is too small, with their peaks."""
    lines: list[str] = []
    for device, found in plan.advice.items():
        lines += ["", f"To fit {device.name}{', any of' if len(found) > 1 else ''}:"]
        lines += [f"  {' '.join(s.changes)}  ->  {binary_size(s.peak)}" for s in found]
        if not found:
            lines.append("  no change that was tried suffices, alone or together")
    return lines
