"""Time the evaluation of `fact` and `med` against a simple loop over records.

The loop tokenizes each prompt, computes the next token's probabilities (one forward pass per prompt
for all targets), and generates an answer with as many tokens as the task allows. Both must find the
same metrics. Rounds are interleaved in one process; the table has medians and the median of the
per-round ratios with its 95% bootstrap interval.

    python benchmarks/evaluation.py --model DIR --fact counterfact.jsonl --med medmcqa.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from molf.job.model.loading import LoadedModel, load_model
from molf.measure import EvaluationSettings
from molf.tasks import TaskOptions, load_task
from molf.tasks.med import parse_letter
from step_time import ratio_interval

TOLERANCE = 1e-5
MED_TOKENS = 8
Scores = dict[str, float]


def next_log_probs(loaded: LoadedModel, context: list[int]) -> torch.Tensor:
    """Return the log-probabilities of all tokens after a context."""
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([context], device=loaded.model.device)).logits
    return logits[0, -1].float().log_softmax(-1)


def log_probs(loaded: LoadedModel, prompt: str, targets: list[str]) -> list[float]:
    """Return the log-probabilities of the first token of each target after a prompt."""
    texts = [loaded.tokenizer(f"{prompt} {t}", return_offsets_mapping=True) for t in targets]
    rows = [text["input_ids"] for text in texts]
    # Find the first token with a character of the target: the space may be a separate token.
    stops = [
        next(i for i, (_, end) in enumerate(text["offset_mapping"]) if end > len(prompt) + 1)
        for text in texts
    ]
    shared = 0
    while shared < min(stops) and len({row[shared] for row in rows}) == 1:
        shared += 1
    after_prompt = next_log_probs(loaded, rows[0][:shared])
    found = []
    for row, stop in zip(rows, stops, strict=True):
        steps = [next_log_probs(loaded, row[:i])[row[i]] for i in range(shared + 1, stop + 1)]
        found.append(sum(map(float, steps), float(after_prompt[row[shared]])))
    return found


def answer(loaded: LoadedModel, prompt: str, tokens: int) -> str:
    """Return the greedy answer to a prompt."""
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
    pad_id = loaded.tokenizer.eos_token_id
    with torch.inference_mode():
        output = loaded.model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=pad_id
        )
    new = output[0, inputs["input_ids"].shape[1] :]
    text: str = loaded.tokenizer.decode(
        new, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def mean(values: list[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


def fact_loop(loaded: LoadedModel, records: list[dict[str, Any]]) -> Scores:
    """Measure changed facts, record by record."""
    rewrites = [record["requested_rewrite"] for record in records]
    targets = [[r["target_new"]["str"], r["target_true"]["str"]] for r in rewrites]
    longest = max(len(loaded.tokenizer(f" {t}")["input_ids"]) for pair in targets for t in pair)
    shares: dict[str, list[float]] = {name: [] for name in ("es", "ps", "ns")}
    magnitudes: dict[str, list[float]] = {name: [] for name in ("em", "pm", "nm")}
    starts: dict[str, list[float]] = {name: [] for name in ("acc_new", "acc_true")}
    for record, rewrite, pair in zip(records, rewrites, targets, strict=True):
        prompt = rewrite["prompt"].format(rewrite["subject"])
        kinds = ([prompt], record["paraphrase_prompts"], record["neighborhood_prompts"])
        for share, magnitude, prompts in zip(shares, magnitudes, kinds, strict=True):
            for asked in prompts:
                new, true = log_probs(loaded, asked, pair)
                wanted, other = (true, new) if share == "ns" else (new, true)
                shares[share].append(wanted > other)
                magnitudes[magnitude].append(math.exp(wanted) - math.exp(other))
        text = answer(loaded, prompt, longest + 1).strip()
        for name, target in zip(starts, pair, strict=True):
            starts[name].append(text.startswith(target))
    return {name: mean(values) for name, values in {**shares, **magnitudes, **starts}.items()}


def med_loop(loaded: LoadedModel, records: list[dict[str, Any]]) -> Scores:
    """Ask multiple-choice questions, record by record."""
    answers, likeliest, rights = [], [], []
    limit = min(1024, loaded.model.config.max_position_embeddings)
    for record in records:
        options = zip("ABCD", (record[f"op{letter}"] for letter in "abcd"), strict=True)
        lines = [f"{letter}. {str(option).strip()}" for letter, option in options]
        prompt = "\n".join([f"Question: {record['question'].strip()}", *lines, "Answer:"])
        right = "ABCD"[record["cop"]]
        if len(loaded.tokenizer(f"{prompt} {right}")["input_ids"]) + 1 > limit:
            continue  # too long
        found = log_probs(loaded, prompt, list("ABCD"))
        likeliest.append("ABCD"[found.index(max(found))] == right)
        answers.append(parse_letter(answer(loaded, prompt, MED_TOKENS)))
        rights.append(answers[-1] == right)
    return {
        "accuracy": mean([*map(float, rights)]),
        "unparsed": mean([float(letter is None) for letter in answers]),
        "accuracy_logprob": mean([*map(float, likeliest)]),
    }


LOOPS: dict[str, Callable[[LoadedModel, list[dict[str, Any]]], Scores]] = {
    "fact": fact_loop,
    "med": med_loop,
}


def ours(loaded: LoadedModel, name: str, file: Path, batch_size: int) -> Scores:
    """Evaluate with molf's task, including reading the data and computing intervals."""
    options = TaskOptions(name=name, eval_data=str(file), evaluation_only=True)
    settings = EvaluationSettings(batch_size=batch_size)
    evaluation = load_task(options).evaluate(loaded.model, loaded.tokenizer, settings)
    return {metric: found.value for metric, found in evaluation.metrics.items()}


