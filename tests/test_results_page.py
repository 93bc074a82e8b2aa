"""Pages of results hold the figures of the stored studies, and no other."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev

import pytest

import results_page as script
from molf.study.report.writing import REPORT_FILE, SUMMARY, write_report
from results import amounts, outcomes, rates, tables

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "docs" / "studies"


def test_the_pages_are_those_of_the_stored_studies():
    assert script.main(["--check"]) == 0, "run python scripts/results_page.py"


@pytest.mark.parametrize("name", sorted(path.name for path in STUDIES.iterdir()))
def test_reports_are_those_of_the_stored_rows(name, tmp_path):
    stored, made = STUDIES / name, tmp_path / name
    shutil.copytree(stored, made, ignore=shutil.ignore_patterns("*.png"))
    write_report(made, figures=False)
    assert (made / SUMMARY).read_bytes() == (stored / SUMMARY).read_bytes()
    text = (stored / REPORT_FILE).read_text()
    figures = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert sorted(figures) == sorted(path.name for path in stored.glob("*.png"))
    assert (made / REPORT_FILE).read_text() == re.sub(
        r"!\[.*?\]\(.+?\)\n\n?", "", text
    ).rstrip() + "\n"


def test_the_readme_agrees_with_the_stored_study():
    study = script.Study(script.STUDIES / "demo-scores")
    assert amounts.missing(study) == "none"
    words = ("none", "one", "two", "three", "four", "five", "six", "seven")

    def counted(outcome, text):
        found = re.search(rf"{outcome} in (\d)", text)
        return words[int(found[1]) if found else 0]

    baseline = outcomes.tally(study, "epd")
    control = ("epd", "epd-random", "equal")
    against_random = [outcomes.tally(study, "epd", "epd-random", at) for at in ("own", "equal")]
    harm = outcomes.harm_tally(study, "forgetting_loss", *control)
    assert {counted("better", text) for text in against_random} == {"none"}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"a study of {words[len(study.cells)]} tasks with tuned rates, other seeds and controls. "
        "In each task the baseline is full fine-tuning or LoRA, chosen on the validation part. "
        f"MoLF with the paper's score is worse than the baseline in {counted('worse', baseline)} "
        f"tasks and better in {counted('better', baseline)}. A control updates `full` at random "
        "with the same share of updates. In none of the tasks is the score shown to be better "
        f"than this control; in {counted('more', harm)} it forgets more, at equal rates."
    ) in readme


def test_suggested_rates_are_compared_with_those_of_the_study():
    """The column "best of the studies" of docs/rates.md."""
    study = script.Study(STUDIES / "demo-scores")
    cells = {cell.name: cell for cell in study.cells}
    text = (ROOT / "docs" / "rates.md").read_text()
    rows = re.findall(
        r"^\| demo-(?:fact|med), (\w+) \| `(\w+)` \| ([\d.e-]+) \| (.+?) \|", text, re.M
    )
    factors = []
    for method, option, suggested, best in rows:
        for rate, cell in re.findall(r"([\d.e-]+)(?: \(`(\w+)`)?", best):
            one = cells[cell or "facts"].method({"molf": "epd"}.get(method, method))
            learned = one.point.get("learning_rate")
            point = {"lora_learning_rate": (learned or 0) * one.point.get("lora_lr_ratio", 0)}
            assert float(rate) == pytest.approx((point | one.point)[option]), (method, option, cell)
            factors.append((float(rate) / float(suggested), method, cell))
    assert len(factors) == 12
    ((least, *above),) = (one for one in factors if one[0] < 1)
    assert above == ["fft", "noise"]
    assert f"{1 / least:.1f} times the best rate of `noise`" in text
    assert round(median(factor for factor, *_ in factors)) == 2
    assert round(max(factors)[0]) == 6


def test_a_mixture_does_not_tolerate_a_wrong_rate_better_than_full_fine_tuning():
    """The words of README and docs/choosing.md, against means over a decade of tried rates."""
    study = script.Study(STUDIES / "demo-scores")
    epd, gsnr = (outcomes.robust(study, score, "fft") for score in ("epd", "gsnr"))
    assert "less than a decade" not in epd + gsnr
    assert "a worse mean in 5 cells" in epd
    assert "a worse mean in 4 cells" in gsnr
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        "its mean metric over a decade of rates is below that of full fine-tuning in five tasks "
        "(one seed)." in readme
    )
    page = " ".join((ROOT / "docs" / "choosing.md").read_text().split())
    assert "In most of these cells it does not." in page


def test_less_forgetting_than_the_baseline_from_the_rows_alone():
    """EPD in `facts`, whose baseline is fft: five paired differences, Student's t of 4 degrees."""
    with (STUDIES / "demo-scores" / "trials.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["cell"] == "facts"]

    def at_chosen(method):
        chosen = [row for row in rows if row["method"] == method and row["phase"] == "choose"]
        point = max(chosen, key=lambda row: float(row["after/s"]))["point"]
        mine = [row for row in rows if row["method"] == method and row["phase"] == "report"]
        return {
            row["seed"]: float(row["after/forgetting_loss"]) - float(row["before/forgetting_loss"])
            for row in mine
            if row["point"] == point
        }

    base = at_chosen("fft")
    signs = {}
    for method in ("epd", "lora"):
        differences = [value - base[seed] for seed, value in at_chosen(method).items()]
        half = 2.776 * stdev(differences) / len(differences) ** 0.5
        assert len(differences) == 5
        assert abs(fmean(differences)) > half
        signs[method] = fmean(differences) > 0
    assert signs == {"epd": False, "lora": True}
    text = outcomes.less_harm(script.Study(STUDIES / "demo-scores"), "forgetting_loss")
    assert "- facts: `epd`." in text.splitlines()
    assert "- facts-narrow: none." in text.splitlines()  # EPD forgets less there, and is worse


def test_the_readme_agrees_with_the_study_of_assignments():
    study = script.Study(script.STUDIES / "demo-hybrid")
    assert amounts.missing(study) == "none"
    assert len(study.cells) == 7
    verdict = outcomes.assigned_verdict(study)
    assert re.search(r"in 0 of \d+ comparisons .* and in 0 of \d+ comparisons", verdict)
    half = outcomes.tally(study, "hybrid-epd-50")
    assert "worse" not in half
    assert "incomplete" not in half
    assert "worse in 1 cell" in outcomes.tally(study, "hybrid-epd-50-random")
    harm = outcomes.harm_tally(study, "forgetting_loss", "hybrid-epd-50")
    assert "less in 3 cells" in harm
    assert "more" not in harm
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        "Hybrid with half of the layers in full, by EPD, in seven tasks of a "
        "[study](docs/results.md#full-here-lora-there) "
        f"({amounts.full_range(study, 'hybrid-epd-50')} of the layers' weights), compared with "
        "full fine-tuning or LoRA, whichever the validation part prefers: "
        "- It is shown to be worse in none. It forgets less in three tasks, and more in none. A "
        "[second study](docs/results.md#half-of-the-layers-with-new-seeds) with new seeds had this "
        "as its claim: again it is shown to be worse in none, and forgets less in the same three "
        "and one more. "
        "- Full fine-tuning at two thirds of its rate or less, in the second study, forgets less "
        "in six tasks, and is shown to be worse in one. Compared with it, the half by EPD is shown "
        "to be better in one task; it forgets more in four and less in one. "
        "- At a third of its rate or less, full fine-tuning forgets less in the same six, and is "
        "shown to be worse in three. "
        "- A random half is shown to be worse in one; in the second study, in another one. In the "
        "first study no assignment by EPD or GSNR is shown to be better than a random one with as "
        "many weights in full; in the second, the half by EPD in one task, at equal rates. "
        "- A tenth of the layers [by the score "
        "`descent`](docs/results.md#a-tenth-of-the-layers-by-each-score) (16% of the weights, "
        "nearly always `down_proj` of the MLP) is shown to be worse in none; it forgets less in "
        "four and more in one. Random layers with as many weights are shown to be worse in three, "
        "and in two of these worse than those by `descent`. It is the best of seven scores. By EPD "
        "a tenth "
        f"({amounts.full_range(study, 'hybrid-epd-10')} of the weights) is shown to be worse in "
        "three. "
        "- With new seeds the tenth by `descent` is again shown to be worse in none, and forgets "
        "less in four and more in one. It is not shown to differ from random layers then; these "
        "are worse in one. It forgets more than full fine-tuning at two thirds of its rate or less "
        "in five tasks and less in one, and is not shown to be better."
    ) in readme
    assert "worse in 3 cells" in outcomes.tally(study, "hybrid-epd-10")
    assert (
        "worse in none, and forgets less in three; with new seeds, in four. A tenth of the layers, "
        "by the score `descent`, is shown to be worse in none, and forgets less in four and more "
        "in one; with new seeds, again in four and in one."
    ) in readme
    tenths = script.Study(script.STUDIES / "demo-hybrid-scores")
    assert amounts.missing(tenths) == "none"
    assert len(tenths.cells) == 7
    assert amounts.full_range(tenths, "hybrid-descent-10") == "16%"
    assert outcomes.tally(tenths, "hybrid-descent-10").startswith("no difference shown in 7 cells")
    harm = outcomes.harm_tally(tenths, "forgetting_loss", "hybrid-descent-10")
    assert harm.startswith("less in 4 cells")
    assert "more in 1 cell" in harm
    drawn = "hybrid-descent-10-random"
    assert "worse in 3 cells (facts, forms, facts-narrow)" in outcomes.tally(tenths, drawn)
    for at in ("own", "equal"):
        found = outcomes.tally(tenths, "hybrid-descent-10", drawn, at)
        assert found.startswith("better in 2 cells (facts, facts-narrow)")
        assert "worse" not in found
    by_scores = [name for name in tenths.own if name.startswith("hybrid-")]
    assert len(by_scores) == 7
    worse = [name for name in by_scores if "worse" in outcomes.tally(tenths, name)]
    assert sorted({*by_scores} - {*worse}) == ["hybrid-descent-10"]
    pretrained = script.Study(script.STUDIES / "smollm2-scores")
    (baseline,) = (cell.baseline for cell in pretrained.cells if cell.name == "real-fact")
    assert baseline == "lora-rest"

    def says(word, text):
        return re.search(rf"{word} in \d cells? \(real-fact", text)

    assert says("better", outcomes.tally(pretrained, "hybrid-epd-50"))
    assert says("more", outcomes.harm_tally(pretrained, "forgetting_loss", "hybrid-epd-50"))
    for at in ("own", "equal"):
        found = outcomes.tally(pretrained, "hybrid-epd-50", "hybrid-epd-50-random", at)
        assert says("no difference shown", found)
    assert (
        "With [MoLF's alpha](docs/results.md#a-pretrained-model), 32, at rank 16 (scaling 8), the "
        "validation part prefers LoRA with the rest trained. There the half by EPD is shown to be "
        "better, and forgets more; a random half is not shown to differ from it."
    ) in readme


