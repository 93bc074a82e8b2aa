"""EVA (Paischer et al. 2024, arXiv 2410.07170): LoRA initialised from the data.

A is initialised with the directions of largest variance of a layer's inputs, and layers with more
variance get higher ranks. PEFT computes the directions by an incremental SVD over batches of the
training data, on the tokens of the completions.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, initialize_lora_eva_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from molf.data.encoding import EncodedSamples
from molf.errors import InputError
from molf.job.methods.adapter import Adapter, AdapterPlan, lora_config
from molf.job.methods.base import Prepared, TrainingData
from molf.job.settings.resolved import ResolvedSettings
from molf.measure.inference import inner_model

# The authors' values, also PEFT's defaults. A layer's rank is at most rho times the mean.
# Directions have converged when their cosine with those of the previous batch reaches tau.
RHO = 2.0
TAU = 0.99

_MOST_BATCHES = 1000
# The directions of batches with few tokens differ by chance, and then settle late or never: a batch
# has this many times the tokens that it needs, as long as it has few positions.
_TIMES_NEEDED = 8
_MOST_POSITIONS = 32_768  # tokens with prompts and padding
_IGNORED = -100  # the label of a token without loss


class Eva(Adapter):
    """LoRA with PEFT's initialisation from the data."""

    def config(self, plan: AdapterPlan, settings: ResolvedSettings, steps: int) -> LoraConfig:
        """Return PEFT's LoRA configuration with this initialisation."""
        eva = EvaConfig(rho=RHO, tau=TAU, label_mask_value=_IGNORED)
        return lora_config(plan, settings, init_lora_weights="eva", eva_config=eva)

    def check_layers(self, plan: AdapterPlan) -> None:
        """Reject layers whose inputs have fewer features than directions are needed."""
        needed = _tokens_needed(plan.rank)
        small = [layer for layer in plan.layers if needed > layer.in_features]
        if small:
            raise InputError(
                f"method=eva with rank {plan.rank} needs inputs of at least {needed} features; "
                f"{len(small)} of {len(plan.layers)} layers have fewer, such as {small[0].name} "
                f"({small[0].in_features}). Give lower --ranks, or leave them out with "
                "--exclude_modules."
            )

    def plan(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> AdapterPlan:
        """Return the plan before ranks are moved, after checking that there are enough tokens."""
        plan = super().plan(model, settings, data)
        needed, there = _tokens_needed(plan.rank), 0
        for labels in data.samples.labels:
            there += _learned_tokens(labels)
            if there >= needed:  # reading a sample may tokenize it
                return plan
        raise InputError(
            f"method=eva with rank {plan.rank} needs at least {needed} completion tokens to "
            f"decompose; the training data has {there}. Give lower --ranks or more data."
        )

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Add the adapter, without PEFT's warning on memory, which does not apply."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")
            return super().prepare(model, settings, data)

    def initialise(
        self, model: Any, plan: AdapterPlan, settings: ResolvedSettings, data: TrainingData
    ) -> None:
        """Run the model over training data until the directions converge."""
        # PEFT decomposes batch by batch, so each needs enough tokens for all directions.
        batches = _batches(
            data.samples,
            least_tokens=_tokens_needed(plan.rank),
            least_samples=settings.per_device_train_batch_size,
            seed=settings.seed,
        )
        loader: DataLoader[Any] = DataLoader(
            _Rows(data.samples), batch_sampler=batches, collate_fn=_collate
        )
        initialize_lora_eva_weights(
            model,
            loader,
            forward_fn=_Forward(),
            gather_distributed_inputs=False,  # each process has all batches
            show_progress_bar=False,
        )


class _Rows(Dataset[tuple[list[int], list[int]]]):
    """Ids and labels of samples, read one by one."""

    def __init__(self, samples: EncodedSamples) -> None:
        self._samples = samples

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self._samples.input_ids[index], self._samples.labels[index]


class _Forward:
    """A forward pass without loss; raises an error if the directions do not converge."""

    def __init__(self) -> None:
        self._batches = 0

    def __call__(self, model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        self._batches += 1
        if self._batches > _MOST_BATCHES:
            raise RuntimeError(
                f"EVA found no stable directions in {_MOST_BATCHES} batches: in the inputs of some "
                "layer, directions have nearly the same variance. Give lower --ranks, a larger "
                "--per_device_train_batch_size, or data with more completion tokens."
            )
        given: dict[str, Any] = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
        }
        # Logits, the largest tensor, are not needed, unless the output layer has an adapter.
        if not isinstance(model.get_output_embeddings(), BaseTunerLayer):
            accepted = inspect.signature(inner_model(model).forward).parameters
            if "logits_to_keep" in accepted:
                given["logits_to_keep"] = 1
        return model(**given, use_cache=False)


def _tokens_needed(rank: int) -> int:
    """Return the tokens that a batch needs for a decomposition."""
    # PEFT computes twice the directions that it keeps, and needs as many tokens.
    return 2 * round(RHO * rank)


def _learned_tokens(labels: list[int]) -> int:
    return sum(label != _IGNORED for label in labels)


def _batches(
    samples: EncodedSamples, *, least_tokens: int, least_samples: int, seed: int
) -> list[list[int]]:
    """Return shuffled indices in batches with enough tokens; a last one with too few is dropped.

    There are at most `_MOST_BATCHES`, so that not all of much data is read. A batch has
    `_TIMES_NEEDED` the least tokens, or fewer at `_MOST_POSITIONS`.
    """
    order = torch.randperm(
        len(samples.labels), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    batches: list[list[int]] = []
    batch: list[int] = []
    tokens = longest = 0
    for index in order:
        batch.append(index)
        tokens += _learned_tokens(samples.labels[index])
        longest = max(longest, len(samples.labels[index]))
        is_large = tokens >= _TIMES_NEEDED * least_tokens or len(batch) * longest >= _MOST_POSITIONS
        if is_large and tokens >= least_tokens and len(batch) >= least_samples:
            batches.append(batch)
            batch, tokens, longest = [], 0, 0
            if len(batches) == _MOST_BATCHES:
                break
    if tokens >= least_tokens and len(batch) >= least_samples:
        batches.append(batch)
    return batches or [batch]


def _collate(samples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    def padded(rows: Iterator[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], True, value)

    return {
        "input_ids": padded((ids for ids, _ in samples), 0),
        "labels": padded((labels for _, labels in samples), _IGNORED),
        "attention_mask": padded(([1] * len(ids) for ids, _ in samples), 0),
    }