def timed(run: Callable[[], Scores]) -> tuple[float, Scores]:
    """Return the seconds of a run, and its result."""
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def compare(
    loaded: LoadedModel, name: str, file: Path, options: argparse.Namespace
) -> Iterator[tuple[float, float]]:
    """Yield the seconds of molf's task and of the loop, round by round.

    Raises:
        ValueError: Their metrics differ.
    """
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    runs = {
        "ours": lambda: ours(loaded, name, file, options.batch_size),
        "loop": lambda: LOOPS[name](loaded, records),
    }
    for index in range(options.rounds):
        found = {run: timed(runs[run]) for run in (sorted(runs) if index % 2 else runs)}
        mine, theirs = found["ours"][1], found["loop"][1]
        wrong = {m: (mine[m], v) for m, v in theirs.items() if abs(mine[m] - v) > TOLERANCE}
        if wrong:
            raise ValueError(f"{name}: (ours, loop) differ in {wrong}")
        yield found["ours"][0], found["loop"][0]


def sample(file: Path, count: int, folder: Path) -> Path:
    """Write the first `count` records; repeat them if there are fewer."""
    lines = file.read_text(encoding="utf-8").splitlines()
    written = folder / f"{file.stem}_{count}.jsonl"
    written.write_text("".join(f"{lines[i % len(lines)]}\n" for i in range(count)), "utf-8")
    return written


def main() -> None:
    """Run the benchmark and print its table."""
    import tempfile

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a checkpoint in transformers format")
    parser.add_argument("--fact", type=Path, help="JSONL in CounterFact's layout")
    parser.add_argument("--med", type=Path, help="JSONL in MedMCQA's layout")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    loaded = load_model(options.model)
    loaded.model.to(options.device).eval()

    results = {}
    print("task  records  ours s  loop s  ours/loop")
    for name, count in (("fact", options.requests), ("med", options.questions)):
        file = getattr(options, name)
        if file is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rounds = list(compare(loaded, name, sample(file, count, Path(folder)), options))
        ratio, low, high = ratio_interval([mine / loop for mine, loop in rounds])
        mine, loop = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{name:<5} {count:>7} {mine:>7.2f} {loop:>7.2f}  {ratio:.3f} ({low:.3f}-{high:.3f})")
        results[name] = {
            "records": count,
            "seconds": [{"ours": mine, "loop": loop} for mine, loop in rounds],
            "ratio": {"median": ratio, "low": low, "high": high},
        }
    if options.json:
        record = {
            "settings": {
                key: getattr(options, key) for key in ("batch_size", "rounds", "threads", "device")
            },
            "model": {
                "type": loaded.config.model_type,
                "parameters": sum(p.numel() for p in loaded.model.parameters()),
            },
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
