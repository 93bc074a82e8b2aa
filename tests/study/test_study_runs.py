"""A study of real trainings on a tiny model, from the file to its tables."""

import errno
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import yaml
from optuna.exceptions import StorageInternalError
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from molf.cli import main
from molf.cli.study_options import open_study
from molf.disk.locks import Lock
from molf.job.record.result import RunError
from molf.job.record.routing_log import iter_steps
from molf.job.run import train
from molf.study.outcome import all_results, result_file, run_directory, write_result
from molf.study.plan import Plan
from molf.study.routed_layers import RoutedLayer, full_weights, moved_parameters
from molf.study.running import alone
from molf.study.trial import TrialRunner
from study_helpers import study_of, write_study

torch.set_num_threads(1)
FFT = {"name": "fft", "method": "fft", "rates": {"learning_rate": [1e-2]}}
MOLF = {
    "name": "molf",
    "method": "molf",
    "ranks": 2,
    "rates": {"learning_rate": [1e-2], "lora_lr_ratio": [3]},
}


def _records(path, first, count):
    lines = [
        json.dumps({"prompt": f"{i} and {i + 1} make", "completion": f" {2 * i + 1}"})
        for i in range(first, first + count)
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study of twelve trials, run by one worker in this process."""
    folder = tmp_path_factory.mktemp("study")
    cell = {
        "name": "sums",
        "task": "custom",
        "model": str(write_checkpoint(folder / "base")),
        "data": _records(folder / "train.jsonl", 0, 20),
        "eval_data": _records(folder / "test.jsonl", 20, 6),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "metric": "loss",
    }
    path = write_study(folder, cells=[cell], methods=[FFT, MOLF], keep="models")
    assert main(["study", "run", str(path)]) == 0
    return folder


@pytest.fixture(scope="module")
def study(folder):
    return open_study(folder / "study.yaml")


def test_every_trial_is_a_run_with_a_row(study):
    opened, _ = study
    results = all_results(opened)
    assert len(results) == opened.size == 12
    for result in results.values():
        row = result.row
        assert row["after/loss"] != row["before/loss"]
        assert row["steps"] == 2
        assert row["training_flops"] == row["tokens"] * (
            4 * row["parameters"] + 2 * row["trained_parameters"]
        )
        assert "/" not in json.dumps([v for v in row.values() if isinstance(v, str)])
        assert result.questions.keys() == {"exact_match"}
    labels = sorted(path.name for path in (opened.output_dir / "trials/sums/molf").glob("*-*"))
    assert labels[0] == "choose-lr0.01-ratio3-seed1"
    assert labels[1:] == [f"report-lr0.01-ratio3-seed{seed}" for seed in range(11, 16)]


def test_moved_parameters_and_the_share_of_weights_in_full(study):
    """Counted layer by layer from the routing log and the saved weights."""
    opened, _ = study
    for result in all_results(opened).values():
        row = result.row
        if row["method"] == "fft":
            assert row["moved_parameters"] == row["trained_parameters"]
            continue
        label = f"{row['phase']}-lr0.01-ratio3-seed{row['seed']}"
        run = run_directory(opened, "sums", "molf", label)
        weights = load_file(run / "model" / "model.safetensors")
        won, updates, full = {}, 0, 0
        for step in iter_steps(run):
            for layer, one in step["selections"].items():
                own = won.setdefault(layer, set())
                if any(one["scores"].values()):  # none in the first step, whose rate is 0
                    own.update(one["winners"])
                    size = weights[f"{layer}.weight"].numel()
                    updates += size
                    full += size * ("full" in one["winners"])
        routed = {layer: weights[f"{layer}.weight"] for layer in won}
        dense = sum(weight.numel() for weight in weights.values())
        for layer, weight in routed.items():
            if "full" not in won[layer]:
                dense -= weight.numel()
                bias = weights.get(f"{layer}.bias")  # routed with its weight
                dense -= 0 if bias is None else bias.numel()
        rank = MOLF["ranks"]
        factors = sum(rank * sum(routed[layer].shape) for layer in routed if won[layer] - {"full"})
        assert row["moved_parameters"] == dense + factors < row["trained_parameters"]
        assert row["full_weights"] == pytest.approx(full / updates, abs=1e-6)


def test_a_layer_counts_by_its_weight_in_the_share_of_weights_in_full():
    small = RoutedLayer({"full": 0.5, "lora0_r4": 0.5}, (4, 8), 4)
    large = RoutedLayer({"full": 0.0, "lora0_r4": 1.0}, (16, 8), 0)
    assert full_weights([small, large]) == pytest.approx(0.5 * 32 / (32 + 128))
    # large: its weight has not moved. small: everything has.
    assert moved_parameters(1000, [small, large]) == 1000 - 128
    assert full_weights([RoutedLayer({"lora0_r4": 1.0}, (4, 8), 0)]) is None
    assert full_weights([]) is None


def test_rates_are_chosen_on_the_validation_part_and_confirmed_on_the_test_part(study):
    opened, _ = study
    for label, part in (
        ("choose-lr0.01-seed1", "validation"),
        ("report-lr0.01-seed11", "test"),
    ):
        run = run_directory(opened, "sums", "fft", label)
        config = (run / "config.yaml").read_text()
        assert f"eval_part: {part}\n" in config
    found = {r.row["phase"]: r.questions["exact_match"] for r in all_results(opened).values()}
    assert len(found["report"]) == 6
    assert found["choose"].keys() != found["report"].keys()


def _hashes(directory):
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in ("model/model.safetensors", "predictions.jsonl", "eval.json")
    }


@pytest.mark.parametrize("method", ["fft", "molf"])
def test_a_warm_trial_has_the_bits_of_molf_train_alone(study, tmp_path, method):
    opened, make = study
    trials = [t for t in Plan(opened, {}, make, {}).trials if t.method.name == method]
    last = replace(trials[0].settings, eval_part="test", seed=15, output_dir=tmp_path / "alone")
    alone = train(last).directory
    point = trials[0].point
    label = trials[0].label(point).replace("choose", "report").replace("seed1", "seed15")
    assert _hashes(run_directory(opened, "sums", method, label)) == _hashes(alone)


def test_a_second_run_repeats_nothing(folder, study, capsys):
    opened, _ = study
    before = {path: path.stat().st_mtime_ns for path in opened.output_dir.rglob("*.json*")}
    assert main(["study", "run", str(folder / "study.yaml")]) == 0
    assert "0 trials run here; no trial is left" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before


class Hopeless:
    """A trial of Optuna that is to be ended at its first report."""

    def __init__(self):
        self.reports = []

    def report(self, value, step):
        self.reports.append((value, step))

    def should_prune(self):
        return True


def test_the_pruner_ends_a_training_by_its_loss(study, tmp_path):
    opened, make = study
    pruned = replace(
        opened, output_dir=tmp_path, keep="records", choose=replace(opened.choose, prune="median")
    )
    planned = Plan(opened, {}, make, {}).trials[0]
    planned = replace(planned, settings=replace(planned.settings, logging_steps=1))
    trial = Hopeless()
    outcome = TrialRunner(pruned, None)(planned, planned.point, trial)
    assert (outcome.state, outcome.value) == ("pruned", None)
    ((loss, step),) = trial.reports
    assert (loss > 0, step) == (True, 1)  # the metric is a loss, so Optuna minimises
    assert not all_results(pruned)
    assert not list(tmp_path.rglob("model.safetensors"))


class Unreachable(Hopeless):
    """A trial of Optuna whose storage fails."""

    def report(self, value, step):
        raise StorageInternalError("the server is gone")


def test_a_storage_that_fails_while_the_pruner_is_asked_fails_no_trial(study, tmp_path):
    opened, make = study
    pruned = replace(opened, output_dir=tmp_path, choose=replace(opened.choose, prune="median"))
    planned = Plan(opened, {}, make, {}).trials[0]
    with pytest.raises(StorageInternalError, match="the server is gone"):
        TrialRunner(pruned, None)(planned, planned.point, Unreachable())
    assert not all_results(pruned)


def test_records_alone_are_kept_by_default(folder, tmp_path):
    study, _ = study_of(tmp_path)
    assert study.keep == "records"


def test_a_trial_waits_for_another_worker_that_runs_it(study, tmp_path, monkeypatch):
    """A worker that was taken for dead, or that has the file before a change."""
    opened, make = study
    here = replace(opened, output_dir=tmp_path, keep="records")
    planned = Plan(here, {}, make, {}).trials[0]
    place = (planned.cell.name, planned.method.name, planned.label(planned.point))
    done = all_results(opened)[planned.key]
    monkeypatch.setattr(TrialRunner, "_train", lambda *_: pytest.fail("it was trained twice"))
    with ThreadPoolExecutor() as pool:
        with alone(here, "trials", *place):
            outcome = pool.submit(TrialRunner(here, None), planned, planned.point)
            with pytest.raises(TimeoutError):
                outcome.result(0.3)
            write_result(result_file(here, *place), done)
        assert outcome.result(60).is_reused


def test_files_of_another_process_in_the_directory_of_a_trial_are_kept(study, tmp_path):
    opened, make = study
    here = replace(opened, output_dir=tmp_path, keep="records")
    planned = Plan(here, {}, make, {}).trials[0]
    model = run_directory(
        here, planned.cell.name, planned.method.name, planned.label(planned.point)
    )
    model = model / "model"
    model.mkdir(parents=True)
    with Lock(model.parent):
        outcome = TrialRunner(here, None)(planned, planned.point)
    assert "is in use: another process runs this trial" in outcome.error
    assert model.is_dir()


def test_a_full_disk_ends_the_worker_and_fails_no_trial(folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")
        except OSError as error:
            raise RunError(f"The run failed: {error}.") from error

    content = yaml.safe_load((folder / "study.yaml").read_text())
    path = write_study(tmp_path, cells=content["cells"], methods=content["methods"])
    monkeypatch.setattr("molf.job.run.train", full)
    assert main(["study", "work", str(path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"molf: error: The disk of .* is full: .*No space left.* Finished trials", error
    )
    assert main(["study", "status", str(path)]) == 0
    assert "0 failed, 0 pruned, 0 running, 12 left" in capsys.readouterr().out
