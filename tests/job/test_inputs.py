"""Runs of one process that share data, base model and the base's evaluation."""

import json

import pytest
import torch
from safetensors.torch import load_file

from molf.job.inputs import Inputs
from molf.job.run import dry_run, train
from molf.job.settings.settings import TrainSettings
from slow_cases import slow_after


class Warm(Inputs):
    """Keeps task, base and evaluation; counts what was loaded and measured."""

    def __init__(self):
        self.made = []
        self._tasks, self._bases, self._evaluations = {}, {}, {}

    def _kept(self, kept, key, make):
        if key not in kept:
            self.made.append(make.__name__)
            kept[key] = make()
        return kept[key]

    def task(self, options):
        def task():
            return super(Warm, self).task(options)

        return self._kept(self._tasks, options, task)

    def base(self, model, dtype):
        def base():
            return super(Warm, self).base(model, dtype)

        return self._kept(self._bases, (model, dtype), base).copy()

    def base_evaluation(self, key, measure):
        def evaluation():
            return super(Warm, self).base_evaluation(key, measure)

        return self._kept(self._evaluations, key, evaluation)


@pytest.fixture
def settings(base, facts, tmp_path):
    def make(name, **options):
        return TrainSettings(
            task="fact",
            model=str(base),
            data=str(facts),
            ranks=(4,),
            alpha=(4.0,),
            gradient_accumulation_steps=1,
            max_steps=3,
            output_dir=tmp_path / name,
            **options,
        )

    return make


def weights(result):
    return load_file(result.directory / "model" / "model.safetensors")


def evaluation_of(result):
    return json.loads((result.directory / "eval.json").read_text())


# lora draws its factors after the evaluation.
@pytest.mark.parametrize("method", slow_after(1, ["lora", "molf"]))
def test_shared_inputs_give_the_same_bits(settings, method):
    cold = train(settings("cold", method=method))
    inputs = Warm()
    runs = [train(settings(f"warm-{i}", method=method), inputs=inputs) for i in range(3)]
    assert inputs.made == ["task", "base", "evaluation"]
    for run in runs:
        torch.testing.assert_close(weights(run), weights(cold), rtol=0, atol=0)
        assert evaluation_of(run) == evaluation_of(cold)


def test_another_evaluation_is_measured(settings):
    inputs = Warm()
    train(settings("one", seed=0), inputs=inputs)
    train(settings("two", seed=0, per_device_eval_batch_size=2, max_length=64), inputs=inputs)
    assert inputs.made == ["task", "base", "evaluation", "evaluation"]


@pytest.mark.slow
def test_dry_run_takes_shared_inputs(settings):
    inputs = Warm()
    dry_run(settings("dry"), inputs=inputs)
    train(settings("run"), inputs=inputs)
    assert inputs.made == ["task", "base", "evaluation"]
