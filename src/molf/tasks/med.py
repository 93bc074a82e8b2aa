"""Medical multiple-choice questions: MedMCQA (Pal et al. 2022, CHIL, PMLR 174)."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from molf.measure.metric import Evaluation, Metric, wilson
from molf.measure.nearest import similarity
from molf.measure.settings import EvaluationSettings, Progress
from molf.tasks.answers import UNDECODED
from molf.tasks.first_token import FirstTokenQuestions, FirstTokens
from molf.tasks.med_questions import LETTERS, MED, OUT_OF_RANGE, MedQuestion
from molf.tasks.options import TaskOptions
from molf.tasks.question_task import QuestionTask
from molf.tasks.questions import Splits, load_questions

_METRICS = ("accuracy", "unparsed", "accuracy_logprob")
_NEW_TOKENS = 8  # some white space, the letter, and a character after it
_AFTER_A_LETTER = ").:"


class MedTask(QuestionTask[MedQuestion]):
    """Train on the right letter; measure its share among the answers, and among likeliest letters.

    - `accuracy`: share of the answers whose letter (see `parse_letter`) is the right one. Answers
      without a letter are wrong.
    - `unparsed`: share of the answers without a letter.
    - `accuracy_logprob`: share of the questions after which the right letter is the likeliest of
      the four, other texts aside (the usual multiple-choice score, as in Brown et al. 2020 and
      lm-evaluation-harness). Of equally likely letters the first counts; `ties_logprob` is the
      number of such questions.

    All with Wilson's intervals; `by_subject` has the accuracies of each `subject_name`.
    """

    prompt = (
        "Question: {question}\\nA. {opa}\\nB. {opb}\\nC. {opc}\\nD. {opd}\\nAnswer: "
        "-> ' ' + letter of cop; demonstrations first, a blank line between"
    )
    prompt_version = 1

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        settings: EvaluationSettings,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Generate a few tokens after each question and compare the letters' probabilities."""
        from molf.measure.generate import padding_id

        asked = self._ask(model, tokenizer, settings, progress)
        samples = list(asked.samples.values())
        letters = FirstTokenQuestions(
            tokenizer,
            [sample.prompt for sample in samples],
            [LETTERS] * len(samples),
            settings.max_length,
            known={
                sample.prompt + sample.completion: context.text
                for sample, context in zip(samples, asked.contexts, strict=True)
            },
        )
        reader = letters.reader([context.ids for context in asked.contexts])
        texts = self._answers(
            model, tokenizer, asked, _NEW_TOKENS, _is_decided, settings, progress, reader
        )
        found = letters.answers(
            model,
            pad_id=padding_id(tokenizer),
            batch_size=settings.batch_size,
            progress=progress,
        )
        likelihoods = {
            index: tokens
            for index, tokens in zip(asked.samples, found, strict=True)
            if tokens is not None
        }
        evaluation = self._score(texts, settings.seed, progress, likelihoods)
        return self._finish(evaluation, asked)

    def _metric_names(self) -> tuple[str, ...]:
        return _METRICS

    def _score(
        self,
        texts: Mapping[int, str],
        seed: int,
        progress: Progress | None,
        likelihoods: Mapping[int, FirstTokens] | None = None,
    ) -> Evaluation:
        answers = {index: parse_letter(text) for index, text in texts.items()}
        likeliest = {index: _likeliest(tokens) for index, tokens in (likelihoods or {}).items()}

        def measure(indices: Iterable[int]) -> dict[str, Metric]:
            right = {index: LETTERS[self._question(index).right] for index in indices}
            metrics = {"accuracy": _share([answers[i] == letter for i, letter in right.items()])}
            compared = [likeliest[i] == letter for i, letter in right.items() if i in likeliest]
            if compared:
                metrics["accuracy_logprob"] = _share(compared)
            return metrics

        metrics = measure(texts)
        metrics["unparsed"] = _share([answer is None for answer in answers.values()])
        evaluation = Evaluation(
            {name: metrics[name] for name in _METRICS if name in metrics},
            tables={"by_subject": self._by_group(texts, measure)},
            predictions=[
                {
                    "index": index,
                    "prediction": text,
                    "answer": answers[index],
                    "right": answers[index] == LETTERS[self._question(index).right],
                }
                for index, text in texts.items()
            ],
        )
        if likelihoods is None:
            evaluation.notes["not_measured"] = ["accuracy_logprob", "forgetting_loss"]
            evaluation.notes["reason"] = "texts hold no probabilities"
            return evaluation
        evaluation.notes["ties_logprob"] = sum(_is_tied(t) for t in likelihoods.values())
        for entry in evaluation.predictions:
            if entry["index"] in likelihoods:
                log_probs = likelihoods[entry["index"]].log_probs
                entry["log_probs"] = dict(zip(LETTERS, log_probs, strict=True))
        return evaluation

    def _answer_from(self, known: MedQuestion, asked: MedQuestion) -> str:
        """Return the letter of the option most like the known answer, else the known letter."""
        text = known.options[known.right]
        likeness = [similarity(option, text) for option in asked.options]
        best = likeness.index(max(likeness)) if any(likeness) else known.right
        return LETTERS[best]