def test_the_claims_of_demo_confirm_hold_where_the_pages_say_so():
    study = script.Study(script.STUDIES / "demo-confirm")
    assert amounts.missing(study) == "none"
    assert len(study.cells) == 7
    seeds = {row["seed"] for row in study.rows if row["phase"] == "report"}
    assert seeds == {21, 22, 23, 24, 25}

    def cells(word, text):
        found = re.search(rf"{word} in \d+ cells? \((.*?)\)", text)
        return set(found[1].split(", ")) if found else set()

    def worse(method):
        return cells("worse", outcomes.tally(study, method))

    def less(method):
        return cells("less", outcomes.harm_tally(study, "forgetting_loss", method))

    assert worse("hybrid-epd-50") == set()
    assert less("hybrid-epd-50") == {"facts", "forms", "repeated", "facts-narrow"}
    assert "more" not in outcomes.harm_tally(study, "forgetting_loss", "hybrid-epd-50")
    pair = ("hybrid-epd-50", "hybrid-epd-50-random")
    assert not re.search("better|worse", outcomes.tally(study, *pair, "own"))
    assert cells("better", outcomes.tally(study, *pair, "equal")) == {"few"}
    assert worse("hybrid-epd-50-random") == {"forms"}
    assert worse("epd") == {"forms"}
    assert less("epd") == {"facts", "facts-narrow", "forms", "repeated"}
    assert (len(less("fft-low")), len(worse("fft-low"))) == (6, 3)
    assert less("fft-lower") == less("fft-low")
    assert worse("fft-lower") == {"forms"}
    for cell in study.cells:  # "at two thirds of its rate or less"
        low, lower, rate = (
            cell.method(name).point["learning_rate"] for name in ("fft-low", "fft-lower", "fft")
        )
        assert low <= rate / 3 * 1.001
        assert lower <= rate * 2 / 3 * 1.01
    against = ("hybrid-epd-50", "fft-lower", "own")
    harm = outcomes.harm_tally(study, "forgetting_loss", *against)
    assert len(cells("better", outcomes.tally(study, *against))) == 1
    assert not cells("worse", outcomes.tally(study, *against))
    assert len(cells("more", harm)) == 4
    assert cells("less", harm) == {"forms"}
    assert "forms" in cells("no difference shown", outcomes.tally(study, against[0], "fft", "own"))
    tenth, drawn = "hybrid-descent-10", "hybrid-descent-10-random"
    assert worse(tenth) == set()
    assert less(tenth) == {"facts", "facts-narrow", "forms", "once"}
    assert cells("more", outcomes.harm_tally(study, "forgetting_loss", tenth)) == {"repeated"}
    assert worse(drawn) == {"forms"}
    for at in ("own", "equal"):
        assert len(cells("no difference shown", outcomes.tally(study, tenth, drawn, at))) == 7
    assert not re.search("better|worse", outcomes.tally(study, tenth, "fft-lower", "own"))
    harm = outcomes.harm_tally(study, "forgetting_loss", tenth, "fft-lower", "own")
    assert (len(cells("more", harm)), len(cells("less", harm))) == (5, 1)


