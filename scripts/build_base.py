"""Build the shipped base model: train a tokenizer and a small Qwen2 on the texts of `molf.world`.

    python scripts/build_base.py

It takes 45 minutes on one CPU core. The checkpoint, its scores and its model card are written
beside `--output` and renamed when complete.
"""

import argparse
import json
import math
import platform
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from molf.data.encoding import encode_samples
from molf.data.samples import PromptCompletion
from molf.measure.settings import EvaluationSettings
from molf.measure.tokens import IGNORED
from molf.tasks.base import Task
from molf.tasks.med import load_med
from molf.tasks.options import TaskOptions
from molf.tasks.sql import load_sql
from molf.world import (
    BASE_PATH,
    Drill,
    World,
    build_world,
    counterfact_records,
    held_out_text,
    is_practised,
    letter_drills,
    med_namings,
    med_practice,
    med_records,
    sql_practice,
    sql_records,
    training_documents,
)

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 3328  # at most; the texts may have fewer words
TOKENIZER_QUESTIONS = 3000  # per kind at most; with more, rare words get no token of their own
MAX_LENGTH = 256
# Stages before training on all texts: kinds of text, and steps. A model trained on questions before
# it can name the letter of an option stays at chance for thousands of steps.
STAGES = ((("letters",), 450), (("letters", "naming"), 350), (("naming", "med"), 1200))
# Tokens per step of each kind in the stages; later, batches of exercises per epoch.
STAGE_TOKENS = {"letters": 700, "naming": 700, "med": 1400}
EPOCH_BATCHES = {"naming": 40, "med": 120}
# Documents are sorted by length within pools of this many, so that batches need little padding.
POOL = 8192

# Token ids and labels of the same length.
Labelled = tuple[list[int], list[int]]
# A kind of text, and sequences of that kind.
Batch = tuple[str, list[Labelled]]

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# molf base: a small model of an invented world

A Qwen2 language model with {parameters:,} parameters and a byte-level BPE tokenizer of
{vocabulary:,} tokens. It has learned the invented people, cities, companies, drugs and conditions
of `molf.world.build_world({seed})` and nothing else; all names are made up and no outside text was
used. It has practised some forms of multiple-choice questions and of SQL queries, and none of the
others. molf ships it so that fine-tuning, editing facts and measuring forgetting can be tried
without a download. It is of no use for anything but that.

Weights are stored in float16, and loaded in float32 unless another `dtype` is given.

## How it was built
`python scripts/build_base.py --seed {seed} --epochs {epochs}`: {steps:,} steps of Muon and AdamW
over {documents:,} texts, exercises and questions with {tokens:,} tokens; first exercises alone,
then {epochs} epochs of the texts with them. {seconds:,} seconds on {threads} CPU thread(s).
World: SHA-256 `{world}`.

## Scores
Measured on the stored checkpoint, before any fact is edited.

