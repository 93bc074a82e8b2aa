"""The user's own records: prompts with completions, conversations, instructions or texts."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from molf.data.records import Part, read_parts
from molf.data.sample_store import ChosenSamples
from molf.data.samples import PromptCompletion, Sample
from molf.data.selection import draw, required_hold_out, samples_of_runs, weighted
from molf.errors import InputError
from molf.measure.metric import Evaluation, Metric, bootstrap_mean, wilson
from molf.measure.settings import EvaluationSettings, Progress
from molf.measure.spread import spread
from molf.tasks.answers import expected_answers, generate_answers
from molf.tasks.base import DataRecords, Task
from molf.tasks.custom_records import CustomData, parse_parts
from molf.tasks.options import TaskOptions
from molf.tasks.predictions import (
    check_predictions,
    left_out_prediction,
    predicted_sample,
    restrict_to_sample,
)
from molf.tasks.validation import part_record, split_for_validation

_SPARE_TOKENS = 8  # generated beyond the longest completion: white space, then the end token
_MOST_NEW_TOKENS = 512
_ENDING = 20  # last characters of an answer, compared to detect another record
NO_ANSWER = "a text without a prompt"
_MOST_LOSS = 700.0  # nats; exp() of more overflows a float


class CustomTask(Task):
    """Train on completions; measure their loss and the exact match of greedy answers."""

    prompt = "texts as they are; conversations and instructions through the chat template"
    prompt_version = 1

    def __init__(
        self,
        name: str,
        data: CustomData,
        evaluated: Sequence[int],
        source: dict[str, str],
        *,
        read: CustomData | None = None,
        trained_on: Sequence[int] = (),
        held_out: Sequence[int] = (),
        samples_of_runs: Sequence[Sequence[int]] = (),
    ) -> None:
        """Hold the samples.

        Args:
            name: The task's name.
            data: The evaluation data.
            evaluated: Indices of the records of `data` to evaluate.
            source: Origin of the records, for the run's files.
            read: The training data; None where nothing is trained.
            trained_on: Indices of the records of `read` to train on.
            held_out: Indices of the records of `read` that are kept for evaluation.
            samples_of_runs: Sets of records that earlier runs on this data may have evaluated.
        """
        training = ChosenSamples({} if read is None else read.samples, trained_on)
        super().__init__(name, training, source)
        self._data = data
        self._read = read or CustomData(0, {}, Counter())
        self._trained_on = trained_on
        self._held_out = held_out
        self._samples_of_runs = samples_of_runs
        self._evaluated = list(evaluated)

    def _metric_names(self) -> tuple[str, ...]:
        samples = (self._data.samples[index] for index in self._evaluated)
        answered = ("exact_match",) if any(sample.has_answer for sample in samples) else ()
        return ("loss", "perplexity", *answered)

    def data_records(self) -> DataRecords:
        """Return the records of the training data."""
        read = self._read
        return DataRecords(
            read.records,
            read.samples,
            read.left_out,
            self._trained_on,
            self._held_out,
            formats=read.formats,
            is_weighted=any(weight != 1 for _, weight in read.weights),
        )

    def description(self) -> dict[str, Any]:
        """Return the task's entries for the configuration file of a run."""
        return {
            **super().description(),
            "format": ", ".join(self._read.formats or self._data.formats),
            "training_records_left_out": dict(self._read.left_out),
            "evaluation_records_left_out": dict(self._data.left_out),
        }

    @property
    def evaluation_count(self) -> int:
        """The number of records to evaluate."""
        return len(self._evaluated)

    def evaluated_samples(self, most: int) -> list[Sample]:
        """Return evaluated records."""
        return [self._data.samples[index] for index in spread(self._evaluated, most)]

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        settings: EvaluationSettings,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Measure the loss per completion token, and generate each record's last answer.

        Records longer than the limit are left out and counted.
        """
        from molf.data.encoding import encode_tokenized, generation_contexts, tokenize_samples
        from molf.measure.generate import padding_id
        from molf.measure.inference import length_limit
        from molf.measure.likelihood import sequence_losses

        samples = [self._data.samples[index] for index in self._evaluated]
        tokenized = list(tokenize_samples(tokenizer, samples))
        limit = length_limit(model, settings.max_length)
        encoded = encode_tokenized(tokenizer, tokenized, limit)
        kept = [self._evaluated[position] for position in encoded.kept]
        losses = sequence_losses(
            model,
            encoded.input_ids,
            encoded.labels,
            pad_id=padding_id(tokenizer),
            batch_size=settings.batch_size,
            progress=progress,
        )
        # A plain text has a loss, and no prompt to answer.
        answered = [i for i, position in enumerate(encoded.kept) if samples[position].has_answer]
        contexts = generation_contexts(tokenizer, [tokenized[encoded.kept[i]] for i in answered])
        longest = max((context.answer_tokens for context in contexts), default=0)
        new_tokens = settings.max_new_tokens or min(longest + _SPARE_TOKENS, _MOST_NEW_TOKENS)
        texts = (
            generate_answers(model, tokenizer, contexts, new_tokens, settings, progress)
            if contexts
            else []
        )
        expected = expected_answers(tokenizer, contexts)
        predictions = [left_out_prediction(index, NO_ANSWER) for index in kept]
        for i, text, answer, context in zip(answered, texts, expected, contexts, strict=True):
            predictions[i] = {**self._prediction(kept[i], text, answer), "prompt": context.prompt}
        # A text of one token has nothing to predict.
        means = [total / count if count else None for total, count in losses]
        for entry, mean in zip(predictions, means, strict=True):
            entry["loss"] = mean
        too_long = sorted(set(self._evaluated).difference(kept))
        predictions += [left_out_prediction(index, "too long") for index in too_long]
        predictions.sort(key=lambda entry: entry["index"])
        loss = bootstrap_mean(
            [mean or 0.0 for mean in means],
            weights=[count for _, count in losses],
            seed=settings.seed,
        )
        return Evaluation(
            metrics={
                "loss": loss,
                "perplexity": _exponential(loss),
                **({"exact_match": _exact_match(texts, expected)} if answered else {}),
            },
            predictions=predictions,
            notes={
                "records_too_long": encoded.left_out,
                "records_left_out": dict(self._data.left_out),
                "records_with_faults": dict(encoded.faults),
                **({"max_new_tokens": new_tokens} if answered else {}),
            },
        )

    def score_predictions(self, predictions: list[dict[str, Any]]) -> Evaluation:
        """Measure `exact_match`; the losses need the model.

        A chat template may add text to an answer. The field `expected` of saved predictions
        contains that text; where it is missing, the record's own answer is expected.
        """
        if "exact_match" not in self._metric_names():
            raise InputError(
                "Invalid predictions with the format text: its metrics are losses, and saved texts "
                "hold no probabilities. Give a model."
            )
        saved = check_predictions(predictions, self._data.records, self._copied_fields)
        sample = predicted_sample(saved, self._evaluated, self._samples_of_runs)
        saved = restrict_to_sample(saved, sample)
        written = {entry["index"]: entry.get("expected") for entry in predictions}
        expected = {index: self._expected(index, written[index]) for index in saved.texts}
        return Evaluation(
            metrics={"exact_match": _exact_match(saved.texts.values(), expected.values())},
            predictions=[
                self._prediction(index, text, expected[index])
                for index, text in sorted(saved.texts.items())
            ],
            notes={
                "not_measured": ["loss", "perplexity", "forgetting_loss"],
                "reason": "texts hold no probabilities",
                "records_left_out": dict(self._data.left_out + Counter(saved.left_out.values())),
            },
        )

    def _expected(self, index: int, written: Any) -> str:
        """Return the expected answer, with the text that a chat template has added."""
        sample = self._data.samples[index]
        if isinstance(sample, PromptCompletion) or not isinstance(written, str):
            return sample.answer
        ending = sample.answer.strip()[-_ENDING:]  # a template may remove reasoning at the start
        if ending not in written:
            raise InputError(
                f"The prediction of record {index} was made on other data: the record's answer is "
                f"{sample.answer.strip()!r:.80}, and not {written.strip()!r:.80}. Give the data "
                "that the predictions were made with."
            )
        return written

    def _copied_fields(self, index: int) -> dict[str, str]:
        """Return the fields that a prediction copies; none for text rendered by a template."""
        sample = self._data.samples.get(index)
        if isinstance(sample, PromptCompletion):
            return {"prompt": sample.prompt, "expected": sample.answer}
        return {}

    def _prediction(self, index: int, text: str, expected: str) -> dict[str, Any]:
        expected = expected.strip()
        is_right = text.strip() == expected
        return {"index": index, "prediction": text, "expected": expected, "right": is_right}


def _exact_match(texts: Iterable[str], expected: Iterable[str]) -> Metric:
    equal = [a.strip() == b.strip() for a, b in zip(texts, expected, strict=True)]
    return wilson(sum(equal), len(equal))


def _exponential(loss: Metric) -> Metric:
    """Convert loss to perplexity, interval included: exp keeps the order of percentiles."""

    def perplexity(value: float) -> float:
        return math.exp(min(value, _MOST_LOSS))

    return replace(
        loss, value=perplexity(loss.value), low=perplexity(loss.low), high=perplexity(loss.high)
    )


def load_custom(options: TaskOptions) -> CustomTask:
    """Load the user's records.

    The evaluation records are the first that exist of: `eval_data`; the test or validation split
    of `data`; a tenth of `data`, held out by the seed. With `eval_part="validation"` they are a
    fixed part of the training records.

    Warns:
        UserWarning: Fields of the records are not read, or records are left out.
    """
    if options.validates:
        return _load_validation(options)
    if options.evaluation_only:
        return _load_for_evaluation(options)
    path = _required_data(options)
    splits = read_parts(path)
    if "train" not in splits:
        raise InputError(f"data: {path} has no training records (only {', '.join(splits)}).")
    read = parse_parts(splits["train"], path, options.format)
    drawn = draw(list(read.samples), options.max_samples, options.seed)
    held_out: list[int] = []
    if options.eval_data is not None:
        data = _read_eval_data(options, options.eval_data)
        evaluated, evaluated_on = list(data.samples), options.eval_data
    elif len(splits) > 1:
        split = _evaluation_split(splits, options)
        data = parse_parts(splits[split], f"{path} ({split})", options.format)
        evaluated, evaluated_on = list(data.samples), f"the {split} split of {path}"
    else:
        data = read
        drawn, held_out = required_hold_out(
            drawn,
            options.seed,
            lambda index: read.samples[index].content,
            path,
            preview=options.preview,
        )
        evaluated = held_out
        evaluated_on = f"{len(held_out)} records held out of {path} (seed {options.seed})"
    return CustomTask(
        options.name,
        data,
        draw(evaluated, options.max_eval_samples, options.seed),
        {"data": path, "evaluated_on": evaluated_on},
        read=read,
        trained_on=weighted(drawn, read.weights, options.seed),
        held_out=held_out,
    )


def _load_validation(options: TaskOptions) -> CustomTask:
    path = _required_data(options)
    splits = read_parts(path)
    if "train" not in splits:
        raise InputError(f"data: {path} has no training records (only {', '.join(splits)}).")
    read = parse_parts(splits["train"], path, options.format)
    test = None
    if options.eval_data is not None:
        test = _read_eval_data(options, options.eval_data)
    elif len(splits) > 1:
        split = _evaluation_split(splits, options)
        test = parse_parts(splits[split], f"{path} ({split})", options.format)
    rest, part = split_for_validation(
        options,
        list(read.samples),
        lambda index: read.samples[index].content,
        None if test is None else {sample.content for sample in test.samples.values()},
        path,
    )
    only = options.evaluation_only
    evaluated = draw(part, options.max_samples if only else None, options.seed)
    trained = draw(rest, options.max_samples, options.seed)
    return CustomTask(
        options.name,
        read,
        draw(evaluated, options.max_eval_samples, options.seed),
        {"data": path, **part_record(options, part, path)},
        read=None if only else read,
        trained_on=[] if only else weighted(trained, read.weights, options.seed),
        held_out=[] if only else part,
        samples_of_runs=[part] if only else (),
    )


def _load_for_evaluation(options: TaskOptions) -> CustomTask:
    if options.eval_data is not None:
        path, data = options.eval_data, _read_eval_data(options, options.eval_data)
        drawn = draw(list(data.samples), options.max_eval_samples, options.seed)
        return CustomTask(options.name, data, drawn, {"evaluated_on": path})
    path = _required_data(options)
    splits = read_parts(path)
    split = _evaluation_split(splits, options)
    data = parse_parts(splits[split], path, options.format)
    if any(weight != 1 for _, weight in data.weights):
        warnings.warn(f"{path}: each record is measured once, whatever its weight.", stacklevel=3)
    records = list(data.samples)
    of_runs = [records]
    source = {"evaluated_on": path}
    if split == "train":
        source["evaluated_split"] = split
        of_runs = samples_of_runs(
            records,
            lambda index: data.samples[index].content,
            most=options.max_samples,
            most_evaluated=options.max_eval_samples,
            seed=options.seed,
        )
    drawn = draw(records, options.max_samples, options.seed)
    chosen = draw(drawn, options.max_eval_samples, options.seed)
    return CustomTask(options.name, data, chosen, source, samples_of_runs=of_runs)


def _required_data(options: TaskOptions) -> str:
    if options.data is None:
        raise InputError(
            f"task {options.name} needs data: a file, a folder, a Hub id, or - for standard "
            "input, with prompt and completion, messages, conversations, instruction and output, "
            "or text in each record."
        )
    return options.data


def _read_eval_data(options: TaskOptions, source: str) -> CustomData:
    splits = read_parts(source, option=options.eval_option)
    parts = splits[_evaluation_split(splits, options)]
    if given := next((part for part in parts if part.weight != 1), None):
        raise InputError(
            f"{options.eval_option}: {given.place} has the weight {given.weight:g}. Weights are "
            "for data."
        )
    return parse_parts(parts, source, options.format)


def _evaluation_split(splits: dict[str, list[Part]], options: TaskOptions) -> str:
    return next(name for name in (*options.evaluation_splits(), "train") if name in splits)
