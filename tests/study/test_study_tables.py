"""The tables of a study, from rows that are made here."""

import math

import numpy as np
import pytest

from molf.measure.estimates import difference_of_questions, mean_of_questions
from molf.study.choice import choose_point
from molf.study.report.figures import draw_figures
from molf.study.report.records import total_of
from molf.study.report.sensitivity import sensitivity
from molf.study.report.summary import front_of, summarise
from molf.study.status import origin_of
from study_rows import (
    EPD,
    FFT,
    GRID,
    SHUFFLED,
    cell_of,
    choosing,
    grid,
    method,
    records,
    reported,
    text_of,
)

# -- totals -------------------------------------------------------------------------------------


def test_a_total_counts_shared_trainings_and_probes_once():
    fft = choosing("fft", FFT, [0.1, None])
    fft[0] |= {"seconds": 10.0, "started": "9:00", "training_seconds": 8.0}
    fft[1] |= {"seconds": 3.0}  # failed
    wins, drawn = choosing("wins", EPD, [0.1]), choosing("drawn", EPD, [0.1])
    wins[0] |= {"seconds": 15.0, "probe_seconds": 5.0, "started": "9:01", "training_seconds": 9.0}
    drawn[0] |= {"seconds": 16.0, "probe_seconds": 5.0, "started": "9:02", "training_seconds": 9.0}
    same = {**wins[0], "method": "same"}
    rows = [*fft, *wins, *drawn, same]
    assert total_of(rows, "seconds", "probe_seconds") == 10 + 3 + 10 + 11 + 5
    other = {**same, "started": "9:03", "seed": 2}  # has a probe of its own
    assert total_of([*rows, other], "seconds", "probe_seconds") == 39 + 15
    flops = {"training_flops": 7.0, "probe_flops": 2.0}
    slower = {**wins[0], "method": "gsnr", "started": "9:04", "probe_seconds": 6.0}
    probed = [row | flops for row in (*wins, *drawn, same, slower)]
    assert total_of(probed, "training_flops", "probe_flops") == 3 * 5 + 2 * 2


# -- the choice of a point ----------------------------------------------------------------------


def test_the_best_mean_wins_and_the_first_of_equal_means():
    nan = math.nan
    assert choose_point({2: [0.5, 0.7], 0: [0.6, 0.6], 1: [0.9, nan]}, minimize=False).index == 0
    assert choose_point({0: [0.6], 1: [0.5]}, minimize=True).value == 0.5
    assert choose_point({0: [nan], 1: []}, minimize=True) is None


def test_rows_at_other_rates_are_no_rows_of_the_chosen_point():
    """A control has rows at the rates of its method too; they were taken for its own."""
    methods = {"fft": FFT, "epd": EPD, "shuffled": SHUFFLED}
    rows = choosing("fft", FFT, [0.1, 0.5, 0.2]) + reported("fft", FFT, 1, [0.5] * 5)
    rows += choosing("epd", EPD, [0.1, 0.5, 0.2]) + reported("epd", EPD, 1, [0.6] * 5)
    rows += choosing("shuffled", SHUFFLED, [0.1, 0.4, 0.5])
    rows += reported("shuffled", SHUFFLED, 2, [0.4] * 5)
    rows += reported("shuffled", SHUFFLED, 1, [0.3] * 5)
    cell = cell_of(methods, rows)
    shuffled = cell.method("shuffled")
    assert shuffled.value.value == pytest.approx(0.4)
    assert shuffled.point == {"learning_rate": 1e-2, "lora_learning_rate": 2e-2}
    (control,) = cell.controls["epd"]
    assert control.own.estimate.value == pytest.approx(0.2)
    assert control.equal.estimate.value == pytest.approx(0.3)
    assert control.equal.other_point == control.equal.point
    # Without these rows they are missing, also where the others are whole.
    left = [r for r in rows if (r["method"], r["phase"], r["point"]) != ("shuffled", "report", 1)]
    cell = cell_of(methods, left)
    assert cell.controls["epd"][0].equal is None
    assert cell.method("shuffled").missing == ["seeds 11, 12, 13, 14, 15 at the rates of epd"]


