"""Which trials are the same one: places, settings, metrics, and the contents of local files."""

import json
import shutil

import pytest

from checkpoints import write_checkpoint
from molf.cli import main
from molf.job.record import contents
from molf.study.ledger import Ledger
from molf.study.outcome import all_results, read_result, write_result
from molf.study.place import write_record
from molf.study.plan import Outcome, Plan
from study_helpers import FFT, LORA, MOLF, Pretended, study_of, work, write_study

FACTS = {"name": "facts", "task": "demo-fact", "metric": "es"}


def _plan(study, make):
    snapshot = Ledger(study).read()
    return Plan(study, snapshot.outcomes, make, snapshot.drawn)


class Opposed(Pretended):
    """Trials whose two metrics prefer opposite rates."""

    def __call__(self, planned, point, trial=None):
        outcome = super().__call__(planned, point, trial)
        for path in (self.study.output_dir / "results").glob("*/*/*.json"):
            result = read_result(path)
            row = {**result.row, "after/ns": result.row["point"], "after/es": -result.row["point"]}
            if row != result.row:
                write_result(path, type(result)(result.key, row, result.questions, result.settings))
        return outcome


def test_cells_that_differ_in_their_metric_alone_share_trainings_but_not_rows(tmp_path):
    cells = [FACTS, {**FACTS, "name": "near", "metric": "ns"}]
    study, make = study_of(tmp_path, cells=cells, methods=[FFT])
    runner = Opposed(study)
    done, lines = work(study, make, runner)
    assert done.done == study.size == len(all_results(study)) == 16
    assert done.reused == 3
    assert any(line.endswith("near/fft/choose-lr0.01-seed1: ns 2 (reused)") for line in lines)
    plan = _plan(study, make)
    assert (plan.choices["facts", "fft"].index, plan.choices["near", "fft"].index) == (0, 2)
    # The first phase is trained once; the second one has other rates.
    assert len(runner.ran) == 3 + 5 + 5
    rows = {(r.row["cell"], r.row["phase"]): r.row for r in all_results(study).values()}
    assert len(rows) == 4


def test_a_training_elsewhere_without_a_finite_metric_of_the_cell_is_not_taken(tmp_path):
    """A trial that failed by it could not run again."""
    cells = [FACTS, {**FACTS, "name": "near", "metric": "ns"}]
    study, make = study_of(tmp_path, cells=cells, methods=[FFT])
    runner = Pretended(study)  # measures the metric of its cell alone
    done, _ = work(study, make, runner)
    assert (done.failed, done.reused) == (0, 0)
    assert len(runner.ran) == study.size


def test_equal_settings_of_two_methods_are_trained_once(tmp_path):
    """A coin of the share 0 is LoRA with the rest trained."""
    rest = {**MOLF, "name": "rest", "score": "lora"}
    coin = {"name": "coin", "method": "molf", "share_of": "molf"}
    study, make = study_of(tmp_path, methods=[MOLF, rest, coin])
    runner = Pretended(study, full_share=0.0)
    work(study, make, runner)
    results = all_results(study).values()
    assert len(results) == 3 * (3 + 5)
    assert len(runner.ran) == 2 * (3 + 5)
    assert sum(r.row["method"] == "coin" for r in results) == 8
    assert not _plan(study, make).unfinished
    assert main(["study", "report", str(tmp_path / "study.yaml"), "--no_figures"]) == 0
    table = (study.output_dir / "report" / "trials.csv").read_text().splitlines()
    assert sum(line.startswith("facts,coin,") for line in table) == 8
    assert sum(line.startswith("facts,rest,") for line in table) == 8


def test_a_changed_metric_chooses_again_without_a_training(tmp_path):
    study, make = study_of(tmp_path, methods=[FFT])
    work(study, make, Opposed(study))
    assert _plan(study, make).choices["facts", "fft"].index == 0
    study, make = study_of(tmp_path, methods=[FFT], cells=[{**FACTS, "metric": "ns"}])
    runner = Opposed(study)
    work(study, make, runner)
    assert _plan(study, make).choices["facts", "fft"].index == 2
    assert {label.split("/")[-1].split("-seed")[0] for label in runner.ran} == {"report-lr0.01"}


