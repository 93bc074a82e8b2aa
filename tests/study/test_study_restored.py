"""A study that goes on from its stored CSV files, after its directory was lost."""

import json
import shutil

import pytest

from molf.cli import main
from molf.study.outcome import TrialResult, all_results, write_result
from molf.study.report.records import read_records
from study_helpers import FFT, LORA, MOLF, Pretended, study_of, work, write_study

CONTROL = {"name": "coin", "method": "molf", "share_of": "molf"}
METHODS = [FFT, LORA, MOLF, CONTROL]


class Answered(Pretended):
    """Trials with the columns and the answers of real ones."""

    def __call__(self, planned, point, trial=None):
        outcome = super().__call__(planned, point, trial)
        file = self.results._folder / planned.cell.name / planned.method.name
        file = file / f"{planned.label(point)}.json"
        found = self.results.refresh().by_key[planned.key]
        row = {**found.row, "steps": 15, "training_flops": 1.5e11, "commit": "0" * 40}
        row |= {
            "after/execution_accuracy": 0.5,
            "dirty": False,
            "python": "3.11.7",
            "version/molf": "0.1.0",
            "before/es": 1.0,
        }
        scores = {"es": {"0": (1.0, 1.0), "7": (0.25, 1.0), "9": (3.0, 10.0)}}
        write_result(file, TrialResult(found.key, row, scores, found.settings, "made" * 5))
        return outcome


def stored(folder, *, fails=(), **changes):
    """A finished study, and the folder of its report; the study's own directory is deleted."""
    study, make = study_of(folder, methods=METHODS, **changes)
    work(study, make, Answered(study, fails=fails, full_share=0.25))
    assert main(["study", "report", str(folder / "study.yaml"), "--to", str(folder / "kept")]) == 0
    results = all_results(study)
    shutil.rmtree(study.output_dir)
    return folder / "kept", results


def test_a_lost_study_goes_on_from_its_csv_files_and_repeats_no_trial(tmp_path, capsys):
    kept, before = stored(tmp_path)
    files = {path: path.read_bytes() for path in kept.rglob("*.csv")}
    capsys.readouterr()
    assert main(["study", "restore", str(tmp_path / "study.yaml"), str(kept)]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out'}: {len(before)} finished trials from {kept}. `molf study run` runs the "
        "rest.\n"
    )
    study, make = study_of(tmp_path, methods=METHODS)
    after = all_results(study)
    assert {key: (one.questions, one.settings, one.trained) for key, one in after.items()} == {
        key: (one.questions, one.settings, one.trained) for key, one in before.items()
    }
    runner = Answered(study, full_share=0.25)
    done, _ = work(study, make, runner)
    assert (done.done, done.reused, runner.ran) == (len(before), len(before), [])
    # The same bytes: nothing of a row is lost on the way.
    assert main(["study", "report", str(tmp_path / "study.yaml"), "--to", str(kept)]) == 0
    assert {path: path.read_bytes() for path in kept.rglob("*.csv")} == files


def test_rows_of_another_study_are_taken_where_their_trials_are_the_same(tmp_path, capsys):
    kept, before = stored(tmp_path)
    capsys.readouterr()
    path = write_study(tmp_path, study="other", methods=[FFT, MOLF])
    assert main(["study", "restore", str(path), str(kept)]) == 0
    wanted = {key for key, one in before.items() if one.row["method"] in ("fft", "molf")}
    assert capsys.readouterr().out.startswith(
        f"{tmp_path / 'out'}: {len(wanted)} finished trials from {kept}; "
        f"{len(before) - len(wanted)} are not part of this study. "
    )
    assert main(["study", "restore", str(path), str(kept)]) == 0
    assert f"0 finished trials from {kept}; {len(wanted)} were there" in capsys.readouterr().out


def test_failed_trials_run_again_and_no_other_one(tmp_path, capsys):
    kept, _ = stored(tmp_path, fails=("fft/choose-lr0.01",))
    assert main(["study", "restore", str(tmp_path / "study.yaml"), str(kept)]) == 0
    assert "; 1 failed or were ended early, and will run again" in capsys.readouterr().out
    study, make = study_of(tmp_path, methods=METHODS)
    runner = Answered(study, fails=("nothing",), full_share=0.25)
    work(study, make, runner)
    assert runner.ran == ["facts/fft/choose-lr0.01-seed1"]


