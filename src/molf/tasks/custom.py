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
from molf.tasks.samples import Sample
from molf.tasks.selection import draw, hold_out

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
        held_out: Sequence[int] = (),
    ) -> None:
        """Hold the samples.

        Args:
            name: The task's name.
            training: The samples trained on.
            evaluation: All samples of the evaluation data.
            evaluated: Those of them that are evaluated.
            source: Where the records are from.
            held_out: Those that a training on this data would have held out.
        """
        super().__init__(name, training, source)
        self._evaluation = evaluation
        self._held_out = held_out
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
        from molf.tasks.encoding import encode_samples, generation_contexts

        samples = [self._evaluation[index] for index in self._evaluated]
        encoded = encode_samples(tokenizer, samples, length_limit(model, settings.max_length))
        kept = [self._evaluated[position] for position in encoded.kept]
        losses = sequence_losses(
            model,
            encoded.input_ids,
            encoded.labels,
            pad_id=padding_id(tokenizer),
            batch_size=settings.batch_size,
            progress=progress,
        )
        limit = settings.max_new_tokens or self._answer_limit(tokenizer)
        contexts = generation_contexts(tokenizer, [samples[i] for i in encoded.kept])
        texts = generate_answers(model, tokenizer, contexts, limit, settings, progress)
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
            notes={"records_too_long": encoded.left_out, "max_new_tokens": limit},
        )

    def score_predictions(self, predictions: list[dict[str, Any]]) -> Evaluation:
        """Measure `exact_match`; losses are not in texts."""
        saved = check_predictions(predictions, len(self._evaluation))
        sample = predicted_sample(saved, self._evaluated, self._held_out)
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
        if len(drawn) < 2:
            raise InputError(
                f"data: {data} gives 1 record, and none is left to evaluate on. "
                "Give more records, or eval_data."
            )
        evaluation = training
        drawn, evaluated = hold_out(drawn, options.seed)
        evaluated_on = f"{len(evaluated)} records held out of {data} (seed {options.seed})"
    return CustomTask(
        options.name,
        [training[index] for index in drawn],
        evaluation,
        draw(evaluated, options.max_eval_samples, options.seed),
        {"data": data, "evaluated_on": evaluated_on},
    )


def _load_for_evaluation(options: TaskOptions) -> CustomTask:
    held_out: list[int] = []
    if options.eval_data is not None:
        path, samples = options.eval_data, _read_for_evaluation(options.eval_data, "eval_data")
        drawn = list(range(len(samples)))
    else:
        path = _required_data(options)
        splits = read_splits(path)
        samples = _parse(splits[_evaluation_split(splits)], path)
        drawn = draw(range(len(samples)), options.max_samples, options.seed)
        if "train" in splits and len(splits) == 1 and len(drawn) > 1:
            held_out = hold_out(drawn, options.seed)[1]
            held_out = draw(held_out, options.max_eval_samples, options.seed)
    chosen = draw(drawn, options.max_eval_samples, options.seed)
    return CustomTask(options.name, [], samples, chosen, {"evaluated_on": path}, held_out)


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
