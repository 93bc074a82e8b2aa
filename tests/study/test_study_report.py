"""Statistics, tables and figures of a study, from stored CSV files alone."""

import json
import math
import re
import shutil
from dataclasses import replace
from statistics import stdev
from typing import ClassVar

import numpy as np
import pytest

from molf.cli import main
from molf.measure.estimates import (
    difference_of_questions,
    mean_of_questions,
    over_seeds,
    pareto_front,
)
from molf.measure.questions import question_scores
from molf.report.place import is_page
from molf.study.outcome import TrialResult, all_results, write_result
from molf.study.report.records import outline_of, read_records
from molf.study.report.summary import summarise
from study_helpers import FFT, LORA, MOLF, Pretended, study_of, work, write_study


class Measured(Pretended):
    """Trials with questions: methods differ by a known number of right answers."""

    right: ClassVar = {"fft": 12, "lora": 8, "molf": 14, "coin": 11}

    def __call__(self, planned, point, trial=None):
        outcome = super().__call__(planned, point, trial)
        place = (planned.cell.name, planned.method.name, planned.label(point))
        file = self.study.output_dir / "results" / "/".join(place[:2]) / f"{place[2]}.json"
        rng = np.random.default_rng(planned.seed)
        easy = rng.permutation(20)
        right = self.right[planned.method.name]
        scores = {str(i): (float(easy[i] < right), 1.0) for i in range(20)}
        value = None if outcome.value is None else right / 20
        row = {
            **all_results(self.study)[planned.key].row,
            "after/es": value if planned.phase == "report" else outcome.value,
            "before/es": 0.25,
            "after/forgetting_loss": 1 + right / 10 + planned.seed / 1000,
            "before/forgetting_loss": 1.0,
            "training_flops": 1e9,
            "commit": "abc",
            "device": "cpu x86_64",
            "version/molf": "0.1.0",
        }
        if planned.method.name == "molf":
            row["won/full"] = 0.25
        write_result(file, TrialResult(planned.key, row, {"es": scores}))
        return outcome


class Shared(Measured):
    """The expert full takes a quarter of the updates of molf."""

    def __call__(self, planned, point, trial=None):
        outcome = super().__call__(planned, point, trial)
        is_routed = planned.method.name == "molf"
        return replace(outcome, full_share=0.25) if is_routed else outcome