def test_controls_are_those_that_the_study_names():
    """Not those whose score has the text of another one's."""
    by_text = method(EPD["rates"], options={"score": "shuffled:epd"})
    methods = {"fft": FFT, "epd": EPD, "other": by_text, "coin": method([], share_of="epd")}
    cell = cell_of(methods, [])
    assert [one.control_of for one in cell.methods] == [None, None, None, "epd"]


# -- controls -----------------------------------------------------------------------------------


def with_shares(share, of_control):
    harm = {"before/forgetting_loss": 1.0, "after/kl_neutral": 0.1}
    methods = {"fft": FFT, "epd": EPD, "shuffled": SHUFFLED}
    rows = choosing("epd", EPD, [0.1, 0.5, 0.2]) + choosing("shuffled", SHUFFLED, [0.1, 0.4, 0.5])
    own = {"won/full": share, "after/forgetting_loss": 1.2, **harm}
    rows += reported("epd", EPD, 1, [0.6, 0.61, 0.6, 0.6, 0.59], **own)
    for index, loss in ((1, 1.3), (2, 1.9)):
        more = {"won/full": of_control, "after/forgetting_loss": loss, **harm}
        rows += reported("shuffled", SHUFFLED, index, [0.5] * 5, **more)
    return methods, rows


def test_harm_and_shares_are_compared_at_equal_rates():
    cell = cell_of(*with_shares(0.30, 0.03))
    (control,) = cell.controls["epd"]
    assert control.own.harm["forgetting_loss"].value == pytest.approx(-0.7)
    assert control.equal.harm["forgetting_loss"].value == pytest.approx(-0.1)
    assert control.equal.harm["kl_neutral"].value == 0
    assert not control.equal.is_matched
    text = text_of(*with_shares(0.30, 0.03))
    assert "| lr 0.001, lora_lr 0.002 / lr 0.01, lora_lr 0.02 | 30.0% / 3.0%, not share" in text
    assert "| equal rates | lr 0.001, lora_lr 0.002 | 30.0% / 3.0%, not share-matched |" in text
    assert "differ by more than 2 points" in text


@pytest.mark.parametrize(("share", "matched"), [(0.12, True), (0.1, True), (0.125, False)])
def test_shares_that_differ_by_two_points_are_matched(share, matched):
    (control,) = cell_of(*with_shares(0.10, share)).controls["epd"]
    assert control.equal.is_matched is matched
    assert ("not share-matched |" in text_of(*with_shares(0.10, share))) is not matched


# -- rates --------------------------------------------------------------------------------------


def test_a_grid_of_two_rates_has_the_curve_at_the_chosen_second_rate():
    both = method(grid(learning_rate=GRID, lora_learning_rate=[1e-3, 1e-2]))
    rows = choosing("both", both, [0.1, 0.2, 0.3, 0.9, 0.5, 0.6])
    cell = cell_of({"both": both}, rows, baseline=["both"])
    found = cell.method("both")
    assert found.point == {"learning_rate": 1e-3, "lora_learning_rate": 1e-2}
    assert found.curve == {1e-4: 0.2, 1e-3: 0.9, 1e-2: 0.6}


def test_a_grid_of_a_rate_and_a_ratio_has_the_curve_at_the_chosen_ratio():
    both = method(grid(learning_rate=[1e-3, 2e-3], lora_lr_ratio=[1, 2]))
    rows = choosing("both", both, [0.1, 0.2, 0.3, 0.4])
    found = cell_of({"both": both}, rows, baseline=["both"]).method("both")
    assert found.curve == {1e-3: 0.2, 2e-3: 0.4}
    assert found.rates == "lr 0.002 (highest tried), lora_lr 0.004, ratio 2 (highest tried)"


def test_pairs_of_rates_have_the_curve_of_their_ratio():
    pairs = method([{"learning_rate": r, "lora_learning_rate": 3 * r} for r in GRID])
    found = cell_of({"pairs": pairs}, choosing("pairs", pairs, [0.1, 0.3, 0.2]), baseline=["pairs"])
    assert found.method("pairs").curve == {1e-4: 0.1, 1e-3: 0.3, 1e-2: 0.2}


