"""Load odd records with the tasks and count used, left out and refused ones.

    python scripts/fuzz_records.py --count 2000 --seed 0 --model CHECKPOINT

Each record is a valid one of its task and layout with a few changes. It is written between two
valid ones in one of the file formats, read, and encoded for training. The record must be *used*,
*left out* and counted, or *refused* by one line; anything else is a fault. Prints figures and
faults as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from molf.data.files import Record
from molf.errors import InputError
from molf.tasks import TaskOptions, load_task
from molf.tasks.preview import preview

FORMATS = ("jsonl", "json", "parquet", "csv")
_LONGEST = 100_000  # tokens; no record is longer

_USER = {"role": "user", "content": "How warm is it?"}
_ASSISTANT = {"role": "assistant", "content": "It is warm."}
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "out"}}}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

GOOD: dict[str, tuple[Record, ...]] = {
    "custom": (
        {"prompt": "Two and two is", "completion": " four."},
        {"messages": [{"role": "system", "content": "Be kind."}, _USER, _ASSISTANT]},
        {"messages": [_USER, _ASSISTANT, _USER, {**_ASSISTANT, "weight": 0}, _USER, _ASSISTANT]},
        {"prompt": [_USER], "completion": [_ASSISTANT]},
        {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": "Hello."}]}
                for role in ("assistant", "user", "assistant")
            ]
        },
        {
            "messages": [_USER, {"role": "assistant", "tool_calls": [_CALL]}, _USER, _ASSISTANT],
            "tools": [_TOOL],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ),
    "sql": (
        {
            "sql_prompt": "How many?",
            "sql_context": "CREATE TABLE t (a INT);",
            "sql": "SELECT count(*) FROM t",
            "sql_complexity": "basic",
        },
    ),
    "med": (
        {
            "question": "Which?",
            **{name: name for name in ("opa", "opb", "opc", "opd")},
            "cop": 2,
            "subject_name": "Anatomy",
        },
    ),
    "math": (
        {"query": "How many?", "response": "The answer is: 3", "type": "GSM_AnsAug"},
        {"question": "How many?", "answer": "#### 3"},
    ),
    "fact": (
        {
            "requested_rewrite": {
                "prompt": "{} lives in",
                "subject": "Anna",
                "target_true": {"str": "Paris"},
                "target_new": {"str": "Rome"},
            },
            "paraphrase_prompts": ["The home of Anna is"],
            "neighborhood_prompts": ["Bruno lives in"],
        },
    ),
}

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3.0, 3.5, 1e308, 10**30, "", " ", "\n", "x", "{}", "[]", "null",
    "0", "nan", "\x00", "\ufeff", "\u2028", "\ud800", "e\u0301", "\U0001f600", "<|end|>",
    "<|im_end|>", "<|im_start|>assistant\n", "{{ messages }}", "{% raise %}", "{}{}", "a" * 3000,
    [], {}, [[]], [{}], [None], ["x"], {"x": None}, {"str": " "}, {"role": "user"},
    [{"role": "assistant", "content": ""}], [{"type": "image"}], [{"type": "text"}],
    [{"type": "text", "text": ""}], [{"role": "tool", "content": "x"}], "assistant", "system",
    {"": ""}, {"content": {"text": "x"}},
)  # fmt: skip


@dataclass
class Figures:
    """The result of a fuzzer run.

    Attributes:
        tried: Number of records.
        outcomes: Numbers of used, left out and refused records, by file format.
        faults: The other records, with their outcome.
    """

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def odd_records(count: int, seed: int) -> Iterator[tuple[str, str, list[Record]]]:
    """Yield (task, file format, records); the second record is odd."""
    rng = random.Random(seed)
    for position in range(count):
        task = rng.choice([*GOOD, *["custom"] * 4])
        layout = rng.choice(GOOD[task])
        odd = deepcopy(layout)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            odd = _changed(odd, rng)
        if not isinstance(odd, dict):
            odd = {"x": odd}
        yield task, FORMATS[position % len(FORMATS)], [layout, odd, layout]


def _changed(value: Any, rng: random.Random) -> Any:
    """Return a value with one part changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        action = rng.random()
        if action < 0.15:
            return {key: entry for key, entry in value.items() if key != name}
        if action < 0.25:
            return {**value, rng.choice(("weight", "name", "extra", "tools")): rng.choice(ODD)}
        return {**value, name: _changed(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        action = rng.random()
        if action < 0.15:
            return value[:place] + value[place + 1 :]
        if action < 0.25:
            return rng.sample(value, len(value))
        return [*value[:place], _changed(value[place], rng), *value[place + 1 :]]
    return deepcopy(rng.choice(ODD))


def fuzz(cases: Iterator[tuple[str, str, list[Record]]], tokenizer: Any) -> Figures:
    """Read and encode each case in a separate directory."""
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task, suffix, records in cases:
            path = Path(folder) / f"records.{suffix}"
            if not _written(path, records):
                continue  # the format cannot represent them
            figures.tried += 1
            try:
                outcome = _outcome(task, path, tokenizer)
            except InputError as error:
                outcome = "refused"
                if "\n" in str(error) or len(str(error)) > 2000:
                    figures.faults.append(f"{task} {records[1]!r}: not one line: {error!r}")
            except Exception as error:  # a fault
                figures.faults.append(f"{task} {suffix} {records[1]!r}: {error!r}")
                continue
            figures.outcomes[f"{suffix} {outcome}"] += 1
    return figures


def _outcome(task: str, path: Path, tokenizer: Any) -> str:
    data = load_task(TaskOptions(name=task, data=str(path), preview=True)).data_records()
    if len(data.samples) + data.left_out.total() != data.count:
        raise AssertionError(f"{data.count} records, but {len(data.samples)} and {data.left_out}")
    for record in preview(tokenizer, data, _LONGEST):
        if record.loss_tokens < 1 or record.tokens < record.loss_tokens:
            raise AssertionError(f"record {record.index} has no token with loss")
    return "left out" if data.left_out else "used"


def _written(path: Path, records: list[Record]) -> bool:
    with contextlib.suppress(
        pyarrow.ArrowException, UnicodeEncodeError, OverflowError, TypeError, csv.Error
    ):
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        elif path.suffix == ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                names = list({name: None for record in records for name in record})
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(records)
        else:
            lines = [json.dumps(record) for record in records]
            is_list = path.suffix == ".json"
            path.write_text(f"[{','.join(lines)}]" if is_list else "\n".join(lines))
        return True
    return False


def main() -> None:
    """Run the fuzzer from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", required=True, help="a checkpoint with a chat template")
    options = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    figures = fuzz(odd_records(options.count, options.seed), tokenizer)
    sys.stdout.write(json.dumps({**vars(figures), "faults": len(figures.faults)}) + "\n")
    sys.stdout.write("".join(f"{fault}\n" for fault in figures.faults))
    sys.exit(bool(figures.faults))


if __name__ == "__main__":
    main()
