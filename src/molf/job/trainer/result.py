"""The result of a training, in memory and as a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from molf.checkpoint.writer import Totals
from molf.job.record.routing_meaning import routing_shares_text
from molf.job.record.wins import RoutingSummary


@dataclass
class Training:
    """The result of a training.

    Attributes:
        model: The trained plain model, with adapters merged.
        trained_parameters: Number of trained parameters.
        steps: Optimizer steps, including skipped ones.
        skipped_steps: Steps skipped because of a loss or gradient that was not finite.
        seconds: Time of the steps.
        preparation_seconds: Time before the steps, such as that of a decomposition.
        tokens: Tokens seen, without padding.
        loss: Mean training loss of the steps that were not skipped.
        routing: Summary of the routing; None without routing.
        meaning: Interpretation of the routing; empty without routing.
        merge: Record of the merge; empty if nothing was merged.
        checkpoints: Measurements of the checkpoints that were written.
        ended_by: The option that ended it before its planned steps; empty for none.
        planned_steps: Number of planned steps.
        validation: Record of the evaluations during the training; empty for none.
    """

    model: Any
    trained_parameters: int
    steps: int
    skipped_steps: int
    seconds: float
    preparation_seconds: float
    tokens: int
    loss: float
    routing: RoutingSummary | None
    meaning: str
    merge: dict[str, Any]
    checkpoints: Totals = field(default_factory=Totals)
    ended_by: str = ""
    planned_steps: int = 0
    validation: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return everything but the model as values of JSON."""
        fields = {name: value for name, value in vars(self).items() if name != "model"}
        routing = None if self.routing is None else self.routing.record()
        return {**fields, "routing": routing, "checkpoints": asdict(self.checkpoints)}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Training:
        """Return a training whose model is saved already, from the result of `record`."""
        routing = record["routing"]
        if routing is not None:
            routing = RoutingSummary(**{**routing, "most": tuple(routing["most"])})
        totals = Totals(**record["checkpoints"])
        return cls(None, **{**record, "routing": routing, "checkpoints": totals})

    @property
    def shares_and_meaning(self) -> str:
        """The experts' shares and their interpretation, for a card; empty without routing."""
        if self.routing is None:
            return ""
        return f"{routing_shares_text(self.routing)} {self.meaning}"