def test_the_pages_agree_with_the_rows_without_a_probe():
    """All `down_proj` in full: README, advise.md, results.md."""
    study = script.Study(script.STUDIES / "demo-confirm")
    down, drawn = "hybrid-down", "hybrid-down-random"
    assert outcomes.tally(study, down).startswith("worse in 1 cell (forms), no difference")
    assert outcomes.tally(study, down, "fft", "own").startswith("worse in 1 cell (forms), no")
    assert "worse" not in outcomes.tally(study, "hybrid-descent-10", "fft", "own")
    assert outcomes.tally(study, drawn).startswith("no difference shown in 7 cells")
    harm = outcomes.harm_tally(study, "forgetting_loss", down)
    assert harm.startswith(
        "less in 3 cells (facts-narrow, facts, forms), more in 1 cell (repeated)"
    )
    for at in ("own", "equal"):
        alike = outcomes.tally(study, down, drawn, at)
        assert alike.startswith("no difference shown in 7 cells")
    alike = outcomes.tally(study, down, "hybrid-descent-10", "own")
    assert alike.startswith("no difference shown in 7 cells")
    weights = {row["full_weights"] for row in study.rows if row["method"] in (down, drawn)}
    assert {f"{share:.0%}" for share in weights} == {"24%"}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        "- All `down_proj` in full, without a probe (24% of the weights, new seeds), are shown to "
        "be worse in one; they forget less in three and more in one. They are not shown to differ "
        "from the tenth by `descent`, or from random layers with as many weights."
    ) in readme


