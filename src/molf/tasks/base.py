"""The base class of tasks: training records, evaluation records and metrics."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from molf.data.sample_store import ChosenSamples
from molf.data.samples import Sample
from molf.measure.metric import Evaluation
from molf.measure.plain_text import default_plain_text, read_plain_text
from molf.measure.settings import EvaluationSettings, Progress


@dataclass(frozen=True)
class DataRecords:
    """The records of the training file.

    Attributes:
        count: Number of all records.
        samples: The usable records as samples, by 0-based record index, in order.
        left_out: Number of unusable records, by reason.
        trained_on: Indices of the samples to train on; repeated where a weight repeats a record.
        held_out: Indices of the samples that are kept for evaluation.
        validated_on: Indices of the samples that are set aside for evaluations during the training.
        formats: Formats of the files (`custom`).
        is_weighted: Whether a source has a weight.
    """

    count: int
    samples: Mapping[int, Sample]
    left_out: Counter[str]
    trained_on: Collection[int]
    held_out: Collection[int] = ()
    validated_on: Collection[int] = ()
    formats: tuple[str, ...] = ()
    is_weighted: bool = False


class Task(ABC):
    """A data set with its prompts and metrics; an instance holds the records.

    Attributes:
        name: The task's name in the options.
        training_samples: Samples to train on; empty where the task is loaded for evaluation only.
        validation_samples: Samples that are set aside for evaluations during a training.
        prompt: Describes how a record becomes a prompt and its completion.
        prompt_version: Incremented with every change of the prompts' wording.
    """

    prompt: ClassVar[str]
    prompt_version: ClassVar[int]
    _forgetting_text: Callable[[], str] | None = None  # returns a text of the records' own

    def __init__(
        self, name: str, training_samples: Sequence[Sample], source: dict[str, str]
    ) -> None:
        """Store the name, the samples and the `source` of the records (for the run's files)."""
        self.name = name
        self.training_samples = training_samples
        self.validation_samples: list[Sample] = []
        self._source = source

    @property
    @abstractmethod
    def evaluation_count(self) -> int:
        """The number of records to evaluate."""

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of the metrics that an evaluation of a tuned model on these records has.

        Known before any model is loaded.
        """
        return (*self._metric_names(), "forgetting_loss", "kl_neutral", "kl_task")

    @abstractmethod
    def _metric_names(self) -> tuple[str, ...]:
        """Return the names of the metrics that `evaluate` measures on these records."""

    @abstractmethod
    def data_records(self) -> DataRecords:
        """Return all records of the training file; none where the task only evaluates."""

    @abstractmethod
    def evaluated_samples(self, most: int) -> list[Sample]:
        """Return at most `most` of the records to evaluate, spread evenly over them."""

    def prompts(self, tokenizer: Any, most: int) -> list[list[int]]:
        """Return the token ids before the answers of at most `most` records to evaluate.

        A text without an answer counts whole.

        Args:
            tokenizer: A fast tokenizer with an EOS token.
            most: Number of records, spread evenly over all; their lengths are not limited.

        Raises:
            InputError: The tokenizer cannot be used.
        """
        from molf.data.encoding import generation_contexts, tokenize_samples

        samples = self.evaluated_samples(most)
        tokenized = list(tokenize_samples(tokenizer, samples))
        contexts = generation_contexts(tokenizer, tokenized)
        return [
            context.ids if sample.has_answer else text.prefix + text.ids
            for sample, context, (text, _) in zip(samples, contexts, tokenized, strict=True)
        ]

    @abstractmethod
    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        settings: EvaluationSettings,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Measure a transformers causal language model, on its device.

        Args:
            model: The model, or a PEFT model.
            tokenizer: Its tokenizer; must be a fast one with an EOS token.
            settings: Batch size, limits and seed.
            progress: Called after each batch.

        Raises:
            InputError: The tokenizer cannot be used, or no record fits the length limit.
        """

    @abstractmethod
    def score_predictions(self, predictions: list[dict[str, Any]]) -> Evaluation:
        """Score saved texts, `{"index": i, "prediction": text}` with i a record of the data file.

        Metrics that need the model are skipped and listed in `notes["not_measured"]`.

        Raises:
            InputError: A prediction has another form, or its record does not exist.
        """

    def with_part(self, rest: Sequence[int], part: Sequence[int], measured: Sequence[int]) -> Self:
        """Return the task with a part of its training samples set aside; this one stays as it is.

        Args:
            rest: Positions of the training samples to train on.
            part: Positions of those that are set aside.
            measured: Those of the part that are measured while the task trains.
        """
        found = copy.copy(self)
        samples = self.training_samples
        found.training_samples = ChosenSamples(samples, rest)  # a list would hold all as objects
        found.validation_samples = [samples[position] for position in measured]
        return found

    def forgetting_text(self, given: str | None) -> str:
        """Return the plain text for `forgetting_loss`: that of a file, or the task's own."""
        return self.default_forgetting_text() if given is None else read_plain_text(given)

    def default_forgetting_text(self) -> str:
        """Return the plain text for `forgetting_loss` where the user gives none."""
        return (self._forgetting_text or default_plain_text)()

    def description(self) -> dict[str, Any]:
        """Return the task's entries for the configuration file of a run."""
        return {
            "name": self.name,
            **self._source,
            "prompt": self.prompt,
            "prompt_version": self.prompt_version,
            "training_records": len(self.training_samples),
            **({"validation_records": len(aside)} if (aside := self.validation_samples) else {}),
            "evaluation_records": self.evaluation_count,
        }