@pytest.mark.parametrize("damage", ["delete", "cut"])
def test_a_lost_result_is_trained_again(tmp_path, damage):
    study, make = study_of(tmp_path, methods=[FFT])
    work(study, make, Pretended(study))
    path = study.output_dir / "results/facts/fft/report-lr0.001-seed13.json"
    if damage == "delete":
        path.unlink()
    else:
        path.write_text(path.read_text()[:50])
    assert [trial.seed for trial in _plan(study, make).unfinished] == [13]
    runner = Pretended(study)
    done, _ = work(study, make, runner)
    assert runner.ran == ["facts/fft/report-lr0.001-seed13"]
    assert done.done == 1
    assert len(all_results(study)) == study.size


def test_equal_rates_of_a_sampler_stay_apart(tmp_path):
    method = {**FFT, "rates": {"learning_rate": {"low": 1e-3, "high": 1e-3}}}
    choose = {"sampler": "random", "trials": 3}
    study, make = study_of(tmp_path, methods=[method], choose=choose)
    runner = Pretended(study)
    done, _ = work(study, make, runner)
    assert done.done == study.size == len(all_results(study))
    assert len(runner.ran) == 1 + 5  # the second and third rate are those of the first


@pytest.fixture
def inputs(tmp_path):
    """A cell with its own model and data in a folder."""
    folder = tmp_path / "inputs"
    write_checkpoint(folder / "base")
    for name, first in (("train", 0), ("test", 20)):
        lines = [
            {"prompt": f"{i} and 1", "completion": f" {i + 1}"} for i in range(first, 20 + first)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def _own(folder):
    return {
        "name": "own",
        "task": "custom",
        "model": str(folder / "base"),
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "test.jsonl"),
        "metric": "loss",
    }


def _keys(tmp_path, folder):
    contents._content.cache_clear()  # as in a new process
    study, make = study_of(tmp_path, cells=[_own(folder)])
    return {trial.key for trial in Plan(study, {}, make, {}).trials}


def test_contents_of_local_inputs_are_part_of_the_identity(tmp_path, inputs):
    keys = _keys(tmp_path, inputs)
    copy = tmp_path / "elsewhere"
    shutil.copytree(inputs, copy)
    assert _keys(tmp_path, copy) == keys
    changed = []
    for path in ("train.jsonl", "test.jsonl", "base/config.json", "base/model.safetensors"):
        content = (copy / path).read_bytes()
        # The same size: one byte near the end.
        (copy / path).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        changed.append(_keys(tmp_path, copy))
        (copy / path).write_bytes(content)
    assert all(keys.isdisjoint(other) for other in changed)
    assert len({frozenset(other) for other in changed}) == 4


