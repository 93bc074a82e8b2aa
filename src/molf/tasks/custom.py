"""The user's own records: prompts with completions, or conversations, in TRL's layouts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from molf.errors import InputError
from molf.evaluate.metric import Evaluation, Metric, bootstrap_mean, wilson
from molf.evaluate.settings import EvaluationSettings, Progress
from molf.tasks.answers import generate_answers, longest_answer
from molf.tasks.base import Task
from molf.tasks.custom_records import parse_sample
from molf.tasks.files import Record
from molf.tasks.options import TaskOptions
from molf.tasks.predictions import (
    check_predictions,
    left_out_prediction,
    predicted_sample,
    restrict_to_sample,
)
from molf.tasks.records import read_splits
from molf.tasks.samples import PromptCompletion, Sample
from molf.tasks.selection import draw, required_hold_out, samples_of_runs

_SPARE_TOKENS = 8  # generated beyond the longest completion: white space, then the end token
_MOST_NEW_TOKENS = 512
_MOST_LOSS = 700.0  # nats; the exponential of more is no longer a finite number


class CustomTask(Task):
    """Train on completions; measure their loss, and whether greedy answers equal them."""

    prompt = "prompt + completion as they are; conversations through the chat template"
    prompt_version = 1

    def __init__(
        self,
        name: str,
        training: list[Sample],
        evaluation: Sequence[Sample],
        evaluated: Sequence[int],
        source: dict[str, str],
        samples_of_runs: Sequence[Sequence[int]] = (),
    ) -> None:
        """Hold the samples.

        Args:
            name: The task's name.
            training: The samples trained on.
            evaluation: All samples of the evaluation data.
            evaluated: Those of them that are evaluated.
            source: Where the records are from.
            samples_of_runs: Those that trainings on this data may have evaluated.
        """
        super().__init__(name, training, source)
        self._evaluation = evaluation
        self._samples_of_runs = samples_of_runs
        self._evaluated = list(evaluated)

    @property
    def evaluation_count(self) -> int:
        """How many records the task is evaluated on."""
        return len(self._evaluated)

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        settings: EvaluationSettings,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Measure the completions' loss per token, and generate each record's last answer.

        Records longer than the limit are left out and counted.
        """
        from molf.evaluate.generate import padding_id
        from molf.evaluate.inference import length_limit
        from molf.evaluate.likelihood import sequence_losses
        from molf.tasks.encoding import encode_tokenized, generation_contexts, tokenize_samples

        samples = [self._evaluation[index] for index in self._evaluated]
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
        new_tokens = settings.max_new_tokens or self._answer_limit(tokenizer)
        contexts = generation_contexts(tokenizer, [tokenized[i] for i in encoded.kept])
        texts = generate_answers(model, tokenizer, contexts, new_tokens, settings, progress)
        predictions = [
            {**self._prediction(index, text), "prompt": context.prompt, "loss": total / count}
            for index, text, context, (total, count) in zip(
                kept, texts, contexts, losses, strict=True
            )
        ]
        too_long = sorted(set(self._evaluated).difference(kept))
        predictions += [left_out_prediction(index, "too long") for index in too_long]
        predictions.sort(key=lambda entry: entry["index"])
        loss = bootstrap_mean(
            [total / count for total, count in losses],
            weights=[count for _, count in losses],
            seed=settings.seed,
        )
        return Evaluation(
            metrics={
                "loss": loss,
                "perplexity": _exponential(loss),
                "exact_match": self._exact_match(dict(zip(kept, texts, strict=True))),
            },
            predictions=predictions,
            notes={"records_too_long": encoded.left_out, "max_new_tokens": new_tokens},
        )

    def score_predictions(self, predictions: list[dict[str, Any]]) -> Evaluation:
        """Measure `exact_match`; losses are not in texts."""
        saved = check_predictions(predictions, len(self._evaluation), self._known)
        sample = predicted_sample(saved, self._evaluated, self._samples_of_runs)
        saved = restrict_to_sample(saved, sample)
        return Evaluation(
            metrics={"exact_match": self._exact_match(saved.texts)},
            predictions=[
                self._prediction(index, text) for index, text in sorted(saved.texts.items())
            ],
            notes={
                "not_measured": ["loss", "perplexity", "forgetting_loss"],
                "reason": "texts hold no probabilities",
                "records_left_out": dict(Counter(saved.left_out.values())),
            },
        )

    def _answer_limit(self, tokenizer: Any) -> int:
        """Tokens that let any expected answer be given in full, up to a maximum."""
        answers = [self._evaluation[index].answer for index in self._evaluated]
        return min(longest_answer(tokenizer, answers) + _SPARE_TOKENS, _MOST_NEW_TOKENS)

    def _exact_match(self, texts: dict[int, str]) -> Metric:
        equal = [
            text.strip() == self._evaluation[index].answer.strip() for index, text in texts.items()
        ]
        return wilson(sum(equal), len(equal))

    def _known(self, index: int) -> dict[str, str]:
        """What predictions repeat of a record; the text of a conversation is its template's."""
        sample = self._evaluation[index]
        prompt = {"prompt": sample.prompt} if isinstance(sample, PromptCompletion) else {}
        return {**prompt, "expected": sample.answer}

    def _prediction(self, index: int, text: str) -> dict[str, Any]:
        sample = self._evaluation[index]
        return {"index": sample.record, "prediction": text, "expected": sample.answer}


