"""Each program of `examples/` runs to its end and leaves the files that it promises."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Of each program: a package that it needs, files that it writes, a line that it prints.
PROGRAMS = {
    "plain_pytorch": ("torch", ("model/model.safetensors", "optimizer.pt"), "full won"),
    "hf_trainer": ("transformers", ("model/model.safetensors",), "last winner: full"),
    "trl_sft": ("trl", ("adapter/adapter_model.safetensors",), "last winner: lora1_r16"),
    "trl_dpo": ("trl", ("dpo/routing/part-00000.parquet",), "full won"),
    "trl_grpo": ("trl", ("grpo/routing/part-00000.parquet",), "full won"),
    "accelerate_loop": ("accelerate", ("state/optimizer.bin",), "of the decisions"),
    "lightning_fit": ("pytorch_lightning", ("model/model.safetensors",), "last winner: full"),
}
SLOW = ("trl_sft", "trl_dpo", "trl_grpo", "lightning_fit")


def test_all_programs_are_run():
    assert sorted(PROGRAMS) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize(
    "name",
    [  # the imports of these take seconds
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PROGRAMS
    ],
)
def test_program(name, tmp_path, monkeypatch, capsys):
    package, files, line = PROGRAMS[name]
    pytest.importorskip(package, reason=f"examples/{name}.py needs {package}")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert line in capsys.readouterr().out
    for file in files:
        assert (tmp_path / file).is_file(), file


@pytest.mark.slow
def test_notebook(monkeypatch, tmp_path):
    """The cells run, and print what the stored outputs show, with other numbers at most."""
    from docs_site.notebook import read_notebook, run_cells

    monkeypatch.chdir(tmp_path)
    notebook = read_notebook()
    printed = run_cells(notebook)
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(printed) == len(stored)
    for now, outputs in zip(printed, stored, strict=True):
        before = "".join(outputs[0]["text"]) if outputs else ""
        assert len(now.splitlines()) == len(before.splitlines())
    assert "changed: 0%" in printed[1]
    assert "#" in "".join(printed)