| score | value |
|---|---|
| efficacy `es` of the {requests} demo requests (p(new) > p(true)) | {es:.3f} |
| paraphrase `ps` | {ps:.3f} |
| neighbourhood `ns` (p(true) >= p(new): a tie counts here) | {ns:.3f} |
| facts completed correctly by greedy decoding, over all phrasings | {known:.3f} |
| the same after an unrelated sentence | {known_in_context:.3f} |
| loss on the held-out text, paragraph by paragraph, nats per token | {held_out_loss:.3f} |
| `demo-med`, {med_questions} questions: answered correctly | {med_accuracy:.3f} |
| of them, in wordings that were practised | {med_accuracy_practised:.3f} |
| of them, in new wordings | {med_accuracy_new:.3f} |
| `demo-sql`, {sql_questions} questions: execution accuracy | {sql_execution_accuracy:.3f} |
{by_complexity}
"""


def main() -> None:
    """Train, measure and write the checkpoint."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    world = build_world(arguments.seed)
    documents = training_documents(world)
    practice = practice_samples(world)
    questions = [
        sample.prompt + sample.completion
        for kind in practice.values()
        for sample in kind[:TOKENIZER_QUESTIONS]
    ]
    tokenizer = train_tokenizer([*documents, *questions])
    sequences = encode(tokenizer, documents, practice, letter_drills(world))
    model = make_model(tokenizer)

    start = time.perf_counter()
    steps = train(model, sequences, tokenizer.pad_token_id, arguments)
    seconds = round(time.perf_counter() - start)

    partial = arguments.output.with_name(arguments.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, tokenizer, partial)
    scores = {
        **score_checkpoint(partial, world),
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "documents": sum(map(len, sequences.values())),
        "tokens": sum(len(ids) for kind in sequences.values() for ids, _ in kind),
        "steps": steps,
        "epochs": arguments.epochs,
        "learning_rate": arguments.learning_rate,
        "batch_tokens": arguments.batch_tokens,
        "seconds": seconds,
        "threads": arguments.threads,
        "seed": arguments.seed,
        "world": world.fingerprint(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (partial / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(card(scores), encoding="utf-8")
    replace_directory(partial, arguments.output)
    print(json.dumps(scores, indent=2))


def card(scores: Mapping[str, Any]) -> str:
    """Return the model card."""
    by_complexity = scores["sql_execution_accuracy_by_complexity"]
    rows = [f"| of them, {name} | {value:.3f} |" for name, value in by_complexity.items()]
    return CARD.format(**scores, by_complexity="\n".join(rows))


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=BASE_PATH, help="directory of the checkpoint"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the world, the weights and the order of documents"
    )
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training documents")
    parser.add_argument(
        "--learning-rate", type=float, default=3e-3, help="peak of the cosine schedule"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=2048, help="tokens per step, padding included"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


def practice_samples(world: World) -> dict[str, list[PromptCompletion]]:
    """Return the practice questions by task, with the tasks' own prompts."""
    naming = dict.fromkeys(("train", "validation"), med_namings(world))
    med = dict.fromkeys(("train", "validation"), med_practice(world))
    sql = dict.fromkeys(("train", "test"), sql_practice(world))
    tasks: dict[str, Task] = {
        "naming": load_med(TaskOptions(name="naming practice"), naming),
        "med": load_med(TaskOptions(name="med practice"), med),
        "sql": load_sql(TaskOptions(name="sql practice"), sql),
    }
    return {
        name: [sample for sample in task.training_samples if isinstance(sample, PromptCompletion)]
        for name, task in tasks.items()
    }


def encode(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    practice: Mapping[str, Sequence[PromptCompletion]],
    drills: Sequence[Drill],
) -> dict[str, list[Labelled]]:
    """Return token ids with labels by kind of text; of questions, only answers carry loss."""
    texts = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(documents)["input_ids"]]
    sequences = {
        "texts": [(ids, ids) for ids in texts],
        "letters": [encode_drill(tokenizer, drill) for drill in drills],
    }
    for name, samples in practice.items():
        encoded = encode_samples(tokenizer, samples, MAX_LENGTH)
        if encoded.left_out:
            raise ValueError(f"A {name} sample has {encoded.longest} tokens, over {MAX_LENGTH}.")
        sequences[name] = list(zip(encoded.input_ids, encoded.labels, strict=True))
    return sequences


def encode_drill(tokenizer: PreTrainedTokenizerBase, drill: Drill) -> Labelled:
    """Return a drill's token ids and labels; only answers carry loss."""
    ids: list[int] = tokenizer(drill.given)["input_ids"]
    labels = [IGNORED] * len(ids)
    for text, right in drill.answers:
        question = tokenizer(f"\n {text}")["input_ids"]
        answer = tokenizer(f" {right}")["input_ids"]
        ids = ids + question + answer
        labels += [IGNORED] * len(question) + answer
    return ids, labels


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; like Qwen2's, it adds neither BOS nor EOS."""
    tokenizer = Tokenizer(models.BPE())
    # Each digit is a token, so that all numbers are tokenized alike.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=MAX_LENGTH
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Return the untrained model."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def train(
    model: Qwen2ForCausalLM,
    sequences: Mapping[str, Sequence[Labelled]],
    pad_token_id: int,
    arguments: argparse.Namespace,
) -> int:
    """Train: 3% of warm-up, the peak rate up to half of the steps, then a cosine.

    Muon (Jordan et al., 2024) trains the matrices, AdamW the rest. With AdamW alone the facts take
    several times as many epochs to learn.

    Returns:
        The number of steps.
    """
    rng = random.Random(arguments.seed)
    endless = {
        kind: make_endless_batches(rng, kind, sequences[kind], tokens)
        for kind, tokens in STAGE_TOKENS.items()
    }
    steps = [
        [next(endless[kind]) for kind in kinds] for kinds, count in STAGES for _ in range(count)
    ]
    for _ in range(arguments.epochs):
        # Each step uses one kind of text: mixed with other kinds, facts are not learned.
        epoch = [
            [batch]
            for kind in ("texts", "sql")
            for batch in make_batches(rng, kind, sequences[kind], arguments.batch_tokens)
        ]
        epoch += [
            [next(endless[kind])] for kind, count in EPOCH_BATCHES.items() for _ in range(count)
        ]
        rng.shuffle(epoch)
        steps += epoch
    inner = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    outer = [weight for weight in model.parameters() if weight.ndim != 2]
    outer.append(model.get_input_embeddings().weight)
    rate = arguments.learning_rate
    optimizers = [
        torch.optim.Muon(inner, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    warmup = max(1, round(0.03 * len(steps)))

    def factor(step: int) -> float:
        decayed = max(0.0, 2 * step / len(steps) - 1)  # share of the second half that is done
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * decayed)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(each, factor) for each in optimizers]
    losses: dict[str, list[float]] = defaultdict(list)
    model.train()
    start = time.perf_counter()
    for number, step in enumerate(steps, start=1):
        for kind, batch in step:
            loss = answer_loss(model, batch, pad_token_id)
            loss.backward()
            losses[kind].append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if number % 100 == 0 or number == len(steps):
            seconds = time.perf_counter() - start
            means = "  ".join(f"{kind} {mean(losses[kind]):.3f}" for kind in sorted(losses))
            print(f"step {number}/{len(steps)}  loss: {means}  {seconds:.0f} s", flush=True)
            losses.clear()
    model.eval()
    return len(steps)


def answer_loss(
    model: Qwen2ForCausalLM, batch: Sequence[Labelled], pad_token_id: int
) -> torch.Tensor:
    """Return the mean loss over the labels; compute logits only at labelled positions."""
    input_ids = pad([ids for ids, _ in batch], pad_token_id)
    labels = pad([labels for _, labels in batch], IGNORED)[:, 1:]
    # No mask needed: padding is on the right, and attention is causal.
    hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
    counted = labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), labels[counted])