@pytest.mark.parametrize(
    ("break_it", "part"),
    [
        (lambda kept: shutil.rmtree(kept), "is no stored study"),
        (lambda kept: (kept / "trials.csv").write_text('cell,"\n'), "is no stored study"),
        (lambda kept: (kept / "study.json").write_text("{}"), "is no stored study"),
    ],
)
def test_a_folder_without_a_stored_study_is_refused(tmp_path, capsys, break_it, part):
    kept, _ = stored(tmp_path)
    break_it(kept)
    assert main(["study", "restore", str(tmp_path / "study.yaml"), str(kept)]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rows_of_no_trial_of_the_study_are_refused(tmp_path, capsys):
    kept, before = stored(tmp_path)
    cells = [{"name": "facts", "task": "demo-fact", "metric": "es", "max_samples": 32}]
    path = write_study(tmp_path, cells=cells, methods=METHODS)
    assert main(["study", "restore", str(path), str(kept)]) == 2
    error = capsys.readouterr().err
    assert f"None of the {len(before)} finished trials in {kept} is a trial of tried" in error
    assert not (tmp_path / "out").exists()


def test_a_number_keeps_its_type(tmp_path):
    kept, _ = stored(tmp_path)
    main(["study", "restore", str(tmp_path / "study.yaml"), str(kept)])
    file = next((tmp_path / "out" / "results").glob("*/*/*.json"))
    row = json.loads(file.read_text())["row"]
    assert (row["steps"], type(row["steps"]), type(row["before/es"])) == (15, int, float)


def test_a_study_that_grew_takes_rows_once_its_changes_are_accepted(tmp_path, capsys):
    """The refusal offers `--accept_changes`, which `restore` did not have."""
    kept, before = stored(tmp_path)
    arguments = ["study", "restore", str(write_study(tmp_path, methods=[FFT])), str(kept)]
    assert main(arguments) == 0
    write_study(tmp_path, methods=METHODS)
    capsys.readouterr()
    assert main(arguments) == 2
    assert "Give --accept_changes to go on" in capsys.readouterr().err
    assert main([*arguments, "--accept_changes"]) == 0
    study, _ = study_of(tmp_path, methods=METHODS)
    assert all_results(study).keys() == before.keys()


def test_trials_with_metrics_of_another_version_are_counted(tmp_path, capsys):
    kept, before = stored(tmp_path)
    capsys.readouterr()
    assert main(["study", "restore", str(tmp_path / "study.yaml"), str(kept)]) == 0
    assert f"warning: {len(before)} of them have metrics of another version than new trials" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_further_rate_repeats_no_trial_wherever_it_stands(tmp_path, capsys, place):
    """The points behind it move by one number; neither they nor their rows are other trials."""
    kept, before = stored(tmp_path)
    rates = list(FFT["rates"]["learning_rate"])
    rates.insert(place, 1e-6)

    def wider(method):
        name, *_ = method["rates"]
        return {**method, "rates": {**method["rates"], name: rates}}

    lora = {**LORA, "rates": {"lora_learning_rate": [2e-2, *LORA["rates"]["lora_learning_rate"]]}}
    changed = {"methods": [wider(FFT), lora, wider(MOLF), CONTROL]}
    write_study(tmp_path, **changed)
    assert main(["study", "restore", str(tmp_path / "study.yaml"), str(kept)]) == 0
    assert f": {len(before)} finished trials from" in capsys.readouterr().out
    study, make = study_of(tmp_path, **changed)
    runner = Answered(study, full_share=0.25)
    work(study, make, runner)
    assert sorted(runner.ran) == [
        "facts/coin/choose-lr1e-06-ratio3-seed1",
        "facts/fft/choose-lr1e-06-seed1",
        "facts/lora/choose-lora_lr0.02-seed1",
        "facts/molf/choose-lr1e-06-ratio3-seed1",
    ]
    assert main(["study", "report", str(tmp_path / "study.yaml"), "--to", str(kept)]) == 0
    rows = [row for row in read_records(kept).rows if row["method"] == "fft"]
    chosen = [(row["point"], row["learning_rate"]) for row in rows if row["phase"] == "choose"]
    assert chosen == list(enumerate(rates))
    assert {row["point"] for row in rows if row["phase"] == "report"} == {rates.index(1e-3)}