def test_choices_at_the_edge_of_the_grid_are_marked():
    lora = method(grid(lora_learning_rate=GRID))
    rows = choosing("fft", FFT, [0.1, 0.5, 0.2]) + choosing("lora", lora, [0.6, 0.5, 0.2])
    cell = cell_of({"fft": FFT, "lora": lora}, rows)
    assert cell.method("fft").rates == "lr 0.001"
    assert cell.method("lora").rates == "lora_lr 0.0001 (lowest tried)"
    text = text_of({"fft": FFT, "lora": lora}, rows)
    assert "Chosen at the edge of the tried rates: lora. A better rate may lie outside." in text


def test_the_decade_is_around_the_rate_of_each_method():
    values = {1e-4: 0.2, 1e-3: 0.8, 1e-2: 0.4}
    found = sensitivity(values, 1e-3, minimize=False)
    # 0.5 at 3.2e-4, 0.8, 0.6 at 3.2e-3
    assert (found.area, found.worst, found.covered) == pytest.approx((0.675, 0.5, 1.0))
    tenfold = sensitivity({10 * rate: v for rate, v in values.items()}, 1e-2, minimize=False)
    assert tenfold.area == pytest.approx(found.area)
    at_the_edge = sensitivity(values, 1e-4, minimize=False)
    assert (at_the_edge.covered, at_the_edge.is_whole) == (pytest.approx(0.5), False)
    assert sensitivity({1e-4: 2.0, 1e-3: 4.0}, 1e-4, minimize=True).worst == pytest.approx(3.0)
    assert sensitivity({1e-4: 2.0}, 1e-4, minimize=True) is None


def test_a_decade_that_was_not_tried_is_named_with_the_range():
    lora = method(grid(lora_learning_rate=[1e-3, 1e-2]))
    text = text_of({"lora": lora}, choosing("lora", lora, [0.6, 0.5]), baseline=["lora"])
    assert "| lora | 0.001 to 0.01 | 0.575 | 0.550 | 50% |  |" in text


def test_failed_rates_have_the_worst_validation_value_and_pruned_ones_none():
    rows = choosing("fft", FFT, [None, 0.5, 0.4]) + reported("fft", FFT, 1, [0.01] * 5)
    pruned = choosing("epd", EPD, [0.3, 0.5, None])
    pruned[2]["state"] = "pruned"
    methods = {"fft": FFT, "epd": EPD}
    cell = cell_of(methods, rows + pruned)
    assert cell.method("fft").curve == {1e-4: 0.3, 1e-3: 0.5, 1e-2: 0.4}
    assert cell.method("epd").curve == {1e-4: 0.3, 1e-3: 0.5}
    assert cell.method("epd").pruned == ["lr 0.01, lora_lr 0.02"]
    assert "| 50% | lr 0.01, lora_lr 0.02 |" in text_of(methods, rows + pruned).replace(
        "all", "50%"
    )


def test_a_control_without_rates_has_those_of_its_method():
    control = method([], control_of="epd")
    rows = choosing("epd", EPD, [0.2, 0.5, 0.1]) + choosing("control", EPD, [0.1, 0.2, 0.5])
    cell = cell_of({"epd": EPD, "control": control}, rows, baseline=["epd"], control=3)
    found = cell.method("control")
    assert found.curve == {1e-4: 0.1, 1e-3: 0.2, 1e-2: 0.5}
    assert found.missing == [
        "seeds 11, 12, 13, 14, 15",
        "seeds 11, 12, 13, 14, 15 at the rates of epd",
    ]


def test_a_control_of_a_method_that_always_failed_lacks_no_rows():
    methods = {"epd": EPD, "coin": method([], share_of="epd")}
    failed = choosing("epd", EPD, [None, None, None])
    assert cell_of(methods, failed, baseline=["epd"], coin=3).method("coin").missing == []
    shared = [{**row, "won/full": 0.1} for row in choosing("epd", EPD, [0.2, 0.5, 0.1])]
    missing = cell_of(methods, shared, baseline=["epd"], coin=3).method("coin").missing
    assert missing == ["3 of 3 rate trials", "all 5 seeds"]


# -- lacking seeds ------------------------------------------------------------------------------