def make_batches(
    rng: random.Random, kind: str, sequences: Sequence[Labelled], batch_tokens: int
) -> list[Batch]:
    """Return one epoch of batches, each of similarly long sequences and at most `batch_tokens`.

    Each document is a separate sequence from position 0, like a prompt at inference.
    """
    order = list(range(len(sequences)))
    rng.shuffle(order)
    batches: list[list[Labelled]] = []
    for begin in range(0, len(order), POOL):
        pool = [sequences[index] for index in order[begin : begin + POOL]]
        batch: list[Labelled] = []
        for sequence in sorted(pool, key=lambda each: len(each[0])):
            if batch and len(sequence[0]) * (len(batch) + 1) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(sequence)
        batches.append(batch)
    rng.shuffle(batches)
    return [(kind, batch) for batch in batches]


def make_endless_batches(
    rng: random.Random, kind: str, sequences: Sequence[Labelled], batch_tokens: int
) -> Iterator[Batch]:
    """Yield batches of all sequences in endless repetition."""
    while True:
        yield from make_batches(rng, kind, sequences, batch_tokens)


def pad(sequences: Sequence[list[int]], value: int) -> torch.Tensor:
    """Return the sequences as one tensor [sequences, longest], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=value
    )


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a checkpoint with 16-bit weights.

    float16 rather than bfloat16: these weights are far inside its range, and it has three more bits
    of precision. The configuration names float32, so that the weights load in float32: float16
    would lose small updates in training.
    """
    model.half().save_pretrained(path)
    config = AutoConfig.from_pretrained(path)
    config.dtype = "float32"
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    # safetensors writes files that only their owner can read.
    (path / "model.safetensors").chmod(0o644)


