"""Controls of a method: their rates, their points in both phases, and their shares."""

from collections import Counter
from pathlib import Path

import pytest

from molf.cli import main
from molf.cli.study_options import open_study
from molf.study.checks import differing_scalings
from molf.study.ledger import Ledger
from molf.study.outcome import all_results
from molf.study.plan import FAILED, Outcome, Plan
from study_helpers import FFT, LORA, MOLF, Pretended, study_of, work

SHUFFLED = {"name": "shuffled", "method": "molf", "score": "shuffled:epd", "control_of": "molf"}
COIN = {"name": "coin", "method": "molf", "share_of": "molf"}


class Apart(Pretended):
    """Controls are best at the last rate, and their method at the first."""

    def value(self, planned, point, label):
        return planned.index if planned.method.control_of else -planned.index


@pytest.mark.parametrize("control", [SHUFFLED, COIN])
def test_controls_are_measured_at_their_own_and_at_their_methods_rate(tmp_path, control):
    study, make = study_of(tmp_path, methods=[control, MOLF])
    assert study.size == 2 * (3 + 5) + 5
    runner = Apart(study, full_share=0.25)
    work(study, make, runner)
    rows = [result.row for result in all_results(study).values()]
    found = Counter((row["method"], row["point"]) for row in rows if row["phase"] == "report")
    assert found == {("molf", 0): 5, (control["name"], 2): 5, (control["name"], 0): 5}
    seeds = {row["seed"] for row in rows if row["method"] == control["name"]}
    assert seeds == {1, 11, 12, 13, 14, 15}
    plan = Plan(study, Ledger(study).read().outcomes, make, {})
    assert sum(plan.sizes.values()) == study.size
    if control is COIN:
        scores = {t.settings.score for t in plan.trials if t.method.name == "coin"}
        assert scores == {"random:0.250"}


def test_equal_choices_are_measured_once(tmp_path, capsys):
    study, make = study_of(tmp_path, methods=[MOLF, SHUFFLED])
    work(study, make, Pretended(study))
    assert len(all_results(study)) == 2 * (3 + 5)
    assert main(["study", "status", str(tmp_path / "study.yaml")]) == 0
    assert "16 of 16 trials complete, 0 failed, 0 pruned, 0 running, 0 left" in (
        capsys.readouterr().out
    )


def test_dry_run_counts_controls(tmp_path, capsys):
    study_of(tmp_path, methods=[MOLF, SHUFFLED])
    assert main(["study", "run", str(tmp_path / "study.yaml"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "tried: 1 cell, 2 methods, at most 21 trials" in printed
    assert "  1 x 5 seeds of controls at the chosen rates of their methods" in printed


def test_dry_run_names_scalings_that_differ(tmp_path, capsys):
    """MoLF's alpha is one number for every rank, that of LoRA depends on the rank."""
    wide = {**MOLF, "ranks": 16, "alpha": 32}
    study_of(
        tmp_path, methods=[wide, {**MOLF, "name": "other", "ranks": 16}, {**LORA, "ranks": 16}]
    )
    assert main(["study", "run", str(tmp_path / "study.yaml"), "--dry_run"]) == 0
    line = (
        "Methods differ in the scaling of LoRA factors, which alpha sets, in facts: 8 (molf); "
        "2 (other, lora)."
    )
    assert line in " ".join(capsys.readouterr().out.split())


def test_scalings_are_compared_within_cells(tmp_path):
    """The default of alpha depends on the task: 8 here, and 32 there."""
    cells = [
        {"name": "small", "task": "demo-fact", "metric": "es"},
        {"name": "large", "task": "fact", "model": "base", "metric": "es"},
    ]
    routed = {**MOLF, "ranks": 16}
    study, make = study_of(tmp_path, cells=cells, methods=[routed, {**routed, "name": "other"}])
    assert differing_scalings(study, make) == []
    study, make = study_of(tmp_path, cells=cells, methods=[routed, {**LORA, "ranks": 16}])
    assert differing_scalings(study, make) == ["large: 8 (molf); 2 (lora)"]


@pytest.mark.parametrize(
    "name",
    [
        *("demo-scores", "demo-candidates", "demo-hybrid", "demo-hybrid-scores", "demo-confirm"),
        *("smollm2-equal", "smollm2-med"),
    ],
)
def test_studies_of_scores_have_one_scaling(name):
    study, make = open_study(Path(name))
    assert differing_scalings(study, make) == []


def test_axes_over_options_of_methods_keep_controls_with_their_methods(tmp_path):
    of_fft = {"name": "of-fft", "method": "molf", "control_of": "fft"}
    study, _ = study_of(
        tmp_path, methods=[FFT, MOLF, SHUFFLED, COIN, of_fft], axes={"ranks": [2, 4]}
    )
    found = {method.name: (method.control_of, method.share_of) for method in study.methods}
    assert found["shuffled+ranks=4"] == ("molf+ranks=4", None)
    assert found["coin+ranks=2"] == ("molf+ranks=2", "molf+ranks=2")
    assert found["of-fft+ranks=2"] == ("fft", None)  # fft has no ranks, and no variants


class Failing(Pretended):
    """The method fails at its first rate; its shares rise with the number of the rate."""

    def __call__(self, planned, point, trial=None):
        is_model = planned.method.name == "molf"
        if is_model and planned.phase == "choose" and planned.index == 0:
            return Outcome(FAILED, None, point, error="diverged")
        self.full_share = planned.index / 4 if is_model else None
        return super().__call__(planned, point, trial)


def test_a_control_has_as_many_rate_trials_where_its_method_failed(tmp_path):
    study, make = study_of(tmp_path, methods=[MOLF, COIN])
    runner = Failing(study)
    work(study, make, runner)
    assert sum("/coin/choose-" in label for label in runner.ran) == 3
    plan = Plan(study, Ledger(study).read().outcomes, make, {})
    scores = {t.index: t.settings.score for t in plan.trials if t.method.name == "coin"}
    assert scores == {0: "random:0.375", 1: "random:0.250", 2: "random:0.500"}


def test_controls_of_a_sampler_have_the_drawn_points_of_their_method(tmp_path):
    method = {**MOLF, "rates": {"learning_rate": {"low": 1e-4, "high": 1e-2}}}
    study, make = study_of(
        tmp_path,
        methods=[SHUFFLED, method],
        choose={"sampler": "tpe", "trials": 3, "seeds": [1, 2]},
    )
    runner = Apart(study)
    work(study, make, runner)
    results = [result.row for result in all_results(study).values()]
    points = {(row["method"], row["point"]): row["learning_rate"] for row in results}
    assert len({rate for (name, _), rate in points.items() if name == "molf"}) == 3
    for index in range(3):
        assert points["molf", index] == points["shuffled", index]
    assert len(results) == study.size