def test_the_readme_agrees_with_the_pretrained_model():
    study = script.Study(script.STUDIES / "smollm2-equal")
    assert amounts.missing(study) == "none"
    (cell,) = study.cells
    assert cell.baseline == "fft"
    controls = ("epd-equal-random", "epd-equal-shuffled")
    less = dict.fromkeys(("epd-equal", *controls, "fft-lower", "fft-low"), "less")
    hybrids = ("epd-50", "epd-50-random", "epd-10", "descent-10")
    more = dict.fromkeys((f"hybrid-{name}" for name in hybrids), "more")
    for name, word in (less | more).items():
        assert outcomes.tally(study, name) == "no difference shown in 1 cell (real-fact)"
        found = outcomes.harm_tally(study, "forgetting_loss", name)
        assert found == f"{word} in 1 cell (real-fact)"
    assert outcomes.tally(study, "hybrid-down") == "worse in 1 cell (real-fact)"
    alike = outcomes.tally(study, "hybrid-descent-10", "hybrid-descent-10-random", "own")
    assert alike == "no difference shown in 1 cell (real-fact)"
    found = outcomes.harm_tally(study, "forgetting_loss", "hybrid-down")
    assert found == "more in 1 cell (real-fact)"
    molf, lower = cell.method("epd-equal"), cell.method("fft-lower")
    against = cell.compare(molf, lower)
    assert against.is_complete
    assert not against.differs
    assert not against.harm["forgetting_loss"].differs
    highest = cell.method("fft").point["learning_rate"]
    assert lower.point["learning_rate"] / highest == pytest.approx(2 / 3)
    assert cell.method("fft-low").point["learning_rate"] / highest == pytest.approx(1 / 3)
    little, much = (cell.method(name).harm["forgetting_loss"] for name in ("fft-low", "fft"))
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        "On a pretrained model of 135 million parameters, in one task, with [LoRA's "
        "scaling](docs/results.md#with-the-scaling-of-lora) in every method, the validation part "
        "prefers full fine-tuning. Compared with it, none of these is shown to differ in the "
        "metric: - MoLF by EPD, at equal rates, forgets less. So does `full` at random with the "
        "same share of updates, and `full` in as many layers that are drawn at each step. "
        "- Full fine-tuning at two thirds of its rate forgets less too, and is not shown to differ "
        f"from MoLF. At a third of its rate it forgets {little.value:.2f} nats per token instead "
        f"of {much.value:.2f}. - Hybrid with half of the layers in full, by EPD or at random, "
        "forgets more. So does hybrid with a tenth, by EPD or by `descent`. All "
        "`down_proj` in full, without a probe, are shown to be worse there, and forget more."
    ) in readme
    # Words of docs/results.md.
    found = [row for row in study.rows if row["method"] in ("hybrid-epd", "hybrid-shape")]
    assert len(found) == 2 * (3 + 5)
    assert {row["full_weights"] for row in found} == {0.0}
    layers = {
        name: {row["full_layers"] for row in study.rows if row["method"] == name}
        for name in ("hybrid-descent-10", "hybrid-down")
    }
    assert layers == {"hybrid-descent-10": {21}, "hybrid-down": {30}}