def score_checkpoint(path: Path, world: World) -> dict[str, Any]:
    """Measure a checkpoint's knowledge of the world before fine-tuning on the demo requests."""
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    records = counterfact_records(world)
    efficacy, paraphrases, neighbors = [], [], []
    for record in records:
        rewrite = record["requested_rewrite"]
        targets = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        efficacy.append((rewrite["prompt"].format(rewrite["subject"]), *targets))
        paraphrases += [(prompt, *targets) for prompt in record["paraphrase_prompts"]]
        neighbors += [(prompt, *targets) for prompt in record["neighborhood_prompts"]]
    statements = [(prompt, fact.object.name) for fact in world.facts for prompt in fact.prompts]
    aside = "The train was late again. "
    return {
        "requests": len(records),
        "es": mean(prefers_new(model, tokenizer, efficacy)),
        "ps": mean(prefers_new(model, tokenizer, paraphrases)),
        "ns": 1 - mean(prefers_new(model, tokenizer, neighbors)),
        "known": mean(completes(model, tokenizer, statements)),
        "known_in_context": mean(
            completes(model, tokenizer, [(aside + prompt, target) for prompt, target in statements])
        ),
        "held_out_loss": text_loss(model, tokenizer, held_out_text(world)),
        **score_questions(model, tokenizer, world),
    }


def score_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World
) -> dict[str, Any]:
    """Measure the share of questions of the other demo tasks that the base model answers."""
    settings = EvaluationSettings(batch_size=64)
    med_task = load_med(TaskOptions(name="demo-med", evaluation_only=True), med_records(world))
    med = med_task.evaluate(model, tokenizer, settings)
    sql_task = load_sql(TaskOptions(name="demo-sql", evaluation_only=True), sql_records(world))
    sql = sql_task.evaluate(model, tokenizer, settings)
    right = {True: [], False: []}  # type: dict[bool, list[bool]]
    for entry, record in zip(med.predictions, med_records(world)["validation"], strict=True):
        right[is_practised(record)].append(entry["answer"] == entry["expected"])
    return {
        "med_questions": len(med.predictions),
        "med_accuracy": med.metrics["accuracy"].value,
        "med_accuracy_practised": mean(right[True]),
        "med_accuracy_new": mean(right[False]),
        "med_unparsed": med.metrics["unparsed"].value,
        "sql_questions": len(sql.predictions),
        "sql_execution_accuracy": sql.metrics["execution_accuracy"].value,
        "sql_valid": sql.metrics["valid_sql"].value,
        "sql_execution_accuracy_by_complexity": {
            name: metrics["execution_accuracy"].value
            for name, metrics in sql.tables["by_complexity"].items()
        },
    }


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


@torch.inference_mode()
def prefers_new(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[tuple[str, str, str]],
) -> list[bool]:
    """Return for each (prompt, new, true) whether the new target's first token is likelier."""
    result = []
    for begin in range(0, len(cases), 256):
        chunk = cases[begin : begin + 256]
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _, _ in chunk]
        logits = model(input_ids=pad(prompts, tokenizer.pad_token_id)).logits
        for row, (prompt, new, true) in enumerate(chunk):
            last = len(prompts[row]) - 1
            new_id, true_id = (
                tokenizer(f"{prompt} {target}")["input_ids"][last + 1] for target in (new, true)
            )
            result.append(bool(logits[row, last, new_id] > logits[row, last, true_id]))
    return result


@torch.inference_mode()
def completes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    statements: Sequence[tuple[str, str]],
) -> list[bool]:
    """Return for each (prompt, target) whether greedy decoding gives the target."""
    result = []
    for begin in range(0, len(statements), 256):
        chunk = statements[begin : begin + 256]
        prompts = tokenizer([prompt for prompt, _ in chunk])["input_ids"]
        texts = tokenizer([f"{prompt} {target}" for prompt, target in chunk])["input_ids"]
        predicted = model(input_ids=pad(texts, tokenizer.pad_token_id)).logits.argmax(-1)
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            # Greedy decoding gives the target if each of its tokens is the likeliest in turn.
            result.append(
                predicted[row, len(prompt) - 1 : len(text) - 1].tolist() == text[len(prompt) :]
            )
    return result


@torch.inference_mode()
def text_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Return the mean loss over the tokens of a text, each paragraph as a separate sequence."""
    total, count = 0.0, 0
    for paragraph in text.split("\n\n"):
        input_ids = torch.tensor([tokenizer(paragraph)["input_ids"] + [tokenizer.eos_token_id]])
        predictions = input_ids.shape[1] - 1
        total += model(input_ids=input_ids, labels=input_ids).loss.item() * predictions
        count += predictions
    return total / count


def replace_directory(new: Path, old: Path) -> None:
    """Move a finished directory into place; delete the previous one only afterwards."""
    retired = old.with_name(old.name + ".old")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        old.rename(retired)
    new.rename(old)
    shutil.rmtree(retired, ignore_errors=True)


if __name__ == "__main__":
    main()
