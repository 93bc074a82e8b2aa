"""Measure the loss of a trained update by saving in bfloat16, on real small models.

    python benchmarks/save_rounding.py --data DIR [--seeds 5] [--results FILE]

DIR contains `factlm/` and `stories260k/` (checkpoints of transformers), `counterfact.jsonl` and
`medmcqa_train.jsonl`. The bases are stored in bfloat16 first, except in float32 cells. Each cell is
trained once per seed with float32 weights, which are saved unrounded. This model is then rounded to
bfloat16, to nearest and stochastically, and the loss of the training records is measured on the
base and on the three models. The table has means over seeds with 95% intervals (Student's t): the
share of moved numbers that differ from the base after saving, the error of the saved update, the
loss, and the share of the loss's gain that is lost.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf.cli import main as molf
from molf.data.encoding import encode_samples
from molf.job.model.loading import load_model
from molf.job.model.saved_update import SavedUpdate
from molf.job.model.stored import StoredCheckpoint
from molf.tasks import TaskOptions, load_task
from molf.world import BASE_PATH

_ROUNDINGS = ("nearest", "stochastic")
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
_LOSS_SAMPLES = 300
_RECORDS = 200


@dataclass(frozen=True)
class Cell:
    """A training run.

    Attributes:
        name: Its name in the table.
        base: Name of the base model.
        task: The task, or the records of `custom`.
        options: Further options of `molf train`.
    """

    name: str
    base: str
    task: str
    options: tuple[str, ...]


_STEPS = ("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1")
_EPOCHS = ("--num_train_epochs", "3", *_STEPS)
_CELLS = (
    Cell(
        "CounterFact, Qwen2 1.8M, molf, lr 5e-5",
        "factlm",
        "facts",
        ("--learning_rate", "5e-5", *_EPOCHS),
    ),
    Cell(
        "CounterFact, Qwen2 1.8M, molf, lr 2e-5",
        "factlm",
        "facts",
        ("--learning_rate", "2e-5", *_EPOCHS),
    ),
    Cell(
        "CounterFact, Qwen2 1.8M, lora, rank 16, lr 2e-4",
        "factlm",
        "facts",
        ("--method", "lora", "--ranks", "16", "--learning_rate", "2e-4", *_EPOCHS),
    ),
    Cell(
        "MedMCQA answers, Llama 0.26M, molf, lr 5e-5",
        "stories260k",
        "med",
        ("--learning_rate", "5e-5", *_EPOCHS),
    ),
    Cell(
        "demo-med, embedded base 3.1M, molf, lr 2e-5",
        "embedded",
        "demo-med",
        ("--learning_rate", "2e-5", "--max_steps", "50", *_STEPS),
    ),
    Cell(
        "CounterFact, Qwen2 1.8M stored in float32, molf, lr 2e-5",
        "factlm-float32",
        "facts",
        ("--learning_rate", "2e-5", *_EPOCHS),
    ),
    Cell(
        "demo-med, embedded base 3.1M stored in float32, molf, lr 2e-5",
        "embedded-float32",
        "demo-med",
        ("--learning_rate", "2e-5", "--max_steps", "50", *_STEPS),
    ),
)


def main() -> None:
    """Run the cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cells", default="", help="only those with this in their name")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="molf-save-rounding-") as scratch:
        folder = Path(scratch)
        _write_inputs(given.data, folder)
        for cell in (cell for cell in _CELLS if given.cells in cell.name):
            for seed in range(given.seeds):
                rows += _measure(cell, seed, folder)
            _show(cell.name, [row for row in rows if row["cell"] == cell.name])
    if given.results is not None:
        record = {"torch": torch.__version__, "seeds": given.seeds, "rows": rows}
        given.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _write_inputs(data: Path, folder: Path) -> None:
    """Write the bases in bfloat16, and the records as prompts and completions."""
    for name in ("factlm", "stories260k", "embedded"):
        source = BASE_PATH if name == "embedded" else data / name
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
        for dtype, path in (
            (torch.float32, folder / f"{name}-float32"),
            (torch.bfloat16, folder / name),
        ):
            model.to(dtype).save_pretrained(path)
            tokenizer.save_pretrained(path)
    with (folder / "facts.jsonl").open("w", encoding="utf-8") as file:
        for record in _lines(data / "counterfact.jsonl"):
            rewrite = record["requested_rewrite"]
            prompt = rewrite["prompt"].format(rewrite["subject"])
            row = {"prompt": prompt, "completion": " " + rewrite["target_new"]["str"]}
            file.write(json.dumps(row) + "\n")
    with (folder / "med.jsonl").open("w", encoding="utf-8") as file:
        for record in _lines(data / "medmcqa_train.jsonl"):
            answer = record["op" + "abcd"[record["cop"]]]
            file.write(
                json.dumps({"prompt": record["question"], "completion": f" {answer}"}) + "\n"
            )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines()[:_RECORDS]:
        yield json.loads(line)


