"""Evaluations during a training: same bits, best step, early stopping, schedules by loss."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from core_helpers import assert_same_bits
from molf.checkpoint.store import complete_checkpoints
from molf.cli import main
from molf.job.record.routing_log import read_routing
from molf.job.trainer.best import Best
from molf.job.trainer.trainer import Trainer
from molf.job.trainer.validation import Validation

STEPS = 6
EVALUATED = ["--eval_steps", "2"]


@pytest.fixture(scope="module")
def records(workplace):
    path = workplace / "records.jsonl"
    lines = [{"prompt": f"{n} and {n} are", "completion": f" {2 * n}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def dropping(workplace):
    """A base that uses random numbers in training."""
    return write_checkpoint(workplace / "dropping", attention_dropout=0.1)


@pytest.fixture(scope="module")
def command(dropping, records, workplace):
    plain = workplace / "plain.txt"
    plain.write_text("Anna walks to the river and sits down by the water. " * 10)

    def build(path, *further):
        return [
            *("train", "--task", "custom", "--model", str(dropping), "--data", str(records)),
            *("--forgetting_data", str(plain), "--max_eval_samples", "3"),
            *("--ranks", "4", "--alpha", "4", "--logging_steps", "3", "--max_steps", str(STEPS)),
            *("--learning_rate", "1e-2", "--lora_learning_rate", "3e-2"),
            *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
            *("--output_dir", str(path), *further),
        ]

    return build


@pytest.fixture(scope="module")
def evaluated(command, workplace):
    path = workplace / "evaluated"
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        assert main(command(path, *EVALUATED, "--save_steps", "2")) == 0
    (path / "errors.txt").write_text(shown.getvalue())
    return path


def lines_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses(path):
    return {x["step"]: x["eval_loss"] for x in lines_of(path) if "eval_loss" in x}


def recorded(path):
    return yaml.safe_load((path / "config.yaml").read_text())["run"]["training"]


def weights(path):
    return load_file(path / "model.safetensors")


def losses_given(monkeypatch, *values):
    """Replace the measured losses."""
    given = iter(values)
    monkeypatch.setattr(Validation, "loss", lambda self, model: next(given))


def test_evaluations_do_not_change_the_training(command, evaluated, tmp_path, monkeypatch):
    """Another interval and no measurement at all give the same bits, on the same examples."""
    monkeypatch.setattr(Validation, "loss", lambda self, model: 1.0)
    path = tmp_path / "run"
    assert main(command(path, "--eval_steps", "5")) == 0
    assert_same_bits(weights(path / "model"), weights(evaluated / "model"))
    assert read_routing(path).equals(read_routing(evaluated))
    assert list(losses(path)) == [5, 6]  # the last step is always measured
    assert list(losses(evaluated)) == [2, 4, 6]


def test_loss_is_that_of_the_model_on_the_part(evaluated, records):
    """Measured again on the model of a checkpoint and that of the end."""
    from molf.data.encoding import encode_samples
    from molf.job.model.loading import load_model
    from molf.measure.generate import padding_id
    from molf.tasks import TaskOptions, load_task
    from molf.tasks.validation import with_validation

    options = TaskOptions(name="custom", data=str(records), max_eval_samples=3, seed=42)
    whole = load_task(options)
    task = with_validation(whole, options, load_task)
    trained, part = task.training_samples, task.validation_samples
    assert len(trained) == round(0.8 * len(whole.training_samples))
    assert len(part) == 3
    assert not {one.content for one in part} & {one.content for one in trained}
    measured = {one.content for one in whole.evaluated_samples(whole.evaluation_count)}
    assert not {one.content for one in part} & measured
    shown = (evaluated / "errors.txt").read_text()
    assert f"data     {len(trained)} examples of custom" in shown
    assert ", 3 records for evaluation\n" in shown
    assert (
        "eval     loss every 2 steps on 3 records set aside from the training data; the records "
        "for evaluation only before and after the training\n"
    ) in shown
    assert f"  step 6/6  validation {losses(evaluated)[6]:.3f}\n" in shown
    description = yaml.safe_load((evaluated / "config.yaml").read_text())["run"]["task"]
    assert (description["training_records"], description["validation_records"]) == (len(trained), 3)
    for place, step in ((evaluated / "model", 6), (evaluated / "checkpoints/checkpoint-2", 2)):
        loaded = load_model(str(place), torch.float32)
        encoded = encode_samples(loaded.tokenizer, part, 128)
        found = Validation(encoded, padding_id(loaded.tokenizer), 32).loss(loaded.model)
        assert found == pytest.approx(losses(evaluated)[step], rel=1e-4)


def test_validation_data_is_measured_and_all_records_are_trained(
    command, records, tmp_path, capsys
):
    own = tmp_path / "own.jsonl"
    lines = [{"prompt": "A and B are", "completion": text} for text in (" two", " 2" * 200)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    own.write_text(text + records.read_text())
    given = [*EVALUATED, "--validation_data", str(own)]
    assert main(command(tmp_path / "run", *given, "--dry_run")) == 0
    capsys.readouterr()
    assert main(command(tmp_path / "run", *given)) == 0
    shown = capsys.readouterr().err
    assert "39 of 42 records are also trained on, or measured before and after" in shown
    assert "data     36 examples of custom" in shown
    assert (
        "eval     loss every 2 steps on 2 records of validation_data (1 longer than 128 left out); "
        "the records for evaluation only before and after the training\n"
    ) in shown
    assert list(losses(tmp_path / "run")) == [2, 4, 6]
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["validation_data"] == str(own)
    assert config["run"]["data"]["files"]["validation_data"][0]["path"] == str(own)


def test_validation_data_that_is_too_long_is_named(command, tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "A is", "completion": " 2" * 200}) + "\n")
    assert main(command(tmp_path / "run", *EVALUATED, "--validation_data", str(own))) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "The records of the evaluations in the training: All 1 samples are longer" in error


def test_resumed_run_has_the_same_bits(command, evaluated, tmp_path, monkeypatch):
    path = tmp_path / "run"
    step, calls = Trainer.training_step, []

    def failing(self, *given, **named):
        calls.append(self)
        if len(calls) == 4:
            raise RuntimeError("a fault")
        return step(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", failing)
        assert main(command(path, *EVALUATED, "--save_steps", "2")) == 1
    assert main(["train", "--output_dir", str(path), "--resume"]) == 0
    assert losses(path) == losses(evaluated)
    assert_same_bits(weights(path / "model"), weights(evaluated / "model"))
    assert recorded(path)["validation"] == recorded(evaluated)["validation"]


def test_best_step_is_saved_and_survives_a_restart(
    command, evaluated, tmp_path, monkeypatch, capsys
):
    """Its checkpoint stays although two newer ones are kept; the saving is interrupted once."""
    from molf.job import trained_model

    def fail(*given, **named):
        raise RuntimeError("a fault")

    losses_given(monkeypatch, 3.0, 1.0, math.nan, 2.0, 2.0, 1.5)
    path = tmp_path / "run"
    given = ["--eval_steps", "1", "--keep_best", "--save_steps", "1", "--save_total_limit", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(trained_model, "save_model", fail)
        assert main(command(path, *given)) == 1
    assert [step for step, _ in complete_checkpoints(path / "checkpoints")] == [2, 5, 6]
    copy = shutil.copytree(path, tmp_path / "without the best")
    shutil.rmtree(copy / "checkpoints" / "checkpoint-2")
    capsys.readouterr()
    assert main(["train", "--output_dir", str(path), "--resume"]) == 0
    assert "The model is that of step 2, with the lowest loss 1.0000." in capsys.readouterr().err
    assert_same_bits(weights(path / "model"), weights(evaluated / "checkpoints/checkpoint-2"))
    found = recorded(path)["validation"]
    assert (found["best_step"], found["saved_step"], found["evaluations"]) == (2, 2, 6)
    assert lines_of(path)[-1]["eval_loss"] == 1.5
    assert main(["train", "--output_dir", str(copy), "--resume"]) == 0
    assert (
        "The checkpoint of step 2, which has the lowest loss, is missing" in capsys.readouterr().err
    )
    assert recorded(copy)["validation"]["saved_step"] == 6
    assert_same_bits(weights(copy / "model"), weights(evaluated / "model"))


def test_training_stops_early(command, evaluated, tmp_path, monkeypatch, capsys):
    from molf.job import trained_model

    def fail(*given, **named):
        raise RuntimeError("a fault")

    losses_given(monkeypatch, 2.0, 1.0, 1.5, 1.0)
    path = tmp_path / "run"
    with monkeypatch.context() as patch:  # the resumed run has ended already
        patch.setattr(trained_model, "save_model", fail)
        given = command(path, "--eval_steps", "1", "--early_stopping_patience", "2")
        assert main(given) == 1
    assert main(["train", "--output_dir", str(path), "--resume"]) == 0
    assert (
        "Training ended after step 4 of 6: 2 evaluations without a lower loss "
        "(early_stopping_patience)." in capsys.readouterr().err
    )
    found = recorded(path)
    assert (found["steps"], found["ended_by"]) == (4, "early_stopping_patience")
    assert_same_bits(weights(path / "model"), weights(evaluated / "checkpoints/checkpoint-4"))


def test_count_of_early_stopping_is_resumed(command, tmp_path, monkeypatch):
    losses_given(monkeypatch, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    path = tmp_path / "run"
    step, calls = Trainer.training_step, []

    def failing(self, *given, **named):
        calls.append(self)
        if len(calls) == 4:
            raise RuntimeError("a fault")
        return step(self, *given, **named)

    given = ["--eval_steps", "1", "--early_stopping_patience", "3", "--save_steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", failing)
        assert main(command(path, *given)) == 1
    assert main(["train", "--output_dir", str(path), "--resume"]) == 0
    assert recorded(path)["steps"] == 4


def test_epochs_are_evaluated_before_their_checkpoint(command, tmp_path):
    """28 records of 29 examples in batches of 4: the last batch of an epoch is short."""
    path = tmp_path / "run"
    given = command(
        path, "--eval_strategy", "epoch", "--save_steps", "1", "--num_train_epochs", "2"
    )
    del given[given.index("--max_steps") : given.index("--max_steps") + 2]
    assert main(given) == 0
    steps = recorded(path)["steps"]
    assert list(losses(path)) == [steps // 2, steps]
    state = json.loads(
        (path / f"checkpoints/checkpoint-{steps // 2}/trainer_state.json").read_text()
    )
    assert state["best_metric"] == losses(path)[steps // 2]


def test_schedule_follows_the_loss(command, tmp_path, monkeypatch):
    losses_given(monkeypatch, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    path = tmp_path / "run"
    further = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_steps", "1"]
    further += ["--training_args.lr_scheduler_kwargs", '{"patience": 1, "factor": 0.5}']
    assert main(command(path, *further)) == 0
    rates = [line["learning_rate"] for line in lines_of(path) if "loss" in line]
    assert rates[:3] == [1e-2] * 3
    assert rates[-1] < 1e-2


def test_page_shows_the_loss(evaluated):
    from molf.report.run_data import read_run_data
    from molf.report.training_figures import training_section

    data = read_run_data(evaluated)
    figures = {one.name: one for one in training_section(data).figures}
    assert figures["eval_loss"].x.tolist() == [2, 4, 6]
    assert figures["eval_loss"].series[0].values.tolist() == list(losses(evaluated).values())
    assert "of step" in figures["eval_loss"].text
    assert not set(figures["loss"].x.tolist()) - {1, 2, 3, 4, 6}
    assert not any(math.isnan(value) for value in figures["loss"].series[0].values)


def test_the_best_is_the_lowest_finite_loss():
    best = Best()
    assert best.record(3) == {}
    assert [best.add(step, loss) for step, loss in enumerate([math.nan, 2.0, 2.0, 1.0])] == [
        *(False, True, False, True)
    ]
    assert best.record(3) == {
        "evaluations": 4,
        "last_loss": 1.0,
        "best_loss": 1.0,
        "best_step": 3,
        "saved_step": 3,
    }


def test_processes_measure_shares_of_the_part(monkeypatch):
    """Each of two processes measures half, and both return the mean over all tokens."""
    from checkpoints import make_model
    from molf.job.trainer import validation

    rows = [[5, 6, 7, 8][: 2 + n % 3] for n in range(5)]
    samples = SimpleNamespace(input_ids=rows, labels=rows)
    model = make_model("qwen2")
    part = Validation(samples, 0, 2)
    alone = part.loss(model)
    assert model.training

    def share(rank, sent):
        def gather(value):
            sent.append(value)
            return [value, *others]

        ranks = SimpleNamespace(
            rank=rank, count=2, gather=gather, everywhere=lambda act: act(), is_main=not rank
        )
        monkeypatch.setattr(validation, "ranks", lambda: ranks)
        return part.loss(model)

    sent, others = [], []
    share(0, sent)
    others = sent[:1]
    assert 0 < len(sent[0]) < 5
    assert share(1, []) == pytest.approx(alone)