def test_each_method_has_a_row_in_the_tables_of_few_cells():
    study = script.Study(script.STUDIES / "smollm2-scores")
    parts = tables.methods(study).split("\n\n`")
    assert len(parts) == len(study.cells)
    for part, cell in zip(parts, study.cells, strict=True):
        rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line[:1] == "|"][2:]
        assert [row[0] for row in rows] == [one.name for one in cell.methods]
        for row, one in zip(rows, cell.methods, strict=True):
            assert row[1] == one.rates
            assert row[3].strip() == ("" if one.full_share is None else f"{one.full_share:.0%}")
            assert row[4].startswith(f"{one.harm['forgetting_loss'].value:.3f} [")
            signed = row[2].strip("*").startswith(("+", "-"))
            assert signed is (one.name != cell.baseline)


def test_the_templates_have_no_measured_figure():
    templates = sorted(script.DOCS.glob("*.template.md"))
    assert templates
    for path in templates:
        text = re.sub(r"{{.+?}}", "", path.read_text())
        assert not re.findall(r"\d\.\d|\d%", text.replace("95%", ""))


def test_a_changed_figure_is_found(monkeypatch):
    (path, text), *_ = script.pages().items()
    monkeypatch.setattr(script, "pages", lambda: {path: text.replace("0.", "1.", 1)})
    assert script.main(["--check"]) == 1


def test_studies_that_come_later_fill_the_page(tmp_path):
    """Until then their places have no rows."""
    template = (script.DOCS / "choosing.template.md").read_text()
    stored = script.STUDIES / "demo-scores"
    assert "`molf-e`: no rows yet." in script.page(template, tmp_path)
    for name in ("demo-scores", "demo-candidates"):
        shutil.copytree(stored, tmp_path / name, ignore=shutil.ignore_patterns("*.png"))
    for name in ("demo-family", "smollm2-scores"):
        own = script.STUDIES / name
        shutil.copytree(own, tmp_path / name, ignore=shutil.ignore_patterns("*.png"))
    text = script.page(template, tmp_path)
    assert re.search(r"^- `adalora`: better in 1 cell \(facts\)", text, re.M)
    assert text.count("The validation part prefers `fft`") == 2
    assert text.count("The validation part prefers `lora-rest`") == 1