CONTROL = {"name": "coin", "method": "molf", "share_of": "molf"}
CHANGES = {"methods": [FFT, LORA, MOLF, CONTROL], "report": {"baseline": ["fft", "lora"]}}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished study with a share-matched control; the trials that ran."""
    folder = tmp_path_factory.mktemp("finished")
    study, make = study_of(folder, **CHANGES)
    runner = Shared(study)
    work(study, make, runner)
    return study.output_dir, runner


@pytest.fixture
def finished(original, tmp_path):
    """A copy of the finished study, for one test."""
    directory, runner = original
    study, _ = study_of(tmp_path, **CHANGES)
    shutil.copytree(directory, study.output_dir)
    return tmp_path, study, runner


def test_report_of_a_finished_study(finished, capsys):
    folder, _, _ = finished
    path = folder / "study.yaml"
    assert main(["study", "report", str(path), "--to", str(folder / "stored")]) == 0
    assert capsys.readouterr().out == f"{folder / 'stored' / 'report.md'}\n"
    text = (folder / "stored" / "report.md").read_text()
    assert "- trials: 32 complete" in text
    assert "Missing rows" not in text
    cell = summarise(read_records(folder / "stored"))[0]
    assert cell.baseline == "fft"
    assert cell.base == 0.25
    known = {one.name: one for one in cell.methods}
    assert known["lora"].comparison.estimate.value == pytest.approx(-0.2)
    assert known["lora"].comparison.estimate.high < 0
    assert (known["molf"].comparison.better, known["molf"].comparison.seeds) == (5, 5)
    assert known["molf"].value.value == pytest.approx(0.7)
    assert known["molf"].harm["forgetting_loss"].value == pytest.approx(1.413)
    assert known["molf"].point == {"learning_rate": 1e-3, "lora_learning_rate": 3e-3}
    assert known["fft"].trials == 3 + 5
    assert known["fft"].flops == 8e9
    assert known["fft"].curve == {1e-4: 0.75, 1e-3: 1.0, 1e-2: 0.75}
    assert known["fft"].sensitivity.area == pytest.approx(0.9375)
    assert known["fft"].sensitivity.worst == pytest.approx(0.875)
    (control,) = cell.controls["molf"]
    assert control.name == control.own.other == "coin"
    assert control.own.estimate.value == pytest.approx(0.15)
    assert control.equal == control.own  # the control has chosen the same rates
    for name in ("rates-facts.png", "pareto-facts.png"):
        assert (folder / "stored" / name).stat().st_size > 5000
    page = folder / "stored" / "report.html"
    assert is_page(page)
    (data,) = re.findall(r'id="data">(.*?)</script>', page.read_text(), re.S)
    figures = {one["id"].rpartition("-")[0]: one for one in json.loads(data)["figures"]}
    rates = figures["rates-facts"]
    assert rates["log_x"]
    fft = next(one for one in rates["series"] if one["name"] == "fft")
    at = dict(zip(rates["x"], fft["values"], strict=True))
    assert [at[rate] for rate in (1e-4, 1e-3, 1e-2)] == [0.75, 1, 0.75]
    front = figures["pareto-facts-forgetting_loss"]
    molf = next(one for one in front["points"] if one["name"] == "molf")
    assert (molf["x"][0], molf["y"][0]) == pytest.approx((1.413, 0.7))


def test_a_report_is_made_again_from_its_csv_files_alone(finished):
    folder, study, _ = finished
    main(["study", "report", str(folder / "study.yaml"), "--to", str(folder / "stored")])
    moved = folder / "moved"
    moved.mkdir()
    for name in ("study.json", "trials.csv", "questions"):
        (folder / "stored" / name).rename(moved / name)
    shutil.rmtree(study.output_dir)
    assert main(["study", "report", str(moved)]) == 0
    for name in ("report.md", "summary.csv", "rates-facts.png", "pareto-facts.png"):
        assert (moved / name).read_bytes() == (folder / "stored" / name).read_bytes()


def test_stored_files_can_be_committed(finished):
    folder, study, _ = finished
    main(["study", "report", str(folder / "study.yaml"), "--no_figures"])
    stored = study.output_dir / "report"
    for name in ("study.json", "trials.csv", "questions/facts.csv", "report.md", "summary.csv"):
        text = (stored / name).read_text()
        assert str(folder) not in text
        assert "\r" not in text
    first = (stored / "trials.csv").read_bytes()
    main(["study", "report", str(folder / "study.yaml"), "--no_figures"])
    assert (stored / "trials.csv").read_bytes() == first
    assert not list(stored.glob("*.png"))
    assert is_page(stored / "report.html")
    rows = read_records(stored).rows
    places = [(r["method"], r["phase"], r["point"], r["seed"]) for r in rows]
    assert places[:4] == [
        ("fft", "choose", 0, 1),
        ("fft", "choose", 1, 1),
        ("fft", "choose", 2, 1),
        ("fft", "report", 1, 11),
    ]


def test_controls_have_the_share_of_their_method(finished):
    _, study, runner = finished
    for result in all_results(study).values():
        if result.row["method"] == "coin":
            assert result.row["learning_rate"] in (1e-4, 1e-3, 1e-2)
    from molf.study.plan import control_score

    assert control_score(0.25) == "random:0.250"
    assert (control_score(0.0), control_score(1.0)) == ("lora", "full")
    # The control starts after its method's trials at the same rates.
    ran = [label.split("/")[1:] for label in runner.ran]
    first = ran.index(["coin", "choose-lr0.0001-ratio3-seed1"])
    assert ran.index(["molf", "choose-lr0.0001-ratio3-seed1"]) < first


def test_missing_and_failed_rows_are_named(tmp_path):
    study, make = study_of(tmp_path)
    work(study, make, Measured(study, fails=["lora/report-lora_lr0.003-seed12"]))
    main(["study", "report", str(tmp_path / "study.yaml"), "--no_figures"])
    text = (study.output_dir / "report" / "report.md").read_text()
    assert "Missing rows" not in text
    failed = "- facts, lora: seeds 12; 4 are complete. Values are means of these"
    assert failed in text.partition("## Failed seeds on the test part")[2]
    assert "(incomplete: 4 of 5 seeds)" in text
    assert "- facts, lora, report lora_lr 0.003 seed 12: the run has no finite metric es" in text


def test_unfinished_studies_have_a_report(tmp_path):
    study, make = study_of(tmp_path)

    class Few(Measured):
        def __call__(self, planned, point, trial=None):
            if len(self.ran) == 4:
                raise KeyboardInterrupt
            return super().__call__(planned, point, trial)

    with pytest.raises(KeyboardInterrupt):
        work(study, make, Few(study))
    assert main(["study", "report", str(tmp_path / "study.yaml"), "--no_figures"]) == 0
    text = (study.output_dir / "report" / "report.md").read_text()
    assert "- facts, lora: 3 of 3 rate trials; all 5 seeds" in text
    assert "- facts, fft: seeds 12, 13, 14, 15" in text


def test_the_outline_has_the_names_of_data_files_without_their_folders(tmp_path):
    (tmp_path / "c,d.jsonl").write_text("")
    cells = [
        {"name": name, "task": "demo-fact", "metric": "es", "data": data}
        for name, data in (
            ("one", "/x/a.jsonl"),
            ("second", "a.jsonl,/x/b.jsonl"),
            ("weighted", "/x/a.jsonl:2, /y/b.jsonl,owner/name"),
            ("comma", str(tmp_path / "c,d.jsonl")),
        )
    ]
    study, _ = study_of(tmp_path, cells=cells)
    found = {name: entry["options"]["data"] for name, entry in outline_of(study)["cells"].items()}
    assert found == {
        "one": "a.jsonl",
        "second": "a.jsonl,b.jsonl",
        "weighted": "a.jsonl:2,b.jsonl,owner/name",
        "comma": "c,d.jsonl",
    }


def test_folders_that_are_no_stored_study(tmp_path, capsys):
    assert main(["study", "report", str(tmp_path)]) == 2
    assert "is no stored study (study.json, trials.csv, questions/)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["trials.csv", "report.md", "report.html", "summary.csv"])
def test_reports_replace_no_other_files(finished, capsys, name):
    folder, _, _ = finished
    other = folder / "other"
    other.mkdir()
    (other / name).write_text("mine")
    assert main(["study", "report", str(folder / "study.yaml"), "--to", str(other)]) == 2
    assert f"has a {name} of another origin" in capsys.readouterr().err
    assert [(one.name, one.read_text()) for one in other.iterdir()] == [(name, "mine")]


def test_rows_without_a_commit(finished):
    folder = finished[0] / "stored"
    report = ["study", "report", "--no_figures"]
    assert main([*report, str(finished[0] / "study.yaml"), "--to", str(folder)]) == 0
    assert "- commit: abc\n" in (folder / "report.md").read_text()
    rows = folder / "trials.csv"
    rows.write_text(rows.read_text().replace(",abc,", ",,"))
    assert main([*report, str(folder)]) == 0
    assert "- commit: unknown\n" in (folder / "report.md").read_text()


def test_status_of_a_study(finished, capsys):
    folder, _, _ = finished
    assert main(["study", "status", str(folder / "study.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "tried: 32 of 32 trials complete, 0 failed, 0 pruned, 0 running, 0 left" in printed
    assert "best rate trial in facts: es 1, fft, choose-lr0.001-seed1" in printed


def test_a_changed_study_shows_the_difference(finished, capsys):
    folder, _, _ = finished
    changed = [FFT, {**LORA, "ranks": 8}]
    path = write_study(folder, methods=changed)
    assert main(["study", "run", str(path)]) == 2
    error = capsys.readouterr().err
    assert "differ from those of its 32 finished trials" in error
    assert "methods.lora.options.ranks added" in error
    assert "methods.molf removed" in error
    # The trials of fft stay: three rates and five seeds.
    assert "8 of them are also trials of the changed study and are not repeated; 24 are" in error
    opened, make = study_of(folder, methods=changed)
    runner = Pretended(opened)
    done, _ = work(opened, make, runner)
    assert {label.split("/")[1] for label in runner.ran} == {"lora"}
    assert done.done == 8


def test_intervals_of_questions_and_seeds():
    rng = np.random.default_rng(0)
    scores = {
        seed: {str(i): (float(rng.random() < 0.6), 1.0) for i in range(200)} for seed in range(5)
    }
    found = mean_of_questions("es", {"es": scores})
    mean = np.mean([part for one in scores.values() for part, _ in one.values()])
    assert found.value == pytest.approx(mean)
    # At least as wide as that of 1,000 independent answers, and not absurdly wider.
    simple = 1.96 * math.sqrt(mean * (1 - mean) / 1000)
    assert simple < (found.high - found.low) / 2 < 3 * simple
    same = difference_of_questions("es", {"es": scores}, {"es": scores})
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.differs
    assert mean_of_questions("es", {}) is None


def test_harmonic_means_and_unequal_attempts():
    rewrite = {1: {"0": (1.0, 1.0), "1": (0.0, 1.0)}}
    paraphrase = {1: {"0": (2.0, 2.0), "1": (1.0, 2.0)}}
    near = {1: {"0": (5.0, 10.0), "1": (9.0, 10.0)}}
    found = mean_of_questions("s", {"es": rewrite, "ps": paraphrase, "ns": near})
    assert found.value == pytest.approx(3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.7))


def test_pairs_that_one_method_lacks_are_left_out():
    one = {"es": {1: {"0": (1.0, 1.0), "1": (1.0, 1.0)}, 2: {"0": (1.0, 1.0)}}}
    other = {"es": {1: {"0": (0.0, 1.0), "2": (1.0, 1.0)}}}
    assert difference_of_questions("es", one, other).value == 1.0


def test_students_interval():
    found = over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3
    assert found.high - 3 == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-4)
    assert math.isnan(over_seeds([1.0]).low)


@pytest.mark.parametrize(("count", "quantile"), [(31, 2.0423), (32, 2.0395), (61, 2.0003),
                                                 (121, 1.9799), (1001, 1.9623)])  # fmt: skip
def test_students_interval_of_many_values(count, quantile):
    """Quantiles from tables of Student's t."""
    values = [float(number % 7) for number in range(count)]
    found = over_seeds(values)
    assert found.high - found.value == pytest.approx(
        quantile * stdev(values) / math.sqrt(count), rel=2e-4
    )