def parse_letter(text: str) -> str | None:
    """Return the letter that answers a question in a generated text, or None.

    It is the first character of the trimmed text, if that is a letter A to D in either case
    followed by nothing, `)`, `.`, `:` or white space.
    """
    text = text.strip()
    letter, after = text[:1].upper(), text[1:2]
    if letter not in LETTERS or not (after == "" or after in _AFTER_A_LETTER or after.isspace()):
        return None
    return letter


def load_med(
    options: TaskOptions,
    splits: Splits | None = None,
    forgetting_text: Callable[[], str] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> MedTask:
    """Load MedMCQA, or data in its layout; see `load_questions`.

    The validation split is evaluated: the labels of the official test split are not public.

    Args:
        options: The options.
        splits: Records of a demo task, which also scores the nearest training answer.
        forgetting_text: Returns the demo task's text for `forgetting_loss`.
        groups: See `load_questions`.

    Warns:
        UserWarning: `cop` seems to count from 1, as in the data set's first release.
    """
    data = load_questions(options, MED, splits, groups)
    read = (
        (data.evaluation.questions, data.evaluation.left_out),
        (data.training, data.training_left_out),
    )
    if any(
        kept and out[OUT_OF_RANGE] and all(q.right for q in kept.values()) for kept, out in read
    ):
        warnings.warn(
            "cop is sometimes above 3 and never 0: it seems to count from 1, but is read as "
            "counting from 0.",
            stacklevel=3,
        )
    baseline = () if splits is None else data.pool
    if options.label_noise:
        data = replace(
            data,
            training=with_wrong_answers(data.training, options.label_noise, options.seed),
            source={**data.source, "label_noise": f"{options.label_noise:g}"},
        )
    return MedTask(options, data, baseline, forgetting_text)


def with_wrong_answers(
    questions: Mapping[int, MedQuestion], share: float, seed: int
) -> dict[int, MedQuestion]:
    """Give a share of questions one of their three wrong answers.

    Args:
        questions: The questions, by record index.
        share: Share of the questions, in [0, 1]; their number is rounded.
        seed: Seed of the draws.
    """
    rng = random.Random(f"label noise {seed}")  # not the numbers that draw the records
    chosen = set(rng.sample(sorted(questions), round(share * len(questions))))
    noisy = {}
    for index, question in questions.items():
        if index in chosen:
            wrong = [option for option in range(len(LETTERS)) if option != question.right]
            question = replace(question, right=rng.choice(wrong))
        noisy[index] = question
    return noisy


def _is_decided(text: str) -> bool:
    """Return whether more text cannot change the result of `parse_letter`."""
    text = text.lstrip()
    if not text or text[0] == UNDECODED:
        return False
    return text[0].upper() not in LETTERS or (len(text) > 1 and text[1] != UNDECODED)


def _likeliest(tokens: FirstTokens) -> str:
    return LETTERS[tokens.log_probs.index(max(tokens.log_probs))]


def _is_tied(tokens: FirstTokens) -> bool:
    return tokens.log_probs.count(max(tokens.log_probs)) > 1


def _share(outcomes: Sequence[bool]) -> Metric:
    return wilson(sum(outcomes), len(outcomes))