def failing():
    rows = choosing("fft", FFT, [0.1, 0.5, 0.2]) + reported(
        "fft", FFT, 1, [0.5, 0.5, 0.5, 0.5, 0.51]
    )
    rows += choosing("epd", EPD, [0.1, 0.5, 0.2])
    rows += reported("epd", EPD, 1, [0.9, None, 0.9, 0.9, 0.91])
    for row in rows:
        if "after/es" in row:
            row |= {"after/kl_neutral": 0.1 if row["method"] == "epd" else 0.2}
    return {"fft": FFT, "epd": EPD}, rows


def test_failed_seeds_make_a_comparison_incomplete():
    cell = cell_of(*failing())
    epd = cell.method("epd")
    assert (epd.failed_seeds, epd.missing, epd.is_complete) == ((12,), [], False)
    assert epd.comparison.estimate.differs
    assert not epd.comparison.differs
    text = text_of(*failing())
    assert "+0.400 [+0.400, +0.400] (incomplete: 4 of 5 seeds)" in text
    assert "(4 of 5 seeds, 1 failed)" in text
    assert "- facts, epd: seeds 12; 4 are complete." in text
    assert front_of(cell, "kl_neutral") == []  # it would be epd alone


def test_figures_name_lacking_seeds_and_have_one_legend(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    draw_figures(tmp_path, summarise(records(*failing())))
    rates, front = drawn
    assert [text.get_text() for text in front.legends[0].get_texts()] == [
        "fft",
        "epd (4 of 5 seeds, 1 failed)",
    ]
    for figure in (rates, front):
        assert len(figure.legends) == 1
        assert not any(axis.get_legend() for axis in figure.axes)
        figure.canvas.draw()
        legend = figure.legends[0].get_window_extent()
        assert not any(legend.overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_parameters_that_never_moved_are_named():
    rows = choosing("epd", EPD, [0.1, 0.5, 0.2])
    rows = [{**row, "trained_parameters": 3408576.0, "moved_parameters": 1500.0} for row in rows]
    text = text_of({"epd": EPD}, rows, baseline=["epd"])
    assert "epd: 3,408,576 parameters have optimizer state, and updates changed 1,500 of" in text


def test_counts_have_no_decimals():
    rows = [{**row, "cpu_count": 2.0, "torch_threads": 1.0} for row in choosing("fft", FFT, [0.1])]
    assert "CPUs: 2, torch threads: 1\n" in text_of({"fft": FFT}, rows)


# -- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_seeds", "of_questions", "is_drawn"),
    [(0.12, 0.0, True), (0.02, 0.4, True), (0.1, 0.25, True), (0.1, 0.3, False)],
    ids=["seeds", "questions", "both", "both-without-draws"],
)
def test_intervals_cover_differences_of_new_seeds_and_questions(of_seeds, of_questions, is_drawn):
    """Five seeds, forty questions: the true difference is 0, and 95% of intervals contain it."""
    rng = np.random.default_rng(5)
    shape, repeats, covered = (5, 40), 400, 0
    for _ in range(repeats):
        methods = []
        for _ in range(2):
            seeds, questions = (
                rng.normal(0, deviation, size)
                for deviation, size in ((of_seeds, (5, 1)), (of_questions, (1, 40)))
            )
            right = 0.5 + seeds + questions
            if is_drawn:  # answers, right or wrong
                right = rng.random(shape) < right
            scores = {
                seed: {str(i): (float(x), 1.0) for i, x in enumerate(row)}
                for seed, row in enumerate(right)
            }
            methods.append({"es": scores})
        found = difference_of_questions("es", *methods)
        covered += found.low <= 0 <= found.high
    assert covered / repeats >= 0.94


def test_intervals_of_one_seed_are_unknown_and_those_of_shares_end_at_one():
    one = {"es": {1: {str(i): (1.0, 1.0) for i in range(9)}}}
    assert math.isnan(mean_of_questions("es", one).low)
    right = {seed: {str(i): (float(i + seed > 0), 1.0) for i in range(4)} for seed in range(5)}
    found = mean_of_questions("es", {"es": right})
    assert (found.value, found.high) == (0.95, 1.0)
    assert found.low < 0.9


def answers(rows, *, without=()):
    """Scores of ten questions for the rows of the second phase, their share as in the row."""
    return {
        (row["method"], row["phase"], row["point"], row["seed"]): {
            "es": {str(i): (float(i < 10 * row["after/es"]), 1.0) for i in range(10)}
        }
        for row in rows
        if row["phase"] == "report" and row["seed"] not in without
    }


def test_rows_without_scores_of_questions_count():
    """The value was that of the seeds with scores, and a comparison of three seeds was complete."""
    rows = choosing("fft", FFT, [0.1, 0.5, 0.2]) + reported("fft", FFT, 1, [0.5] * 5)
    rows += choosing("epd", EPD, [0.1, 0.5, 0.2])
    rows += reported("epd", EPD, 1, [0.9, 0.9, 0.9, 0.1, 0.1])
    methods = {"fft": FFT, "epd": EPD}
    for without, units in (((), "questions and seeds"), ((14, 15), "seeds")):
        stored = records(methods, rows)
        stored.questions["facts"] = answers(rows, without=without)
        (cell,) = summarise(stored)
        found = cell.method("epd")
        assert (found.value.value, found.value.units) == (pytest.approx(0.58), units)
        estimate = found.comparison.estimate
        assert (estimate.value, estimate.units) == (pytest.approx(0.08), units)


def test_a_measure_of_harm_that_a_seed_lacks_is_missing():
    """An infinite divergence is not stored; the mean of the other seeds was shown in bold."""
    methods, rows = failing()
    for row in rows:
        row |= {"after/es": 0.5, "state": "complete"} if row["phase"] == "report" else {}
        row.setdefault("after/kl_neutral", 0.1)
    cell = cell_of(methods, rows)
    assert cell.method("epd").comparison.harm["kl_neutral"].differs
    del next(r for r in rows if (r["method"], r["seed"]) == ("epd", 13))["after/kl_neutral"]
    cell = cell_of(methods, rows)
    assert "kl_neutral" not in cell.method("epd").harm
    assert "kl_neutral" not in cell.method("epd").comparison.harm
    assert "kl_neutral" in cell.method("fft").harm


# -- the baseline -------------------------------------------------------------------------------


def test_the_baseline_is_the_best_of_the_first_phase_whatever_rows_the_second_one_has():
    """The other one was taken while the best had no rows, and methods were better than that."""
    lora = method(grid(lora_learning_rate=GRID))
    methods = {"fft": FFT, "lora": lora, "epd": EPD}
    rows = choosing("fft", FFT, [0.1, 0.3, 0.2]) + reported("fft", FFT, 1, [0.3] * 5)
    rows += choosing("epd", EPD, [0.1, 0.5, 0.2]) + reported("epd", EPD, 1, [0.5] * 5)
    options = {"baseline": ["fft", "lora"]}
    assert cell_of(methods, rows, **options).baseline is None
    rows += choosing("lora", lora, [0.1, 0.9, 0.2])
    cell = cell_of(methods, rows, **options)
    assert (cell.baseline, cell.method("epd").comparison) == ("lora", None)
    rows += reported("lora", lora, 1, [0.9] * 5)
    cell = cell_of(methods, rows, **options)
    assert cell.method("epd").comparison.outcome(minimize=False) == "worse"
    # A method whose every rate failed is no candidate.
    failed = [row for row in rows if row["method"] != "lora"]
    failed += choosing("lora", lora, [None, None, None])
    assert cell_of(methods, failed, **options).baseline == "fft"


# -- where rows come from -----------------------------------------------------------------------


def test_metrics_of_several_versions_in_a_cell_are_named():
    rows = choosing("fft", FFT, [0.1, 0.5, 0.2])
    rows[2]["metrics_version"] = 2
    assert origin_of(rows) == ""  # version 2 has the same es
    assert "Metrics of several versions" not in text_of({"fft": FFT}, rows)
    for row in rows:
        row["after/execution_accuracy"] = 0.5
    assert origin_of(rows) == (
        "rows of facts have metrics of several versions, which may differ for equal answers: "
        "version 1 (2), version 2 (1)"
    )
    assert f"## Metrics of several versions\n\n- {origin_of(rows)}\n" in text_of({"fft": FFT}, rows)
    for row in rows:
        row["metrics_version"] = 2
    assert origin_of(rows) == ""