def test_rows_of_assignments_fill_their_section(tmp_path):
    """A study whose hybrid rows are those of MoLF and its coin."""
    template = (script.DOCS / "results.template.md").read_text()
    stored, folder = script.STUDIES / "demo-scores", tmp_path / "demo-hybrid"
    shutil.copytree(stored, folder, ignore=shutil.ignore_patterns("*.png"))
    outline = json.loads((folder / "study.json").read_text())
    rule = {"of": "gsnr", "by": "wins", "share": None, "random": False, "steps": 20}
    outline["methods"]["epd"]["assignment"] = rule
    random = outline["methods"]["epd-random"]
    random |= {"assignment": {**rule, "random": True}, "control_of": "epd", "share_of": None}
    (folder / "study.json").write_text(json.dumps(outline))
    with (folder / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = {"assignment": "mixed", "full_layers": 12, "full_weights": 0.25, "assignment_key": "1e5"}
    with (folder / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *own], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            row | (own if row["method"] in ("epd", "epd-random") else {}) for row in rows
        )
    for name in ("demo-scores", "demo-family"):
        shutil.copytree(stored, tmp_path / name, ignore=shutil.ignore_patterns("*.png"))
    text = script.page(template, tmp_path).partition("## Full here, LoRA there")[2]
    pair = [
        outcomes.tally(script.Study(stored), "epd", "epd-random", at) for at in ("own", "equal")
    ]
    counts = "in 0 of 7 comparisons (worse in 0) at the rates chosen for each"
    assert f"beat random at the same share of weights in full {counts}" in text
    own, equal = pair
    line = (
        f"- epd against epd-random, at the rates chosen for each: {own}. At equal rates: {equal}."
    )
    assert line in text
    assert "- Curve over the share by gsnr (lora-rest, epd, fft)." in text
    assert text.count("| random like wins of gsnr | 25.0% | 12.0 |") == 7


def test_outcomes_are_counted_in_plain_words():
    study = script.Study(script.STUDIES / "demo-scores")
    cells = {cell.name: cell for cell in study.cells}
    found = outcomes.tally(study, "fft")
    assert re.match(r"the baseline itself in \d cells \(facts, ", found)
    one = cells["facts"].method("gsnr")
    assert one.comparison.differs
    assert "facts" in re.search(r"worse in \d cells? \((.+?)\)", outcomes.tally(study, "gsnr"))[1]
    one.comparison = replace(one.comparison, seeds=4)
    assert "incomplete in 1 cell (facts)" in outcomes.tally(study, "gsnr")
    (shuffled,) = (c for c in cells["facts"].controls["epd"] if c.name == "epd-shuffled")
    assert not shuffled.own.is_matched
    remark = outcomes.tally(study, "epd", "epd-shuffled", "own").partition("; ")[2]
    assert re.match(r"not share-matched in \d cells? \(facts", remark)


def test_trials_of_two_studies_are_the_same_trainings():
    study = script.Study(script.STUDIES / "demo-hybrid")
    common = ("fft", "lora", "lora-rest", "epd", "gsnr")  # with four rates and five seeds
    # In `noise` the other study tries lower rates too, and chooses one of them for fft.
    whole = len(common) * len(study.cells) * (4 + 5)
    assert amounts.shared(study, "demo-scores") == str(whole - 5)
    assert amounts.shared(study, "none") == "0"


def test_differences_between_methods_are_not_those_of_controls():
    study = script.Study(script.STUDIES / "demo-scores")
    count = len(study.cells) * (len(study.own) - 1)
    assert f"(median over {count})" in rates.spread(study)
    assert "epd-random" not in study.own


