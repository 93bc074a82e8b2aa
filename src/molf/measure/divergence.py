"""KL divergence of a fine-tuned model from its base, on neutral text and on a task's prompts.

The base and the tuned model need not be in memory together: the base's logits are stored first, in
their own dtype, so that nothing is rounded. They are kept in host memory, without a file: at most
2,048 positions of a vocabulary, as many numbers as an embedding of width 2,048 has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from molf.errors import InputError
from molf.measure.forgetting import plain_text_windows
from molf.measure.generate import padding_id
from molf.measure.inference import for_each_batch, inference, last_logits, length_limit
from molf.measure.likelihood import check_not_nan, pads
from molf.measure.metric import Metric, bootstrap_mean
from molf.measure.padding import ANY, logits_batches
from molf.measure.settings import EvaluationSettings, Progress
from molf.measure.sharing import collect
from molf.measure.spread import spread

_TOKENS = 384  # of the neutral text, and of prompts; bounds the time
_FEWEST_ROWS = 8  # for an interval; long rows exceed `_TOKENS`
_MOST_PROMPTS = 64
_POSITIONS = 1024  # most positions of the neutral text, and of prompts; bounds the memory
_WINDOW = 32  # tokens; longer windows were too few for an interval
_AT_ONCE = 2**15  # logits converted to float64 together; larger blocks leave a CPU's cache


@dataclass(frozen=True)
class Logits:
    """A model's next-token logits on token rows.

    Attributes:
        rows: The token ids.
        logits: Per row those at its last positions, [positions, vocabulary], in the dtype of the
            model's output, in host memory; empty for rows of other processes.
    """

    rows: list[list[int]]
    logits: list[Tensor]

    @property
    def nbytes(self) -> int:
        """The size of the logits in bytes."""
        return sum(logits.nbytes for logits in self.logits)


@dataclass(frozen=True)
class BaseLogits:
    """A base model's logits, which any number of models tuned from it are compared with.

    Attributes:
        neutral: On windows of the neutral text.
        task: On prompts of the task; empty where none fits the length limit.
        pad_id: The padding token of both.
    """

    neutral: Logits
    task: Logits
    pad_id: int

    @property
    def nbytes(self) -> int:
        """The size of the logits in bytes."""
        return self.neutral.nbytes + self.task.nbytes


class Prompted(Protocol):
    """Anything with prompts, such as a `molf.tasks.Task`."""

    def prompts(self, tokenizer: Any, most: int) -> list[list[int]]:
        """Return the token ids of at most `most` prompts, evenly spread over all."""


def read_base(
    model: Any,
    tokenizer: Any,
    task: Prompted,
    neutral_text: str,
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
    *,
    neutral: Logits | None = None,
) -> BaseLogits:
    """Compute the logits of a base model that `kl_metrics` compares with.

    Windows of the text and prompts of the task's evaluated records are spread evenly: about 384
    tokens of each, in at least 8 rows. Of long prompts the last positions are compared.

    Args:
        model: A transformers causal language model of any dtype, on its device.
        tokenizer: The tokenizer of the tuned model, which gives the rows.
        task: The task with its records.
        neutral_text: The text of `forgetting_loss`.
        settings: Batch size and length limit.
        progress: Called after each batch.
        neutral: Those of an earlier call with the same model and text; computed if None.

    Raises:
        InputError: The text has fewer than two tokens.
        FloatingPointError: The model's logits are NaN.
    """
    settings = settings or EvaluationSettings()
    if settings.split_special_tokens:  # False keeps the tokenizer's own setting
        tokenizer.split_special_tokens = True
    limit = length_limit(model, settings.max_length)
    pad_id = padding_id(tokenizer)

    def compute(rows: Sequence[list[int]], what: str) -> Logits:
        return _compute(model, _chosen(rows), pad_id, settings.batch_size, what, progress)

    if neutral is None:
        windows = plain_text_windows(tokenizer, neutral_text, min(limit, _WINDOW))
        neutral = compute([ids for ids, _ in windows], "neutral text")
    prompts = task.prompts(tokenizer, _MOST_PROMPTS)
    task_logits = compute([ids for ids in prompts if len(ids) <= limit], "prompts")
    return BaseLogits(neutral, task_logits, pad_id)


def kl_metrics(
    model: Any,
    base: BaseLogits,
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, Metric]:
    """Compute KL(base || model) of the next token's distribution, in nats per token.

    `kl_neutral` is the mean over positions of a text that was not trained on. `kl_task` is the
    mean over positions of the new task's prompts, without answers. "RL's Razor" (Shenfeld et al.
    2025, arXiv 2509.04259) relates the divergence on the new task to forgetting. Both sum over the
    whole vocabulary, in float64.

    Args:
        model: The tuned model, on its device, in the base's dtype (another dtype adds the
            divergence of its rounding).
        base: The base's logits.
        settings: Batch size and seed.
        progress: Called after each batch.

    Returns:
        The metrics by name. The intervals resample rows (windows, prompts); `count` is their
        number. `kl_task` is absent without prompts.

    Raises:
        InputError: The vocabularies have different sizes, or the model has too few positions.
        FloatingPointError: The model's logits are NaN, as after a diverged training.
    """
    settings = settings or EvaluationSettings()
    sides = {"kl_neutral": base.neutral, "kl_task": base.task}
    longest = max(len(row) for side in sides.values() for row in side.rows)
    limit = length_limit(model, longest)
    if limit < longest:
        raise InputError(
            f"The model has {limit} positions, and the base was measured on texts of {longest} "
            f"tokens. Give --max_length {limit}."
        )
    found = {}
    for name, side in sides.items():
        if side.rows:
            sums = _divergences(model, side, base.pad_id, settings.batch_size, name, progress)
            means = [total / count for total, count in sums]
            counts = [count for _, count in sums]
            found[name] = bootstrap_mean(means, weights=counts, seed=settings.seed)
    return found


def _chosen(rows: Sequence[list[int]]) -> list[list[int]]:
    """Return rows spread evenly over those given: `_TOKENS` tokens, or the fewest rows."""
    if not rows:
        return []
    fitting = _TOKENS * len(rows) // sum(map(len, rows))
    return spread(rows, max(fitting, _FEWEST_ROWS))


def _compute(
    model: Any,
    rows: list[list[int]],
    pad_id: int,
    batch_size: int,
    what: str,
    progress: Progress | None,
) -> Logits:
    """Compute a model's logits at the last positions of rows, all rows with the same number."""
    most = max(1, _POSITIONS // max(len(rows), 1))
    kept = [min(len(row), most) for row in rows]
    found = [torch.empty(0)] * len(rows)

    def read(index: int, logits: Tensor) -> None:
        found[index] = logits.to("cpu", copy=True)  # a view would keep the whole batch

    _run(model, rows, kept, read, pad_id, batch_size, what, progress)
    return Logits(rows, found)


def _divergences(
    model: Any,
    base: Logits,
    pad_id: int,
    batch_size: int,
    what: str,
    progress: Progress | None,
) -> list[tuple[float, int]]:
    """Compute KL(base || model) of each row, summed over its positions, in nats, and their number.

    The processes share the rows as they did for the base.
    """
    sums = [(0.0, 0)] * len(base.rows)

    def read(index: int, logits: Tensor) -> None:
        theirs = base.logits[index]
        if theirs.shape != logits.shape:
            raise InputError(
                f"The base predicts {theirs.shape[-1]} tokens, and the model {logits.shape[-1]}. "
                "Give a base with the model's vocabulary."
            )
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        size = max(1, _AT_ONCE // logits.shape[-1])
        for part, ours in zip(theirs.split(size), logits.split(size), strict=True):
            total += _divergence(part.to(ours.device), ours)
        sums[index] = check_not_nan(total).item(), len(theirs)

    kept = [len(logits) for logits in base.logits]
    done = _run(model, base.rows, kept, read, pad_id, batch_size, what, progress)
    return collect(sums, done)


def _divergence(base: Tensor, model: Tensor) -> Tensor:
    """Return KL(base || model) from logits [positions, vocabulary], summed over positions."""
    log_p, log_q = base.double().log_softmax(-1), model.double().log_softmax(-1)
    # Models exclude tokens by logits of -inf: if both do, 0 * (-inf + inf) must be 0, and not NaN.
    least = torch.finfo(torch.float64).min
    log_p.clamp_(min=least)
    log_q.clamp_(min=least)
    return torch.dot(log_p.exp().flatten(), log_p.sub_(log_q).flatten())


def _run(
    model: Any,
    rows: Sequence[list[int]],
    kept: Sequence[int],
    read: Callable[[int, Tensor], None],
    pad_id: int,
    batch_size: int,
    what: str,
    progress: Progress | None,
) -> list[int]:
    """Call `read` with each row's index and its logits at the last `kept` positions.

    Returns:
        The indices of the rows that this process has computed.
    """
    if not rows:
        return []
    size = max(1, min(batch_size, _POSITIONS // max(1, *kept)))

    def run(batch: list[int]) -> None:
        keep = max(kept[index] for index in batch)
        logits = last_logits(model, [rows[index] for index in batch], pad_id, keep)
        for row, index in zip(logits, batch, strict=True):
            read(index, row[-kept[index] :])

    lengths = [len(row) for row in rows]
    allowed = logits_batches(model, pad_id) if pads(lengths, size) else ANY
    with inference(model):
        return for_each_batch(model, lengths, size, run, what, progress, allowed=allowed)
