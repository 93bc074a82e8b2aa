"""Run the notebook of `examples/`, and show it as a page.

    python scripts/docs_site/notebook.py

runs the code cells in one process, without a kernel, and stores their printed output.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "routing.ipynb"


def read_notebook(path: Path = NOTEBOOK) -> dict[str, Any]:
    """Return the notebook as it is stored."""
    return json.loads(path.read_text(encoding="utf-8"))


def run_cells(notebook: dict[str, Any]) -> list[str]:
    """Run the code cells in order, in the names of one program; return the output of each."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
            printed.append(output.getvalue())
    return printed


def notebook_page() -> str:
    """Return the cells of the notebook as Markdown, without its title."""
    first, *cells = read_notebook()["cells"]
    parts = ["".join(first["source"]).split("\n", 1)[1]]
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts += [
            f"```text\n{''.join(output['text']).rstrip()}\n```"
            for output in cell.get("outputs", ())
        ]
    return "\n\n".join(parts)


def decisions() -> str:
    """Return Markdown with the notebook's map of decisions."""
    outputs = [
        "".join(output["text"])
        for cell in read_notebook()["cells"]
        for output in cell.get("outputs", ())
    ]
    return (
        f"```text\n{next(text for text in outputs if '..#' in text or '###' in text).rstrip()}\n```"
    )


def _store(path: Path = NOTEBOOK) -> None:
    notebook = read_notebook(path)
    printed = iter(run_cells(notebook))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            text = next(printed)
            lines = text.splitlines(keepends=True)
            output = {"name": "stdout", "output_type": "stream", "text": lines}
            cell["outputs"] = [output] if text else []
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _store()
