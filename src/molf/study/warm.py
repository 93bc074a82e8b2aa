"""Task data, base models and their evaluations, kept in memory between a worker's trials."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

from molf.job.inputs import EvaluationKey, Inputs
from molf.measure import Evaluation
from molf.tasks import Task, TaskOptions

if TYPE_CHECKING:
    import torch

    from molf.job.model.loading import LoadedModel
    from molf.measure.divergence import BaseLogits

T = TypeVar("T")

_TASKS, _BASES, _EVALUATIONS = 16, 1, 64
_LOGITS = 2**31  # bytes: those of five seeds for a vocabulary of 50,000


class WarmInputs(Inputs):
    """Loads and measures once. A trial gets the same values as from `molf train` alone.

    The least recently used task, model or evaluation is dropped first. The files of data and model
    must not change while a worker runs.
    """

    def __init__(self) -> None:
        self._tasks: _Kept[Task] = _Kept(_TASKS)
        self._bases: _Kept[LoadedModel] = _Kept(_BASES)
        self._evaluations: _Kept[Evaluation] = _Kept(_EVALUATIONS)
        self._logits: _Kept[BaseLogits] = _Kept(_LOGITS, lambda logits: logits.nbytes)

    def task(self, options: TaskOptions) -> Task:
        """Return the task with its records."""
        return self._tasks.get(options, lambda: super(WarmInputs, self).task(options))

    def base(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """Return a copy of the base model, which a training changes."""
        load = super().base
        return self._bases.get((model, dtype), lambda: load(model, dtype)).copy()

    def base_evaluation(self, key: EvaluationKey, measure: Callable[[], Evaluation]) -> Evaluation:
        """Return the evaluation of the base."""
        return self._evaluations.get(key, measure)

    def base_logits(self, key: EvaluationKey, measure: Callable[[], BaseLogits]) -> BaseLogits:
        """Return the logits of the base, which the trained model is compared with."""
        return self._logits.get(key, measure)


class _Kept(Generic[T]):
    """Values by key. Their sizes sum to at most `most`, but the newest value is always kept."""

    def __init__(self, most: int, size: Callable[[T], int] = lambda _: 1) -> None:
        self._most = most
        self._size = size
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key; make it if it is not kept."""
        if key not in self._values:
            self._shrink_to(self._most - 1)  # first, so that two models are never in memory
            made = make()
            self._shrink_to(self._most - self._size(made))
            self._values[key] = made
        self._values.move_to_end(key)
        return self._values[key]

    def _shrink_to(self, most: int) -> None:
        """Drop the least recently used values until the sizes sum to at most `most`."""
        while self._values and sum(map(self._size, self._values.values())) > most:
            self._values.popitem(last=False)