def test_points_that_no_other_one_beats():
    points = {"a": (1.0, 0.5), "b": (2.0, 0.9), "c": (3.0, 0.9), "d": (1.0, 0.5), "e": (1.5, 0.4)}
    assert pareto_front(points) == ["a", "b", "d"]


def test_scores_of_questions_from_predictions():
    pair = {"p_new": 0.6, "p_true": 0.3}
    fact = {
        "index": 3,
        "prediction": " Rome is",
        "target_new": "Rome",
        "target_true": "Paris",
        "rewrite": [pair],
        "paraphrase": [pair, {"p_new": 0.1, "p_true": 0.2}],
        "neighbourhood": [pair],
    }
    letters = {"A": -3.0, "B": -1.0, "C": -2.0, "D": -4.0}
    med = {"index": 0, "prediction": "A", "answer": "A", "expected": "B", "log_probs": letters}
    assert question_scores([fact, {"index": 4, "prediction": None, "left_out": "too long"}]) == {
        "acc_new": {"3": (1.0, 1)},
        "es": {"3": (1.0, 1.0)},
        "ps": {"3": (1.0, 2.0)},
        "ns": {"3": (0.0, 1.0)},
    }
    assert question_scores([med]) == {
        "accuracy": {"0": (0.0, 1)},
        "accuracy_logprob": {"0": (1.0, 1)},
    }
