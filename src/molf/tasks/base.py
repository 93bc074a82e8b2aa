"""What a task is: records to train on, records to evaluate on, and how answers are measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from molf.evaluate.metric import Evaluation
from molf.evaluate.plain_text import default_plain_text
from molf.evaluate.settings import EvaluationSettings, Progress
from molf.tasks.samples import Sample


@dataclass(frozen=True)
class DataRecords:
    """The records of the file that is trained on.

    Attributes:
        count: How many records there are.
        samples: The readable ones by their 0-based record, in order.
        left_out: How many others there are, by reason.
        trained_on: Those of `samples` that are trained on.
        held_out: Those of `samples` that are evaluated and therefore not trained on.
    """

    count: int
    samples: Mapping[int, Sample]
    left_out: Counter[str]
    trained_on: Collection[int]
    held_out: Collection[int] = ()


class Task(ABC):
    """A data set with what is asked of the model; an instance holds its records.

    Attributes:
        name: The name that the task is chosen by.
        training_samples: What is trained on; empty where the task is loaded for evaluation only.
        prompt: How a record becomes a prompt and its completion, in words.
        prompt_version: Raised with every change of the prompts' wording.
    """

    prompt: ClassVar[str]
    prompt_version: ClassVar[int]

    def __init__(self, name: str, training_samples: list[Sample], source: dict[str, str]) -> None:
        """Store what every task has; `source` says where the records are from."""
        self.name = name
        self.training_samples = training_samples
        self._source = source

    @property
    @abstractmethod
    def evaluation_count(self) -> int:
        """How many records the task is evaluated on."""

    @abstractmethod
    def data_records(self) -> DataRecords:
        """All records of the file that is trained on; none where the task only evaluates."""

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

        Only what texts can give is measured; `notes["not_measured"]` lists the rest.

        Raises:
            InputError: A prediction is not such a record, or its record does not exist.
        """

    def default_forgetting_text(self) -> str:
        """The plain text that forgetting is measured on unless the user brings one."""
        return default_plain_text()

    def description(self) -> dict[str, Any]:
        """What a run's configuration records about the task."""
        return {
            "name": self.name,
            **self._source,
            "prompt": self.prompt,
            "prompt_version": self.prompt_version,
            "training_records": len(self.training_samples),
            "evaluation_records": self.evaluation_count,
        }