def test_a_method_against_another_one_from_the_rows_alone():
    """`gsnr` minus `lora-rest` in `once`: five paired changes of forgetting."""
    study = script.Study(script.STUDIES / "demo-scores")
    rows = tables.against(study, "lora-rest", "gsnr").splitlines()
    (line,) = (row for row in rows if row.startswith("| once | gsnr |"))
    (cell,) = (cell for cell in study.cells if cell.name == "once")

    def changes(name):
        point = cell.method(name).point
        return {
            row["seed"]: row["after/forgetting_loss"] - row["before/forgetting_loss"]
            for row in study.rows
            if (row["cell"], row["method"], row["phase"]) == ("once", name, "report")
            and all(row[rate] == value for rate, value in point.items())
        }

    mine, theirs = changes("gsnr"), changes("lora-rest")
    assert len(mine) == len(theirs) == 5
    expected = fmean(mine[seed] - theirs[seed] for seed in mine)
    assert rows[0].split(" | ")[4] == "forgetting (change)"
    assert line.split(" | ")[4].strip("*").startswith(f"{expected:+.3f} [")
    assert tables.against(script.Study(script.STUDIES / "none"), "fft", "epd") == "no rows yet"
    with pytest.raises(KeyError, match="epdd"):
        tables.against(study, "fft", "epdd")


def test_methods_are_counted_against_any_other_one():
    study = script.Study(script.STUDIES / "demo-scores")
    shown = {"better": [], "worse": []}
    for line in tables.against(study, "fft", "lora").splitlines()[2:]:
        cell, _, difference = line.strip("| ").split(" | ")[:3]
        if difference.startswith("**"):
            shown["worse" if "-" in difference.split()[0] else "better"].append(cell)
    assert shown["worse"]
    text = outcomes.tally(study, "lora", "fft", "own")
    for word, cells in shown.items():
        found = re.search(rf"{word} in \d cells? \((.+?)\)", text)
        assert (found[1].split(", ") if found else []) == cells
    assert "share-matched" not in text  # no control
    assert f"`fft` in {len(shown['worse'])} cells" in outcomes.better_than(study, "lora")
    for wrong in (("lora", "epdd", "own"), ("lora", "fft", "equal")):
        with pytest.raises(KeyError, match=wrong[1]):
            outcomes.tally(study, *wrong)


def test_the_readme_agrees_with_the_study_of_molf_e():
    study = script.Study(script.STUDIES / "demo-molf-e")
    assert amounts.missing(study) == "none"
    assert len(study.cells) == 7
    assert {cell.baseline for cell in study.cells} == {"lora"}
    found = outcomes.tally(study, "molf-e")
    assert "better" not in found
    assert "worse in 2 cells" in found
    harm = outcomes.harm_tally(study, "forgetting_loss", "molf-e")
    assert "more in 3 cells" in harm
    assert "less in 1 cell" in harm
    assert (
        "In a [study of seven tasks](docs/results.md#adapters-alone), `molf-e` with ranks 4 and 16 "
        "and one alpha is shown to be better than one LoRA of rank 20 in none, and worse in two. "
        "It forgets more in three and less in one."
    ) in " ".join((ROOT / "README.md").read_text().split())


def test_rules_that_are_left_out_do_not_pay():
    """As docs/scores.md says."""
    study = script.Study(script.STUDIES / "demo-mixtures")
    assert amounts.missing(study) == "none"
    against = ("soft-epd", "fft-lower", "own")
    assert "more in 3 cells" in outcomes.harm_tally(study, "forgetting_loss", *against)
    assert "better" not in outcomes.tally(study, *against)
    assert {cell.baseline for cell in study.cells} == {"fft"}
    assert "worse in 2 cells" in outcomes.tally(study, "keep-gsnr")


def test_no_method_is_better_than_full_fine_tuning_in_any_study():
    """As README and docs/cells.md say."""
    studies = [script.Study(path) for path in script.STUDIES.iterdir()]
    studies = [study for study in studies if "fft" in study.own]
    assert len(studies) >= 7
    expected = "no method is shown to be better than `fft` in any cell"
    assert {outcomes.better_than(study, "fft") for study in studies} == {expected}


def test_a_study_without_a_folder_has_no_rows():
    for word in ("advice", "decided", "missing", "chosen", "controls", "spread"):
        assert script.page(f"{{{{{word} none}}}}").lower().strip(".").endswith("no rows yet")


def test_a_study_without_rows_shows_no_better_method():
    assert outcomes.better_than(script.Study(script.STUDIES / "none"), "fft") == "no rows yet"


def test_unknown_words_of_the_template():
    study = next(path.name for path in script.STUDIES.iterdir())
    with pytest.raises(KeyError, match="sum"):
        script.page(f"{{{{sum {study}}}}}")
    with pytest.raises(KeyError, match="epdd"):
        script.page(f"{{{{tally {study} epdd}}}}")
