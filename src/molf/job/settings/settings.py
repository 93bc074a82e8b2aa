"""Every option of `molf train`, declared once: type, default, help text, group and check.

The command line and the YAML recipes are made from these fields. `TrainSettings` holds the user's
values; `molf.job.settings.resolved` adds the defaults that depend on the method and the task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from molf.core.config import MoLFConfig
from molf.core.options import (
    GRADIENT_DTYPES,
    KERNELS,
    NONFINITE,
    ROUNDINGS,
    STATE_DTYPES,
    OptimizerOptions,
)
from molf.data.sources import OPTIONS as SOURCES
from molf.errors import InputError
from molf.inputs import check_choice
from molf.job.settings.batches import SAMPLING_STRATEGIES, check_batches
from molf.job.settings.converters import duration, numbers, patterns, words
from molf.job.settings.declared_fields import scheduler_names
from molf.job.settings.defaults import (
    ADAPTERS,
    COMMON,
    MATCHES,
    MERGE_BASES,
    METHODS,
)
from molf.job.settings.during import EVAL_STRATEGIES, check_during
from molf.job.settings.experts import method_config
from molf.job.settings.low_halves import check_low_halves
from molf.job.settings.optimizer_checks import check_optimizer
from molf.job.settings.quantised_base import check_beside_quantised
from molf.job.settings.ranges import (
    BELOW_2_31,
    BELOW_2_32,
    MOST_COUNTED,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    check_ranges,
)
from molf.job.settings.sharding import check_sharded
from molf.planning.workload import QUANTISATIONS
from molf.tasks import EVAL_PARTS, FORMATS, TASKS, VALIDATION_SHARE, TaskOptions, check_task

SCHEDULERS = scheduler_names()
DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
SAVE_ROUNDINGS = ("nearest", "stochastic")
SAVE_ERRORS = ("continue", "stop")
SAVE_MINUTES = 15.0

DATA = Group.create_ordered("Data")
MODEL = Group.create_ordered("Model")
METHOD = Group.create_ordered("Method")
OPTIMIZATION = Group.create_ordered("Optimization")
EVALUATION = Group.create_ordered("Evaluation")
OUTPUT = Group.create_ordered("Output")

_AUTO = "by method and task"
_COMMON = {
    name: Parameter(group=OPTIMIZATION, show_default=f"{value:g}; demo tasks have their own")
    for name, value in COMMON.items()
}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The options of a training run as the user gave them; None selects the default."""

    task: Annotated[str, Parameter(choices=TASKS, group=DATA)] = "demo-fact"
    """The task to train and to measure; custom: your own records."""
    data: Annotated[str | None, Parameter(group=DATA)] = None
    """Records to train on: a file, a folder, a URL, a Hub id, or - (stdin); several with commas."""
    eval_data: Annotated[str | None, Parameter(group=DATA)] = None
    """Records to evaluate on before and after; default: the task's own, or a tenth held out."""
    validation_data: Annotated[
        str | None, Parameter(group=DATA, show_default="a part of the training data")
    ] = None
    """Records to measure in the training (--eval_steps); no training record is set aside then."""
    format: Annotated[
        str | None, Parameter(choices=FORMATS, group=DATA, show_default="by the first record")
    ] = None
    """Format of the records of custom."""
    max_samples: Annotated[int | None, Parameter(group=DATA), POSITIVE] = None
    """Train on at most this many records, drawn by the seed."""
    max_eval_samples: Annotated[int | None, Parameter(group=DATA), POSITIVE] = None
    """Evaluate on at most this many records, drawn by the seed."""
    few_shot: Annotated[int, Parameter(group=DATA), NOT_NEGATIVE] = 0
    """Answered training questions before each question (sql, med, math, demo-sql, -forms, -med)."""
    eval_part: Annotated[str, Parameter(choices=EVAL_PARTS, group=DATA)] = "test"
    """test: measure the task's records; validation: a part of the training data instead."""
    validation_share: Annotated[
        float | None, Parameter(group=DATA, show_default=f"{VALIDATION_SHARE:g}")
    ] = None
    """Share of the training data in the validation part (fact: set aside from both parts)."""
    label_noise: Annotated[float, Parameter(group=DATA)] = 0.0
    """Share of the training records with a wrong answer, drawn by the seed (med, demo-med)."""
    max_length: Annotated[int, Parameter(group=DATA), POSITIVE, BELOW_2_31] = 1024
    """Longest example in tokens; longer ones are left out and counted, never cut."""
    split_special_tokens: Annotated[bool, Parameter(group=DATA)] = False
    """Treat control tokens in the records' texts (such as </s>) as plain text."""

    dataset_num_proc: Annotated[int | None, Parameter(group=DATA, show_default="1"), POSITIVE] = (
        None
    )
    """Processes that tokenize the examples; not used if the steps need few of the examples."""
    token_cache: Annotated[Path | None, Parameter(group=DATA, show_default="none")] = None
    """Folder that keeps the tokens of all examples for later runs with the same data and model."""

    model: Annotated[str | None, Parameter(group=MODEL)] = None
    """A local directory in transformers format, or a Hub id. Demo tasks have their own."""
    gradient_checkpointing: Annotated[bool, Parameter(group=MODEL)] = False
    """Recompute activations in the backward pass: slower, less memory."""
    bf16: Annotated[bool | None, Parameter(group=MODEL, show_default="where CUDA has it")] = None
    """bfloat16 autocast in training, with weights of any --dtype."""
    attn_implementation: Annotated[
        str | None, Parameter(choices=ATTENTIONS, group=MODEL, show_default="transformers' choice")
    ] = None
    """Attention of transformers, by name."""
    dtype: Annotated[str, Parameter(choices=WEIGHT_DTYPES, group=MODEL)] = "float32"
    """Type of the weights in training; bfloat16 takes half the memory for weights and gradients."""
    load_in_4bit: Annotated[bool, Parameter(group=MODEL, negative=())] = False
    """Train beside a frozen 4-bit base (bitsandbytes, NF4): molf-e, lora, lora+, eva, hybrid."""
    load_in_8bit: Annotated[bool, Parameter(group=MODEL, negative=())] = False
    """Train beside a frozen 8-bit base (bitsandbytes, LLM.int8); methods as with load_in_4bit."""
    merge_base: Annotated[
        str | None, Parameter(choices=MERGE_BASES, group=MODEL, show_default="dequantised")
    ] = None
    """Base of the merged model/: the dequantised weights, as in training, or the original ones."""

    method: Annotated[str, Parameter(choices=METHODS, group=METHOD)] = "molf"
    """fft: all weights; molf, molf-e: routed; hybrid: by assignment; others: a PEFT adapter."""
    assignment: Annotated[str | None, Parameter(group=METHOD)] = None
    """With hybrid: a YAML file, or a run (its assignment, or by the wins in its routing log)."""
    ranks: Annotated[
        tuple[int, ...] | None,
        Parameter(group=METHOD, converter=numbers(int), n_tokens=1, show_default=_AUTO),
    ] = None
    """Rank of each LoRA expert, separated by commas; an adapter has their sum."""
    match: Annotated[str, Parameter(choices=MATCHES, group=METHOD)] = "rank"
    """rank: an adapter has that of --ranks; parameters: as many parameters as LoRA of that rank."""
    alpha: Annotated[
        tuple[float, ...] | None,
        Parameter(group=METHOD, converter=numbers(float), n_tokens=1, show_default=_AUTO),
    ] = None
    """LoRA alpha: one number, or one per rank."""
    use_rslora: Annotated[bool | None, Parameter(group=METHOD, show_default="by method")] = None
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    lora_dropout: Annotated[float | None, Parameter(group=METHOD, show_default=_AUTO), SHARE] = None
    """Dropout before the LoRA factors. With molf, above 0 takes an adapter beside the weights."""
    loraplus_lr_ratio: Annotated[
        float | None, Parameter(group=METHOD, show_default="16"), POSITIVE
    ] = None
    """With lora+, the learning rate of B as a multiple of that of A (lora_learning_rate)."""
    use_dora: Annotated[bool, Parameter(group=METHOD, negative=())] = False
    """With hybrid, also train a magnitude per output of the adapted layers (DoRA)."""
    score: Annotated[str, Parameter(group=METHOD)] = "epd"
    """How molf scores experts: epd (the paper's), another score, or a control (docs/scores.md)."""
    top_k: Annotated[int, Parameter(group=METHOD)] = 1
    """Number of experts of a layer that are updated in each step."""
    target_modules: Annotated[
        str | tuple[str, ...], Parameter(group=METHOD, converter=patterns, n_tokens=1)
    ] = "all-linear"
    """Layers to adapt: all-linear, name endings separated by commas, or a regular expression."""
    exclude_modules: Annotated[
        str | tuple[str, ...],
        Parameter(group=METHOD, converter=patterns, n_tokens=1, show_default="lm_head"),
    ] = ("lm_head",)
    """Layers never to adapt: name endings separated by commas, or a regular expression."""
    freeze_rest: Annotated[
        bool | None,
        Parameter(group=METHOD, show_default="molf trains it, molf-e does not; by assignment"),
    ] = None
    """Freeze parameters that are not routed or assigned (norms, embeddings, biases)."""

    weight_rounding: Annotated[
        str | None, Parameter(choices=ROUNDINGS, group=OPTIMIZATION, show_default="exact")
    ] = None
    """Rounding of bfloat16 weights (fft, molf, hybrid): exact (as float32), stochastic, nearest."""
    state_dtype: Annotated[str, Parameter(choices=STATE_DTYPES, group=OPTIMIZATION)] = "float32"
    """Type of the moments of weights (fft, molf, hybrid): float32, or 8bit (needs torchao)."""
    grad_accumulation_dtype: Annotated[
        str | None,
        Parameter(choices=GRADIENT_DTYPES, group=OPTIMIZATION, show_default="that of the weights"),
    ] = None
    """float32: sum the gradients of bfloat16 weights without rounding (fft, molf, hybrid)."""
    optimizer_in_backward: Annotated[bool, Parameter(group=OPTIMIZATION)] = False
    """Update each layer in the backward pass, free its gradient; no clipping, no accumulation."""
    state_offload: Annotated[bool, Parameter(group=OPTIMIZATION)] = False
    """Keep the optimizer's state in host memory, on the GPU layer by layer (not run on one yet)."""
    kernels: Annotated[str, Parameter(choices=KERNELS, group=OPTIMIZATION)] = "eager"
    """triton: steps of fft, molf and hybrid by Triton kernels (CUDA; not run on a GPU yet)."""
    fsdp: Annotated[int | str | None, Parameter(group=OPTIMIZATION, show_default="DDP")] = None
    """Several processes: cut the model into N shards; all: one per process (FSDP2, HSDP)."""
    fsdp_cpu_offload: Annotated[bool, Parameter(group=OPTIMIZATION)] = False
    """Keep the shards and their state in host memory, and step there (CUDA; not run on one yet)."""
    learning_rate: Annotated[float | None, _COMMON["learning_rate"], POSITIVE] = None
    """Peak learning rate."""
    lora_learning_rate: Annotated[
        float | None,
        Parameter(group=OPTIMIZATION, show_default="learning_rate; demo tasks have their own"),
        NOT_NEGATIVE,
    ] = None
    """Peak learning rate of the LoRA factors."""
    weight_decay: Annotated[float, Parameter(group=OPTIMIZATION), NOT_NEGATIVE] = 0.1
    """Decoupled decay of dense weights; norms and biases have none."""
    lora_weight_decay: Annotated[float, Parameter(group=OPTIMIZATION), NOT_NEGATIVE] = 0.01
    """Decoupled decay of the LoRA factors."""
    num_train_epochs: Annotated[float | None, _COMMON["num_train_epochs"], POSITIVE, BELOW_2_31] = (
        None
    )
    """Passes over the data."""
    max_steps: Annotated[int | None, Parameter(group=OPTIMIZATION), POSITIVE] = None
    """Number of optimizer steps; overrides num_train_epochs."""
    max_time: Annotated[
        float | None, Parameter(group=OPTIMIZATION, converter=duration, n_tokens=1), POSITIVE
    ] = None
    """End the training after this time of its steps (90m, 2h, seconds), with a complete model."""
    per_device_train_batch_size: Annotated[
        int | None, _COMMON["per_device_train_batch_size"], POSITIVE, BELOW_2_31
    ] = None
    """Examples per forward pass; with packing: rows, 1 by default."""
    gradient_accumulation_steps: Annotated[
        int | None, _COMMON["gradient_accumulation_steps"], POSITIVE, BELOW_2_31
    ] = None
    """Forward passes per optimizer step."""
    packing: Annotated[bool, Parameter(group=OPTIMIZATION, negative=())] = False
    """Join whole examples into rows of at most max_length tokens; a row counts as an example."""
    padding_free: Annotated[bool, Parameter(group=OPTIMIZATION, negative=())] = False
    """Join the examples of a forward pass into one row without padding; packing does it too."""
    train_sampling_strategy: Annotated[
        str, Parameter(choices=SAMPLING_STRATEGIES, group=OPTIMIZATION)
    ] = "random"
    """Order of the examples; group_by_length: random, but of similar length in a step."""
    lr_scheduler_type: Annotated[
        str, Parameter(choices=SCHEDULERS, group=OPTIMIZATION, show_choices=False)
    ] = "cosine"
    """How the learning rates fall: linear, constant, or another of transformers' schedules."""
    warmup_ratio: Annotated[float, Parameter(group=OPTIMIZATION), SHARE] = 0.1
    """Share of the steps in which the learning rates rise."""
    max_grad_norm: Annotated[
        float | None, Parameter(group=OPTIMIZATION, show_default="1"), NOT_NEGATIVE
    ] = None
    """Clip the gradients to this norm; 0 turns clipping off."""
    nonfinite: Annotated[str, Parameter(choices=NONFINITE, group=OPTIMIZATION)] = "raise"
    """On an infinite or NaN loss or gradient: stop the run (raise), or skip the step."""
    max_skipped_steps: Annotated[int, Parameter(group=OPTIMIZATION), POSITIVE] = 10
    """With nonfinite skip, stop the run after this many skipped steps in a row."""
    adam_beta1: Annotated[float, Parameter(group=OPTIMIZATION), SHARE] = 0.9
    """Decay rate of the first moment."""
    adam_beta2: Annotated[float, Parameter(group=OPTIMIZATION), SHARE] = 0.999
    """Decay rate of the second moment."""
    adam_epsilon: Annotated[float, Parameter(group=OPTIMIZATION), POSITIVE] = 1e-8
    """Added to the denominator of the update."""
    seed: Annotated[int, Parameter(group=OPTIMIZATION), NOT_NEGATIVE, BELOW_2_32] = 42
    """Seed of everything random."""

    eval_strategy: Annotated[
        str | None,
        Parameter(choices=EVAL_STRATEGIES, group=EVALUATION, show_default="steps with eval_steps"),
    ] = None
    """When to measure the loss on a validation part, set aside from the training data."""
    eval_steps: Annotated[int | None, Parameter(group=EVALUATION), POSITIVE] = None
    """Optimizer steps between two evaluations on the validation part."""
    keep_best: Annotated[bool, Parameter(group=EVALUATION, negative=())] = False
    """Save model/ from the step with the lowest loss on the validation part."""
    early_stopping_patience: Annotated[int | None, Parameter(group=EVALUATION), POSITIVE] = None
    """End the training after this many evaluations in a row without a lower loss."""
    per_device_eval_batch_size: Annotated[
        int, Parameter(group=EVALUATION), POSITIVE, BELOW_2_31
    ] = 32
    """Examples per forward pass in evaluation."""
    forgetting_data: Annotated[str | None, Parameter(group=EVALUATION)] = None
    """Plain text to measure forgetting: its loss before and after; default: a text of the task."""

    output_dir: Annotated[
        Path | None, Parameter(group=OUTPUT, show_default="runs/TASK-METHOD-MODEL-TIME")
    ] = None
    """The run's directory."""
    overwrite: Annotated[bool, Parameter(group=OUTPUT)] = False
    """Replace an earlier run in output_dir, once this one is complete."""
    resume: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False
    """Continue the run in output_dir with its own options from its newest checkpoint."""
    fallback_dir: Annotated[
        Path | None, Parameter(group=OUTPUT, show_default="the temporary folder, then others")
    ] = None
    """Where trained weights are saved if they cannot be written to output_dir."""
    dry_run: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False
    """Check everything, take two steps, and print memory and time; nothing is written."""
    save_dtype: Annotated[
        str | None, Parameter(choices=DTYPES, group=OUTPUT, show_default="the base's")
    ] = None
    """Type of the saved weights; tensors that the base keeps in float32 stay so."""
    save_rounding: Annotated[
        str | None,
        Parameter(
            choices=SAVE_ROUNDINGS, group=OUTPUT, show_default="stochastic on a base of that type"
        ),
    ] = None
    """How weights are rounded to a saved type of 16 bits: nearest, or stochastic by the seed."""
    keep_low_halves: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False
    """Also save the low 16 bits of float32 weights beside a bfloat16 model/, for molf export."""
    logging_steps: Annotated[int, Parameter(group=OUTPUT), POSITIVE] = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    save_steps: Annotated[int | None, Parameter(group=OUTPUT), POSITIVE] = None
    """Optimizer steps between two checkpoints, which stay in the run, with the model as it was."""
    save_minutes: Annotated[
        float | None,
        Parameter(group=OUTPUT, show_default=f"{SAVE_MINUTES:g}, 0 with save_steps"),
        NOT_NEGATIVE,
    ] = None
    """Minutes between two checkpoints for resume, deleted when the run is complete; 0: none."""
    save_total_limit: Annotated[
        int | None, Parameter(group=OUTPUT, show_default="2, all with save_steps"), POSITIVE
    ] = None
    """Keep only this many checkpoints; the newest is always one of them."""
    async_save: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False
    """Write checkpoints in the background, from a copy of the state in host memory."""
    on_save_error: Annotated[str, Parameter(choices=SAVE_ERRORS, group=OUTPUT)] = "continue"
    """When a checkpoint cannot be written: warn and continue until the next, or stop the run."""
    report_to: Annotated[
        tuple[str, ...],
        Parameter(group=OUTPUT, converter=words, n_tokens=1, show_default="none"),
    ] = ("none",)
    """Trackers separated by commas: wandb, tensorboard, trackio, ..."""
    training_args: Annotated[dict[str, str], Parameter(group=OUTPUT, show_default=False)] = field(
        default_factory=dict
    )
    """Other fields of TRL's SFTConfig, as --training_args.NAME VALUE."""

    def __post_init__(self) -> None:
        """Check every value that was given."""
        for name, allowed in (
            ("task", TASKS),
            ("eval_part", EVAL_PARTS),
            ("format", (None, *FORMATS)),
            ("method", METHODS),
            ("match", MATCHES),
            ("lr_scheduler_type", SCHEDULERS),
            ("save_dtype", (None, *DTYPES)),
            ("save_rounding", (None, *SAVE_ROUNDINGS)),
            ("merge_base", (None, *MERGE_BASES)),
            ("dtype", WEIGHT_DTYPES),
            ("attn_implementation", (None, *ATTENTIONS)),
            ("on_save_error", SAVE_ERRORS),
            ("train_sampling_strategy", SAMPLING_STRATEGIES),
        ):
            check_choice(name, getattr(self, name), allowed)
        check_ranges(self)
        if max(self.ranks or (0,)) >= MOST_COUNTED:
            given = ",".join(map(str, self.ranks or ()))
            raise InputError(f"Invalid ranks={given}. Must be below 2**31.")
        for name in ("model", *SOURCES, "forgetting_data", "assignment"):
            if getattr(self, name) == "":
                raise InputError(f"Invalid {name}: empty. Leave the option out for the default.")
        for name in ("none", "all"):
            if name in self.report_to and len(self.report_to) > 1:
                raise InputError(
                    f"Invalid report_to={','.join(self.report_to)}: {name} stands alone. Give "
                    f"trackers, or {name}."
                )
        if self.method == "hybrid" and self.assignment is None:
            raise InputError(
                "method=hybrid needs --assignment: a YAML file, or a run of molf, molf-e or hybrid."
            )
        check_optimizer(self)
        if self.resume and self.overwrite:
            raise InputError(
                "Invalid resume with overwrite: the one continues the run in output_dir, the other "
                "replaces it. Leave one of the two out."
            )
        if self.resume and self.output_dir is None:
            raise InputError("Invalid resume without output_dir. Give the run's --output_dir.")
        check_low_halves(self)
        self._check_quantised()
        check_sharded(self)
        check_during(self)
        check_batches(self)
        check_task(self.task_options)
        self.method_config  # noqa: B018 (raises where the method's own settings are wrong)

    @property
    def optimizer_options(self) -> OptimizerOptions:
        """The optimizer's options of storage and execution."""
        return OptimizerOptions.of(self)

    @property
    def task_options(self) -> TaskOptions:
        """The options to load the task with."""
        return TaskOptions(
            name=self.task,
            data=self.data,
            eval_data=self.eval_data,
            validation_data=self.validation_data,
            format=self.format,
            max_samples=self.max_samples,
            max_eval_samples=self.max_eval_samples,
            few_shot=self.few_shot,
            eval_part=self.eval_part,
            validation_share=self.validation_share,
            label_noise=self.label_noise,
            seed=self.seed,
        )

    @property
    def trains_dense(self) -> bool:
        """Whether parameters other than LoRA factors are trained, which use `learning_rate`."""
        if self.method in ADAPTERS:
            return False
        config = self.method_config
        return config is None or not (config.freeze_base and config.freezes_rest)

    @property
    def joins_examples(self) -> bool:
        """Whether the examples of a forward pass are one row without padding."""
        return self.packing or self.padding_free

    @property
    def quantised(self) -> str | None:
        """The option that quantises the base, or None."""
        return next((name for name in QUANTISATIONS if getattr(self, name)), None)

    def _check_quantised(self) -> None:
        if self.quantised is None:
            return
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("Invalid load_in_4bit with load_in_8bit. Give one of them.")
        check_beside_quantised(self, self.quantised, f"leave {self.quantised} out")

    @property
    def method_config(self) -> MoLFConfig | None:
        """The experts of a routed method, or an adapter of the summed rank; else None.

        Raises:
            InputError: A value is not allowed, or not with this method.
        """
        return method_config(self)
