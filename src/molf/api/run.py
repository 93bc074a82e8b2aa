"""`molf.Run`: the files of a run, read when asked for."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from molf.core.assignment.assignment import Assignment
    from molf.measure import Metric


class Run:
    """A run directory of `molf train`, whether it has ended or not.

    Files are read at the first use of an attribute and kept; `Run(path)` again reads them anew.

    Args:
        path: The directory.

    Raises:
        InputError: The directory is no run.
    """

    def __init__(self, path: str | Path) -> None:
        from molf.job.record.finished_run import read_run

        self._run = read_run(Path(path))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, method={self._run.method!r}, status={self.status!r})"

    @property
    def path(self) -> Path:
        """The directory."""
        return self._run.path

    @property
    def status(self) -> str:
        """`complete`, `running`, `stopped` or `failed`, now."""
        from molf.report.run_data import status_of

        return status_of(self._run)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the training with their defaults, as `config.yaml` has them."""
        return {name: value for name, value in self._run.config.items() if name != "run"}

    @property
    def record(self) -> dict[str, Any]:
        """The record of the run in `config.yaml`: data, model, plan, saved numbers."""
        return dict(self._run.config["run"])

    @cached_property
    def before(self) -> dict[str, Metric]:
        """Metrics of the base model by name; empty before the end of the run."""
        return self._metrics("before")

    @cached_property
    def after(self) -> dict[str, Metric]:
        """Metrics of the saved model by name; empty before the end of the run."""
        return self._metrics("after")

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`: loss, rates and more by step; empty before the first."""
        return self._lines("metrics.jsonl")

    @cached_property
    def predictions(self) -> list[dict[str, Any]]:
        """The predictions of the saved model by record; empty before the end of the run."""
        return self._lines("predictions.jsonl")

    @cached_property
    def routing(self) -> pa.Table:
        """Every decision of every layer: columns step, layer, expert, score, winner.

        Raises:
            InputError: The method does not route, or a part is damaged.
        """
        from molf.job.record.routing_log import read_routing

        return read_routing(self.path)

    @cached_property
    def assignment(self) -> Assignment:
        """The assignment of a hybrid run or a probe, or the one by the wins of the routing log.

        Raises:
            InputError: The run has neither.
        """
        from molf.job.model.loading import load_skeleton
        from molf.job.record.assignment_source import read_assignment_source

        return read_assignment_source(self.path).assignment(load_skeleton(str(self._run.base)))

    def model(self, **options: Any) -> Any:
        """Load the saved model by transformers, on the CPU.

        Args:
            **options: Keywords of `from_pretrained`.

        Raises:
            InputError: The run has no model yet.
        """
        from transformers import AutoModelForCausalLM

        self._run.check("model")
        return AutoModelForCausalLM.from_pretrained(self.path / "model", **options)

    def tokenizer(self) -> Any:
        """Load the tokenizer of the saved model.

        Raises:
            InputError: The run has no model yet.
        """
        from transformers import AutoTokenizer

        self._run.check("model")
        return AutoTokenizer.from_pretrained(self.path / "model")

    def push(
        self,
        repo: str,
        *,
        what: str = "model",
        private: bool = False,
        revision: str | None = None,
    ) -> str:
        """Upload the saved model, or the adapter, with its card to the Hugging Face Hub.

        Args:
            repo: `owner/name`, or `name` for one of your own; made if missing.
            what: `model` or `adapter`.
            private: Make the repository private; one that is public is refused.
            revision: Branch, made if missing; None for `main`.

        Returns:
            The address of the repository or its branch.

        Raises:
            InputError: The run has not ended or lacks the part, or the Hub refused the push.
            PushError: The Hub cannot be reached, or the upload failed.
        """
        from molf.inputs import check_choice
        from molf.job.push import hub_token, plan_upload, push

        check_choice("what", what, ("model", "adapter"))
        with self._run.reading():
            plan = plan_upload(self._run, repo, what, private=private, revision=revision)
            return push(plan, hub_token())

    def _metrics(self, side: str) -> dict[str, Metric]:
        from molf.measure import Metric

        path = self.path / "eval.json"
        if not path.is_file():
            return {}
        entries = json.loads(path.read_text(encoding="utf-8")).get(side, {})
        return {
            name: Metric(
                entry["value"],
                _end(entry["low"]),
                _end(entry["high"]),
                entry["count"],
            )
            for name, entry in entries.items()
            if "value" in entry  # others are break-downs by group
        }

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise InputError(f"{path} cannot be read: {error}") from error


def _end(value: float | None) -> float:
    return math.nan if value is None else value