def _exponential(loss: Metric) -> Metric:
    """Perplexity from loss: percentiles keep their place under an increasing function."""

    def perplexity(value: float) -> float:
        return math.exp(min(value, _MOST_LOSS))

    return replace(
        loss, value=perplexity(loss.value), low=perplexity(loss.low), high=perplexity(loss.high)
    )


def load_custom(options: TaskOptions) -> CustomTask:
    """The user's records as the options say.

    Evaluated are, whichever there is first: `eval_data`; the test or validation split that `data`
    brings; a tenth of `data`, held out by the seed.
    """
    if options.evaluation_only:
        return _load_for_evaluation(options)
    data = _required_data(options)
    splits = read_splits(data)
    if "train" not in splits:
        raise InputError(f"data: {data} has no training records (only {', '.join(splits)}).")
    training = _parse(splits["train"], data)
    drawn = draw(range(len(training)), options.max_samples, options.seed)
    if options.eval_data is not None:
        evaluation = _read_for_evaluation(options.eval_data, "eval_data")
        evaluated, evaluated_on = list(range(len(evaluation))), options.eval_data
    elif len(splits) > 1:
        split = _evaluation_split(splits)
        evaluation = _parse(splits[split], f"{data} ({split})")
        evaluated, evaluated_on = list(range(len(evaluation))), f"the {split} split of {data}"
    else:
        evaluation = training
        drawn, evaluated = required_hold_out(
            drawn, options.seed, lambda index: training[index].content, data
        )
        evaluated_on = f"{len(evaluated)} records held out of {data} (seed {options.seed})"
    return CustomTask(
        options.name,
        [training[index] for index in drawn],
        evaluation,
        draw(evaluated, options.max_eval_samples, options.seed),
        {"data": data, "evaluated_on": evaluated_on},
    )


def _load_for_evaluation(options: TaskOptions) -> CustomTask:
    if options.eval_data is not None:
        path, samples = options.eval_data, _read_for_evaluation(options.eval_data, "eval_data")
        drawn = draw(range(len(samples)), options.max_eval_samples, options.seed)
        return CustomTask(options.name, [], samples, drawn, {"evaluated_on": path})
    path = _required_data(options)
    splits = read_splits(path)
    split = _evaluation_split(splits)
    samples = _parse(splits[split], path)
    records = range(len(samples))
    of_runs = [list(records)]
    source = {"evaluated_on": path}
    if split == "train":
        source["evaluated_split"] = split
        of_runs = samples_of_runs(
            records,
            lambda index: samples[index].content,
            most=options.max_samples,
            most_evaluated=options.max_eval_samples,
            seed=options.seed,
        )
    drawn = draw(records, options.max_samples, options.seed)
    chosen = draw(drawn, options.max_eval_samples, options.seed)
    return CustomTask(options.name, [], samples, chosen, source, of_runs)


def _required_data(options: TaskOptions) -> str:
    if options.data is None:
        raise InputError(
            f"task {options.name} needs data: a file, a folder or a Hub id, with prompt and "
            "completion or messages in each record."
        )
    return options.data


def _read_for_evaluation(source: str, option: str) -> list[Sample]:
    splits = read_splits(source, option=option)
    return _parse(splits[_evaluation_split(splits)], source)


def _evaluation_split(splits: dict[str, list[Record]]) -> str:
    return next(name for name in ("test", "validation", "train") if name in splits)


def _parse(records: Sequence[Record], source: str) -> list[Sample]:
    return [
        parse_sample(record, index, f"{source}, record {index}")
        for index, record in enumerate(records)
    ]
