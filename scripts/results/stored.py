"""Stored studies: the CSV files of `docs/studies/NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from molf.study.report.records import Row, read_records
from molf.study.report.summary import CellSummary, MethodSummary, summarise

STUDIES = Path(__file__).parents[2] / "docs" / "studies"
NO_ROWS = "no rows yet"


class Study:
    """A stored study; without a folder, one that has no rows yet.

    Attributes:
        folder: Its folder.
        cells: Cells that have rows.
        planned: Names of all cells.
        without_rows: Names of the cells that have none.
        rows: All rows.
        own: Names of the methods that are no controls.
        contenders: Names of the methods of which the baseline of a cell is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells: list[CellSummary] = []
        self.planned: list[str] = []
        self.without_rows: list[str] = []
        self.rows: list[Row] = []
        self.own: list[str] = []
        self.contenders: list[str] = []
        if folder.is_dir():
            records = read_records(folder)
            found = summarise(records)
            self.planned = [cell.name for cell in found]
            self.cells = [cell for cell in found if cell.trials]
            self.without_rows = [cell.name for cell in found if not cell.trials]
            self.rows = records.rows
            self.contenders = records.outline["report"]["baseline"]
            self.own = [one.name for one in found[0].methods if one.control_of is None]

    def of(self, name: str) -> list[tuple[CellSummary, MethodSummary]]:
        """Return a method in each cell with rows.

        Raises:
            KeyError: The study has no such method.
        """
        found = [(cell, one) for cell in self.cells if (one := cell.method(name))]
        if self.cells and not found:
            raise KeyError(name)
        return found


def cells_text(names: Sequence[str]) -> str:
    """Return the number of cells and their names."""
    return f"{len(names)} cell{'s' if len(names) > 1 else ''} ({', '.join(names)})"