def test_weights_and_hub_ids_are_part_of_the_contents(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    given = (f"{one},{two}", f"{one}:2,{two}", f"{one},{two}:2", f"{one},o/x", f"{one},o/y", one)
    found = [contents.contents_of({"data": str(data)})["data"] for data in given]
    assert len(set(found)) == len(given)
    assert contents.contents_of({"data": f"{one}:1,{two}"})["data"] == found[0]
    assert contents.contents_of({"data": "o/x"}) == {}


def test_changed_data_is_a_changed_study(tmp_path, inputs, capsys):
    study, make = study_of(tmp_path, cells=[_own(inputs)])
    work(study, make, Pretended(study))
    contents._content.cache_clear()
    path = inputs / "train.jsonl"
    path.write_text(path.read_text().replace(" and ", " plus "))
    assert main(["study", "work", str(tmp_path / "study.yaml")]) == 2
    error = capsys.readouterr().err
    assert 'cells.own.contents.data "sha256:' in error
    assert "0 of them are also trials of the changed study" in error
    assert main(["study", "status", str(tmp_path / "study.yaml")]) == 0
    assert "warning: The study file or its data differ from those of" in capsys.readouterr().err


def test_two_study_files_with_one_directory(tmp_path, capsys):
    """Also before the first trial has finished, and by the definition where names are equal."""
    study, _ = study_of(tmp_path)
    write_record(study)
    path = write_study(tmp_path, methods=[LORA])
    assert main(["study", "work", str(path)]) == 2
    error = capsys.readouterr().err
    assert "differs from that of the study in its output_dir, which has no finished" in error
    assert "methods.fft removed" in error
    path = write_study(tmp_path, study="other")
    assert main(["study", "work", str(path)]) == 2
    assert "is that of the study 'tried', not of 'other'" in capsys.readouterr().err


def test_directories_without_a_usable_record(tmp_path, capsys):
    study, make = study_of(tmp_path)
    work(study, make, Pretended(study))
    path, record = tmp_path / "study.yaml", study.output_dir / "study.json"
    content = json.loads(record.read_text())
    del content["format"]
    record.write_text(json.dumps(content))
    assert main(["study", "status", str(path)]) == 2
    assert "is that of another version of molf" in capsys.readouterr().err
    record.write_text("{")
    assert main(["study", "work", str(path)]) == 2
    assert "has trials of a study, but its record study.json is missing or" in (
        capsys.readouterr().err
    )


def test_status_of_a_study_without_its_storage(tmp_path, capsys):
    study, make = study_of(tmp_path)
    work(study, make, Pretended(study))
    (study.output_dir / "optuna.sqlite").unlink()
    for command in ("status", "stop", "report"):
        assert main(["study", command, str(tmp_path / "study.yaml")]) == 2
        error = capsys.readouterr().err
        assert "optuna.sqlite is gone. 16 finished trials in" in error
        assert "goes on with them and repeats none" in error
    shutil.rmtree(study.output_dir / "results")
    assert main(["study", "status", str(tmp_path / "study.yaml")]) == 2
    assert "or its files were deleted. `molf study run` starts it" in capsys.readouterr().err


def test_a_changed_assignment_is_a_changed_study(tmp_path, capsys):
    """Its path alone was part of the identity, so that trials of two assignments were mixed."""
    layers = tmp_path / "layers.yaml"
    layers.write_text("default: full\n")
    hybrid = {"name": "hybrid", "method": "hybrid", "assignment": str(layers)}
    hybrid["rates"] = {"learning_rate": [1e-3], "lora_lr_ratio": [3]}

    def keys():
        contents._content.cache_clear()
        study, make = study_of(tmp_path, methods=[hybrid])
        return study, {trial.key for trial in Plan(study, {}, make, {}).trials}

    study, before = keys()
    write_record(study)
    copy = tmp_path / "copy.yaml"
    shutil.copy(layers, copy)
    hybrid["assignment"] = str(copy)
    assert keys()[1] == before
    copy.write_text("default: {r: 4, alpha: 8}\n")
    assert keys()[1].isdisjoint(before)
    hybrid["assignment"] = str(layers)
    layers.write_text("default: {r: 4, alpha: 8}\n")
    assert keys()[1].isdisjoint(before)
    assert main(["study", "work", str(tmp_path / "study.yaml")]) == 2
    assert 'methods.hybrid.contents.assignment "sha256:' in capsys.readouterr().err


def test_the_directory_of_a_study_is_no_folder_for_its_report(tmp_path, capsys):
    """The outline replaced the record of the study, which could not go on."""
    study, make = study_of(tmp_path)
    work(study, make, Pretended(study))
    path = str(tmp_path / "study.yaml")
    assert main(["study", "report", path, "--to", str(study.output_dir), "--no_figures"]) == 2
    assert f"{study.output_dir} is the directory of a study. Give another folder." in (
        capsys.readouterr().err
    )
    assert main(["study", "status", path]) == 0


def test_a_change_counts_the_second_phase_of_a_method_with_a_failed_rate(tmp_path, capsys):
    """A failed trial has no result, so that the chosen rate and its rows seemed to be unknown."""

    class Failing(Pretended):
        def __call__(self, planned, point, trial=None):
            if planned.label(point).startswith("choose-lr0.01"):
                return Outcome("failed", None, point, error="it broke")
            return super().__call__(planned, point, trial)

    study, make = study_of(tmp_path, methods=[FFT])
    work(study, make, Failing(study))
    assert len(all_results(study)) == 2 + 5
    write_study(tmp_path, methods=[FFT, LORA])
    assert main(["study", "work", str(tmp_path / "study.yaml")]) == 2
    assert "7 of them are also trials of the changed study and are not repeated; 0 are" in (
        capsys.readouterr().err
    )