def _measure(cell: Cell, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Train once, round the trained model both ways, and measure all models."""
    base, run = folder / cell.base, folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    arguments = ["train", "--model", str(base), "--seed", str(seed), "--save_dtype", "float32"]
    task = "custom" if (folder / f"{cell.task}.jsonl").exists() else cell.task
    data = str(folder / f"{cell.task}.jsonl") if task == "custom" else None
    arguments += ["--task", task, "--max_eval_samples", "2", "--output_dir", str(run)]
    if data is not None:
        arguments += ["--data", data, "--eval_data", data]
    _run([*arguments, *cell.options])
    models = {"base": base, "float32": run / "model"}
    for rounding in _ROUNDINGS:
        models[rounding] = run / f"model-{rounding}"
        export = ["export", str(run), "--dtype", "bfloat16", "--save_rounding", rounding]
        _run([*export, "--output_dir", str(models[rounding])])
    options = TaskOptions(name=task, data=data, eval_data=data, seed=seed)
    samples = load_task(options).training_samples[:_LOSS_SAMPLES]
    losses = {name: _loss(path, samples) for name, path in models.items()}
    for name in (*_ROUNDINGS, "float32"):
        update = _update(base, models["float32"], models[name]).record()
        yield {
            "cell": cell.name,
            "seed": seed,
            "saved": name,
            "moved_share": update["moved_share"],
            "kept_share": update["kept_share"],
            "update_error": update["update_error"],
            "loss_base": losses["base"],
            "loss": losses[name],
            "gain_lost": (losses[name] - losses["float32"]) / (losses["base"] - losses["float32"]),
        }


def _run(arguments: list[str]) -> None:
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        code = molf(arguments)
    finally:
        sys.stdout = stdout
    if code:
        raise SystemExit(code)


def _loss(path: Path, samples: Any) -> float:
    """Return the mean loss per completion token, in float32."""
    loaded = load_model(str(path))
    encoded = encode_samples(loaded.tokenizer, samples, 512)
    total = count = 0.0
    loaded.model.eval()
    with torch.no_grad():
        for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
            targets = torch.tensor([labels])
            tokens = int((targets[:, 1:] != -100).sum())
            loss = loaded.model(input_ids=torch.tensor([ids]), labels=targets).loss
            total += float(loss) * tokens
            count += tokens
    return total / count


def _update(base: Path, trained: Path, saved: Path) -> SavedUpdate:
    """Compare the saved model's update with the trained one's."""
    start, end, stored = (StoredCheckpoint(str(path)) for path in (base, trained, saved))
    update = SavedUpdate()
    for name in end.tensors:
        before, after = start.read(name).float(), end.read(name)
        update.add(before, after, stored.read(name), after != before)
    return update


def _show(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"{name}: loss of the base {rows[0]['loss_base']:.3f}", flush=True)
    for saved in (*_ROUNDINGS, "float32"):
        of = [row for row in rows if row["saved"] == saved]
        figures = "  ".join(
            f"{key} {_mean([row[key] for row in of])}"
            for key in ("moved_share", "kept_share", "update_error", "loss", "gain_lost")
        )
        print(f"  {saved:10}  {figures}", flush=True)


def _mean(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    width = _T.get(len(values), 2.0) * deviation / math.sqrt(len(values))
    return f"{mean:.4f} [{mean - width:.4f}, {mean + width:.4f}]"


if __name__ == "__main__":
    main()
