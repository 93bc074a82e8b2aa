"""Changing facts: CounterFact (Meng et al. 2022, "Locating and Editing Factual Associations")."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from molf import world
from molf.data.records import read_records
from molf.data.samples import PromptCompletion, Sample
from molf.data.selection import draw
from molf.errors import InputError
from molf.measure.metric import Evaluation, Metric, wilson
from molf.measure.settings import EvaluationSettings, Progress
from molf.measure.spread import spread
from molf.tasks.answers import UNDECODED
from molf.tasks.base import DataRecords, Task
from molf.tasks.demo import refuse_data
from molf.tasks.fact_metrics import (
    KINDS,
    REWRITE,
    Outcomes,
    fact_metric_names,
    fact_metrics,
)
from molf.tasks.fact_requests import FIELDS, FactRequest, find_conflicts, parse_request
from molf.tasks.first_token import Comparison, FirstTokenQuestions
from molf.tasks.options import TaskOptions
from molf.tasks.predictions import check_predictions, left_out_prediction, restrict_to_sample
from molf.tasks.validation import part_record, split_for_validation

COUNTERFACT_URL = "https://rome.baulab.info/data/dsets/counterfact.json"


class FactTask(Task):
    """Train on the new targets; measure them on edited, paraphrased and neighbourhood prompts."""

    prompt = "requested_rewrite.prompt with the subject in place of {} -> ' ' + target_new.str"
    prompt_version = 1

    def __init__(
        self,
        name: str,
        training: dict[int, FactRequest],
        evaluation: Sequence[FactRequest],
        evaluated: Sequence[int],
        source: dict[str, str],
        forgetting_text: Callable[[], str] | None = None,
        read: Sequence[FactRequest] = (),
        held_out: Sequence[int] = (),
    ) -> None:
        """Hold the requests.

        Args:
            name: The task's name.
            training: The requests to train on, by record index.
            evaluation: All requests of the evaluation data.
            evaluated: Indices of the requests to evaluate.
            source: Origin of the records, for the run's files.
            forgetting_text: Returns the text for `forgetting_loss`; None for the default text.
            read: All requests of the training data.
            held_out: Indices of the requests of `read` that are set aside.
        """
        samples: list[Sample] = [_sample(request, index) for index, request in training.items()]
        super().__init__(name, samples, source)
        self._read = read
        self._trained_on = list(training)
        self._held_out = held_out
        self._evaluation = evaluation
        self._evaluated = list(evaluated)
        together = training.values() or [evaluation[index] for index in evaluated]
        self._conflicts = find_conflicts(together)
        if self._conflicts:
            warnings.warn(
                f"Of {len(together)} requests, {self._conflicts.prompts} prompts have more than "
                f"one new target, and {self._conflicts.neighbours} neighbourhood prompts are "
                "edited by another request: these requests contradict each other.",
                stacklevel=3,
            )
        self._forgetting_text = forgetting_text

    def _metric_names(self) -> tuple[str, ...]:
        kinds = {
            kind
            for index in self._evaluated
            for kind, prompts in self._evaluation[index].prompts().items()
            if prompts
        }
        return (*fact_metric_names(kinds), "acc_new", "acc_true")

    def data_records(self) -> DataRecords:
        """Return the requests of the training data."""
        return DataRecords(
            len(self._read),
            {index: _sample(request, index) for index, request in enumerate(self._read)},
            Counter(),
            self._trained_on,  # `training_samples` may be without a part that is set aside
            self._held_out,
        )

    def description(self) -> dict[str, Any]:
        """Return the task's entries for the configuration file of a run."""
        return {**super().description(), **self._conflict_counts()}

    def _conflict_counts(self) -> dict[str, int]:
        return {
            "prompts_with_two_targets": self._conflicts.prompts,
            "edited_neighbourhood_prompts": self._conflicts.neighbours,
        }

    @property
    def evaluation_count(self) -> int:
        """The number of requests to evaluate."""
        return len(self._evaluated)

    def evaluated_samples(self, most: int) -> list[Sample]:
        """Return evaluated requests: the rewrite prompts with their new targets."""
        return [_sample(self._evaluation[index], index) for index in spread(self._evaluated, most)]

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        settings: EvaluationSettings,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Compare first target tokens after each prompt, and generate after the rewrite prompts.

        Prompts longer than the limit are left out and counted; a request whose rewrite prompt is
        too long is left out whole.
        """
        from molf.measure.generate import padding_id
        from molf.measure.inference import length_limit
        from molf.measure.tokens import check_tokenizer

        check_tokenizer(tokenizer)
        limit = length_limit(model, settings.max_length) - 1  # the answer needs one position
        asked = [
            (index, kind, prompt)
            for index in self._evaluated
            for kind, prompts in self._evaluation[index].prompts().items()
            for prompt in prompts
        ]
        questions = FirstTokenQuestions(
            tokenizer,
            [prompt for _, _, prompt in asked],
            [self._targets(index) for index, _, _ in asked],
            limit,
        )
        outcomes: dict[int, Outcomes] = {
            index: {kind: [] for kind in KINDS}
            for (index, kind, _), fits in zip(asked, questions.fits, strict=True)
            if kind == REWRITE and fits
        }
        if not outcomes:
            raise InputError(f"All {len(self._evaluated)} requests are longer than {limit} tokens.")
        texts = self._generate(model, tokenizer, list(outcomes), questions, settings, progress)
        found = questions.answers(
            model,
            pad_id=padding_id(tokenizer),
            batch_size=settings.batch_size,
            progress=progress,
        )
        for (index, kind, _), tokens in zip(asked, found, strict=True):
            if index in outcomes and tokens is not None:
                outcomes[index][kind].append(Comparison.of(tokens))

        evaluation = fact_metrics(list(outcomes.values()), settings.seed)
        evaluation.metrics.update(self._accuracies(texts))
        evaluation.notes["prompts_too_long"] = questions.fits.count(False)
        evaluation.notes |= self._conflict_counts()
        evaluation.predictions = [
            self._prediction(index, texts[index], outcomes[index])
            if index in outcomes
            else left_out_prediction(index, "too long")
            for index in self._evaluated
        ]
        return evaluation

    def score_predictions(self, predictions: list[dict[str, Any]]) -> Evaluation:
        """Measure `acc_new` and `acc_true`; the other metrics need the model."""
        saved = restrict_to_sample(
            check_predictions(predictions, len(self._evaluation), self._copied_fields),
            self._evaluated,
        )
        scored = [self._prediction(index, text) for index, text in sorted(saved.texts.items())]
        not_measured = ["es", "em", "ps", "pm", "ns", "nm", "s", "forgetting_loss"]
        return Evaluation(
            metrics=self._accuracies(saved.texts),
            predictions=scored,
            notes={
                "not_measured": not_measured,
                "reason": "texts hold no probabilities",
                "records_left_out": dict(Counter(saved.left_out.values())),
            },
        )

    def _copied_fields(self, index: int) -> dict[str, str]:
        """Return the fields of a request that a prediction copies."""
        request = self._evaluation[index]
        targets = {"target_new": request.target_new, "target_true": request.target_true}
        return {"prompt": request.prompt, **targets}

    def _targets(self, index: int) -> tuple[str, str]:
        request = self._evaluation[index]
        return request.target_new, request.target_true

    def _generate(
        self,
        model: Any,
        tokenizer: Any,
        indices: list[int],
        questions: FirstTokenQuestions,
        settings: EvaluationSettings,
        progress: Progress | None,
    ) -> dict[int, str]:
        """Generate greedy text after each rewrite prompt, as long as the longer of its targets."""
        from molf.measure.generate import decode, generate_greedy

        splits = []
        for request in (self._evaluation[index] for index in indices):
            for target in (request.target_new, request.target_true):
                text = questions.texts[f"{request.prompt} {target}"]
                splits.append(text.split(len(request.prompt)))
        # Use the contexts of the new targets in training, and the length of the longest target.
        contexts = [context for context, _ in splits[::2]]
        longest = max(len(target) for _, target in splits)
        needed = [max(map(len, self._targets(index))) for index in indices]

        def is_decided(position: int, text: str) -> bool:
            return len(text.strip().rstrip(UNDECODED)) >= needed[position]

        answers = generate_greedy(
            model,
            tokenizer,
            contexts,
            max_new_tokens=settings.max_new_tokens or longest + 1,
            batch_size=settings.batch_size,
            stop=is_decided,
            first_logits=questions.reader(contexts),
            progress=progress,
        )
        return {
            index: decode(tokenizer, answer) for index, answer in zip(indices, answers, strict=True)
        }

    def _accuracies(self, texts: dict[int, str]) -> dict[str, Metric]:
        """Compute the shares of texts that start with the new and with the true target."""
        starts = [
            [text.strip().startswith(target) for target in self._targets(index)]
            for index, text in texts.items()
        ]
        return {
            name: wilson(sum(row[column] for row in starts), len(starts))
            for column, name in enumerate(("acc_new", "acc_true"))
        }

    def _prediction(self, index: int, text: str, outcome: Outcomes | None = None) -> dict[str, Any]:
        request = self._evaluation[index]
        prediction: dict[str, Any] = {
            "index": index,
            "prompt": request.prompt,
            "prediction": text,
            "target_new": request.target_new,
            "target_true": request.target_true,
            "right": text.strip().startswith(request.target_new),
        }
        for kind, comparisons in (outcome or {}).items():
            prediction[kind] = [
                {"p_new": math.exp(c.log_p_new), "p_true": math.exp(c.log_p_true)}
                for c in comparisons
            ]
        return prediction


def load_fact(options: TaskOptions) -> FactTask:
    """Load CounterFact, or data in its layout.

    The training requests are evaluated, unless there is `eval_data`. With `validation_share`, the
    requests of the validation part are trained and evaluated with `eval_part="validation"` alone.
    """
    data = options.data or COUNTERFACT_URL
    if options.eval_data is None:
        return _train_and_evaluate_on(_read(data, "data"), options, {"data": data})
    evaluation = _read(options.eval_data, options.eval_option)
    if options.validates:
        return _validate_on_training_data(options, _read(data, "data"), evaluation, data)
    evaluated = draw(range(len(evaluation)), options.max_eval_samples, options.seed)
    source = {"eval_data": options.eval_data}
    training, requests = {}, []
    if not options.evaluation_only:
        requests = _read(data, "data")
        drawn = draw(range(len(requests)), options.max_samples, options.seed)
        training = {index: requests[index] for index in drawn}
        source = {"data": data, **source}
    return FactTask(options.name, training, evaluation, evaluated, source, read=requests)


def load_demo_fact(options: TaskOptions) -> FactTask:
    """Load the requests of the embedded world, whose facts the shipped base model has learned."""
    refuse_data(options)
    built = world.build_world()
    source = {"data": "the embedded world"}
    records = world.counterfact_records
    if options.validates:
        records = world.counterfact_validation_records
        source |= {
            "evaluated_on": "requests of the validation part",
            "eval_part": options.eval_part,
        }
    requests = [
        parse_request(record, f"{options.name}, record {index}")
        for index, record in enumerate(records(built))
    ]
    return _train_and_evaluate_on(
        requests, options, source, lambda: world.held_out_text(built), has_parts=False
    )


def _read(source: str, option: str) -> list[FactRequest]:
    records = read_records(source, FIELDS, option=option)
    return [
        parse_request(record, f"{source}, record {index}") for index, record in enumerate(records)
    ]


def _train_and_evaluate_on(
    requests: Sequence[FactRequest],
    options: TaskOptions,
    source: dict[str, str],
    forgetting_text: Callable[[], str] | None = None,
    *,
    has_parts: bool = True,
) -> FactTask:
    """Train and evaluate the same requests: all, or those of one part if `requests` has parts."""
    usable = list(range(len(requests)))
    others: list[int] = []
    if has_parts and options.validation_share is not None:
        usable, others = split_for_validation(
            options, usable, lambda index: requests[index].prompt, (), source["data"]
        )
        if options.validates:
            usable, others = others, usable
            source = {**source, **part_record(options, usable, source["data"])}
    drawn = draw(usable, options.max_samples, options.seed)
    training = {} if options.evaluation_only else {index: requests[index] for index in drawn}
    evaluated = draw(drawn, options.max_eval_samples, options.seed)
    if options.evaluation_only:
        return FactTask(options.name, {}, requests, evaluated, source, forgetting_text)
    return FactTask(
        options.name, training, requests, evaluated, source, forgetting_text, requests, others
    )


def _validate_on_training_data(
    options: TaskOptions,
    requests: Sequence[FactRequest],
    tested: Sequence[FactRequest],
    data: str,
) -> FactTask:
    """Evaluate the validation part of the training data, and train on its other requests."""
    rest, part = split_for_validation(
        options,
        range(len(requests)),
        lambda index: requests[index].prompt,
        {request.prompt for request in tested},
        data,
    )
    trained_on = [] if options.evaluation_only else draw(rest, options.max_samples, options.seed)
    most = options.max_samples if options.evaluation_only else None
    return FactTask(
        options.name,
        {index: requests[index] for index in trained_on},
        requests,
        draw(draw(part, most, options.seed), options.max_eval_samples, options.seed),
        {"data": data, **part_record(options, part, data)},
        read=() if options.evaluation_only else requests,
        held_out=part,
    )


def _sample(request: FactRequest, index: int) -> PromptCompletion:
    return PromptCompletion(request.prompt, " " + request.target_new, index)
