"""Study files: refusals in one line, before anything is written, and the number of trials."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from checkpoints import write_checkpoint
from molf.cli import main
from molf.cli.study_options import find_study, open_study, study_names
from molf.core.scores.registry import SCORES
from molf.errors import InputError
from molf.study.checks import check_options
from question_records import gsm8k, maths, write
from study_helpers import FFT, LORA, MOLF, content, study_of, write_study


def _with(part, index=0, **changes):
    """A change of a cell or a method of the study."""
    entries = [dict(entry) for entry in content(".")[part]]
    entries[index] |= changes
    return {part: entries}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cels": []}, r"the study has no 'cels'\. It has .*\. Did you mean cells\?"),
        ({"cells": []}, "cells must be a list with at least one entry"),
        ({"methods": "fft"}, "methods must be a list"),
        (
            _with("cells", metric="forgetting_loss"),
            "cells, facts, metric: forgetting_loss is lowest without training, so it would",
        ),
        (_with("cells", metric="kl_neutral"), "kl_neutral is lowest without training"),
        (_with("cells", metric="ess"), r"cells, facts, metric: 'ess' is none of the metrics: .*es"),
        (_with("cells", task="demo-fats"), r"cell facts, method fft: .*demo-fats"),
        (_with("cells", num_epochs=3), r"cell facts, method fft: .*num_epochs"),
        (_with("cells", config="nothing"), r"config nothing: there is no such file"),
        (_with("cells", learning_rate="1e-3"), "learning_rate is given by `rates` alone"),
        (_with("cells", ranks=4), "cells, facts: ranks belongs to methods"),
        (_with("cells", seed=4), "cells, facts: seed is set by the study"),
        (_with("cells", eval_part="test"), "cells, facts: eval_part is set by the study"),
        (_with("cells", rates={"fit": {"learning_rate": 1}}), r"'fit' is none of the methods: fft"),
        (_with("cells", minimize="perhaps"), "Invalid minimize='perhaps'. Must be true or false"),
        (_with("cells", name="../out"), r"'\.\./out' is no name"),
        (_with("methods", method="ftf"), "cell facts, method fft: .*ftf"),
        (_with("methods", seed=1), "methods, fft: seed is set by the study"),
        (_with("methods", learning_rate=1), "methods, fft: learning_rate is given by `rates`"),
        (_with("methods", rates={}), "methods, fft, rates are missing"),
        (_with("methods", rates=None), "methods, fft, rates are missing"),
        (_with("methods", rates={"rate": 1}), "rates has no 'rate'"),
        (_with("methods", rates={"learning_rate": [0]}), "0 is no finite number above 0"),
        (_with("methods", rates={"learning_rate": ["1e-3", "0.001", 1]}), "a point is given twice"),
        (_with("methods", rates={"lora_lr_ratio": [3, 4, 5]}), "is a multiple of learning_rate"),
        (_with("methods", rates={"learning_rate": {"low": 1, "high": 2}}), "a grid tries a list"),
        (
            _with("methods", rates={"lora_learning_rate": [1e-3, 1e-2, 1]}),
            "cells, facts: lora_learning_rate has no effect with method=fft",
        ),
        (
            _with("methods", rates={"learning_rate": [1e-3]}),
            r"different numbers of rate trials \(fft 1, lora 3\)\. With 2 more",
        ),
        (_with("methods", share_of="lora"), "share_of takes the rates of lora too"),
        (_with("methods", control_of="lora"), "control_of takes the rates of lora too"),
        (_with("methods", max_steps=3), "methods, fft: max_steps belongs to cells. A method may"),
        (_with("methods", task="demo-med"), "methods, fft: task belongs to cells. .* top_k"),
        (_with("methods", rank=3), r"methods, fft has no 'rank'\. .* Did you mean ranks\?"),
        ({"methods": [FFT, {"name": "a", "control_of": "ftf"}]}, "control_of: 'ftf' is none of"),
        (
            {"methods": [FFT, {"name": "a", "control_of": "fft", "share_of": "fft"}]},
            "methods, a: share_of makes a control of fft. Leave control_of out",
        ),
        (
            {"methods": [FFT, {"name": "a", "share_of": "fft"}]},
            "methods, a, share_of: fft is no routed method with the expert full",
        ),
        (
            {
                "methods": [
                    FFT,
                    {"name": "a", "method": "fft", "control_of": "fft"},
                    {"name": "b", "method": "fft", "control_of": "a"},
                ]
            },
            "methods, b, control_of: a is a control of fft itself",
        ),
        (
            {
                "methods": [MOLF, {"name": "a", "method": "molf", "control_of": "molf"}],
                **_with("cells", rates={"a": {"learning_rate": [1e-3]}}),
            },
            "cells, facts, rates of a: a control has the rates of its method. Give those of molf",
        ),
        (
            {"methods": [MOLF, {"name": "a", "method": "molf", "ranks": 3, "share_of": "molf"}]},
            r"methods, a: ranks=\(3,\) differs from that of molf, None\. With share_of only the",
        ),
        (
            {"methods": [{**LORA, "rates": {"learning_rate": [1e-3], "lora_learning_rate": [1]}}]},
            "learning_rate is no rate of method=lora .lora., which trains LoRA factors alone",
        ),
        (
            {"methods": [{**MOLF, "method": "molf-e"}]},
            "learning_rate is no rate of method=molf-e .molf., which trains LoRA factors alone",
        ),
        ({"methods": [FFT, {**FFT, "name": "FFT"}]}, "the name FFT is given twice"),
        (_with("cells", metric="acc_true"), "neither high nor low values of acc_true are better"),
        (_with("cells", data="-"), "cells, facts, data: - is the standard input of one process"),
        ({"axes": {"data": ["a.jsonl", "-"]}}, r"cells, facts.data=-, data: - is the standard"),
        ({"choose": {"seeds": [11]}}, "choose.seeds and report.seeds share 11: a rate that was"),
        ({"choose": {"seeds": [1, 1]}}, "a list of different whole numbers"),
        (
            {"choose": {"sampler": "best"}},
            "Invalid choose.sampler=.best.. Must be one of grid",
        ),
        ({"choose": {"trials": 3}}, "a grid tries all its points. Leave it out"),
        ({"choose": {"sampler": "tpe"}}, "Give it with sampler=tpe"),
        ({"choose": {"sampler": "tpe", "trials": 3}}, "sampler=tpe draws from a range"),
        ({"choose": {"prune": "all"}}, "Invalid choose.prune='all'. Must be one of median, hyper"),
        ({"report": {"seeds": [2, 3, 4]}}, "report.seeds has 3 of the at least 5 seeds"),
        ({"report": {"baseline": "sft"}}, r"'sft' is none of the methods: fft, lora"),
        ({"keep": "all"}, "Invalid keep='all'. Must be one of records, models"),
        ({"heartbeat": 0}, "heartbeat: 0 is no whole number of at least 1"),
        ({"seconds": "soon"}, "seconds: 'soon' is no finite number above 0"),
        ({"axes": {"max_samples": []}}, "axes, max_samples: give a list of values"),
        ({"axes": {"seed": [1, 2]}}, "seeds with the phases"),
        ({"axes": {"max_sample": [1, 2]}}, r"cell facts\+max_sample=1, method fft: .*max_sample"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, changes, message, capsys):
    path = write_study(tmp_path, **changes)
    for command in (["run", "--dry_run"], ["status"]):
        assert main(["study", command[0], str(path), *command[1:]]) == 2
        error = capsys.readouterr().err
        assert error.startswith("molf: error: ")
        assert error.count("\n") == 1
        assert re.search(message, error), error
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping of names to values"),
        ("- 1", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("study: a\nstudy: b", "'study' is given twice"),
        ("cells: !!python/object:os.system {}", "holds a value of the kind"),
    ],
)
def test_files_that_are_no_study(tmp_path, text, message, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert main(["study", "run", str(path), "--dry_run"]) == 2
    assert message in capsys.readouterr().err
    assert main(["study", "run", str(tmp_path / "none.yaml"), "--dry_run"]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_a_grid_of_millions_is_refused_with_number_and_time(tmp_path, capsys):
    rates = [f"{i}e-6" for i in range(1, 101)]
    grid = {"learning_rate": rates, "lora_lr_ratio": rates}
    cells = [{**content(tmp_path)["cells"][0], "name": f"cell{i}"} for i in range(100)]
    path = write_study(tmp_path, methods=[{**MOLF, "rates": grid}], cells=cells, seconds=40)
    assert main(["study", "run", str(path), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert "1,000,500 trials: at about 40 s each, one worker takes 463 days" in error
    grid = {"learning_rate": [f"{i}e-6" for i in range(1, 1001)], "lora_lr_ratio": rates}
    write_study(tmp_path, methods=[{**MOLF, "rates": grid}])
    assert main(["study", "run", str(path), "--dry_run"]) == 2
    assert (
        "methods, molf, rates: 100,000 points per method, cell and seed: at about 30 s each, one "
        "worker takes 35 days. At most 10,000 are allowed."
    ) in capsys.readouterr().err
    axes = {name: list(range(1, 101)) for name in ("max_samples", "max_length", "max_steps")}
    write_study(tmp_path, axes=axes, seconds=10)
    assert main(["study", "run", str(path), "--dry_run"]) == 2
    assert (
        "axes: 1,000,000 combinations, each of one or more trials: at about 10 s each, one worker "
        "takes 116 days. At most 1,000 are allowed."
    ) in capsys.readouterr().err


def test_axes_multiply_cells_and_methods(tmp_path):
    study, _ = study_of(
        tmp_path,
        methods=[FFT, MOLF],
        axes={"ranks": [4, 16], "lr_scheduler_type": ["cosine", "linear"]},
    )
    assert [cell.name for cell in study.cells] == [
        "facts+lr_scheduler_type=cosine",
        "facts+lr_scheduler_type=linear",
    ]
    # fft has no ranks.
    assert [method.name for method in study.methods] == ["fft", "molf+ranks=4", "molf+ranks=16"]
    assert study.size == 2 * 3 * (3 + 5)


def test_a_cell_takes_a_recipe_without_its_method(tmp_path):
    cell = {"name": "facts", "config": "demo-fact-molf", "num_train_epochs": 3, "metric": "s"}
    study, _ = study_of(tmp_path, cells=[cell])
    assert dict(study.cells[0].options) == {
        "task": "demo-fact",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
    }


def test_lower_is_better_where_the_metric_says_so(tmp_path):
    cell = {"name": "facts", "task": "demo-fact"}
    falling = ("loss", "perplexity", "unparsed")
    for metric in (*falling, "s"):
        study, _ = study_of(tmp_path, cells=[{**cell, "metric": metric}])
        assert study.cells[0].minimize is (metric in falling)


@pytest.mark.parametrize("minimize", [True, False])
def test_the_direction_can_be_given(tmp_path, minimize):
    cell = {"name": "facts", "task": "demo-fact", "metric": "s", "minimize": minimize}
    study, _ = study_of(tmp_path, cells=[cell])
    assert study.cells[0].minimize is minimize


def test_rates_of_a_cell_replace_those_of_the_method(tmp_path):
    cell = {
        "name": "facts",
        "task": "demo-fact",
        "metric": "s",
        "rates": {"fft": [{"learning_rate": rate} for rate in (1e-5, 2e-5, 3e-5)]},
    }
    study, _ = study_of(tmp_path, cells=[cell])
    points = study.rates(study.cells[0], study.method("fft")).points
    assert [point["learning_rate"] for point in points] == [1e-5, 2e-5, 3e-5]


def test_directories_of_others_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    path = write_study(tmp_path)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(["study", "run", str(path), "--dry_run"]) == 2
    (tmp_path / "out" / "notes.txt").unlink()
    study, _ = study_of(tmp_path)
    from molf.study.place import check_directory, write_record

    write_record(study)
    other, _ = study_of(tmp_path, study="another")
    with pytest.raises(InputError, match="is that of the study 'tried', not of 'another'"):
        check_directory(other)


def test_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    path = write_study(tmp_path, methods=[FFT, LORA, MOLF])
    assert main(["study", "run", str(path), "--workers", "2", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "1 cell, 3 methods, 24 trials" in printed
    assert "3 rates x 1 seed per method by es on the validation part" in printed
    assert "about 6 min with 2 workers at 30 s a trial" in printed
    assert list(tmp_path.iterdir()) == [path]


def test_status_and_stop_before_the_start(tmp_path, capsys):
    path = write_study(tmp_path)
    for command in ("status", "stop", "report"):
        assert main(["study", command, str(path)]) == 2
        assert "has not started" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_in_the_docs_is_a_study(tmp_path):
    docs = Path(__file__).resolve().parents[2] / "docs" / "studies.md"
    path = tmp_path / "facts.yaml"
    path.write_text(re.findall(r"^```yaml\n(.*?)^```", docs.read_text(), re.M | re.S)[0])
    study, make = open_study(path)
    check_options(study, make)
    # The control `coin` may have two points in the second phase.
    assert study.size == 2 * (4 * (3 + 5) + 5)


@pytest.mark.parametrize("name", study_names())
def test_shipped_studies_are_valid(name):
    study, make = open_study(Path(name))
    assert study.name == name
    assert find_study(Path(name)).read_text().startswith(f"# molf study run {name}\n")
    for cell in study.cells:
        # As many for each method. A cell with rates of its own may have more.
        (count,) = {len(study.rates(cell, method).points) for method in study.methods}
        usual = 4 if name.startswith("demo") else 3
        assert count == usual or (cell.rates and count > usual)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of top_k
        check_options(replace(study, cells=(study.cells[0],)), make)


def test_shipped_studies_have_a_demo_each():
    names = [name.removeprefix("paper-") for name in study_names() if name.startswith("paper-")]
    assert len(names) >= 6
    names.remove("math")  # no demo: the embedded model does not calculate
    assert {f"demo-{name}" for name in names} <= set(study_names())


@pytest.mark.parametrize("names", [("demo-scores", "demo-candidates"), ("paper-scores",)])
def test_every_score_and_lora_of_its_rank_have_rows(names):
    methods = [one for name in names for one in open_study(Path(name))[0].methods]
    routed = [one.options for one in methods if one.options["method"] == "molf"]
    scores = {str(one.get("score", "epd")) for one in routed}
    assert {*SCORES, "shuffled:epd", "shuffled:gsnr", "share:0.2:gsnr"} - scores == {"random"}
    assert {one.share_of for one in methods} >= {"epd", "gsnr"}
    loras = {str(one.options["ranks"]) for one in methods if one.options["method"] == "lora"}
    assert {str(one["ranks"]) for one in routed} <= loras


def test_unknown_studies_name_the_shipped_ones(tmp_path, capsys):
    assert main(["study", "run", "demo-mian", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert "study demo-mian: there is no such file, and no shipped study of that name" in error
    assert "demo-main" in error


def test_data_is_checked_before_the_first_trial(tmp_path, capsys):
    cell = {
        "name": "own",
        "task": "custom",
        "data": "none.jsonl",
        "model": "base",
        "metric": "loss",
    }
    path = write_study(tmp_path, cells=[cell])
    (tmp_path / "base").mkdir()
    for command in (["run", "--dry_run"], ["work"]):
        assert main(["study", command[0], str(path), *command[1:]]) == 2
        assert "study tried, cell own, eval_part=validation: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            {"task": "demo-med", "metric": "es"},
            "task=demo-med does not measure es on this data. It measures accuracy, unparsed, "
            "accuracy_logprob, forgetting_loss, kl_neutral, kl_task.",
        ),
        (
            {"task": "fact", "metric": "s", "validation_share": 0.5},
            "task=fact does not measure s on this data. It measures es, em, ns, nm, acc_new, "
            "acc_true, forgetting_loss, kl_neutral, kl_task.",
        ),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_before_the_first_trial(
    tmp_path, capsys, cell, message
):
    if cell["task"] == "fact":  # without paraphrases
        records = [
            {
                "case_id": i,
                "requested_rewrite": {
                    "prompt": "{} is in",
                    "subject": f"Town {i}",
                    "target_new": {"str": "Rome"},
                    "target_true": {"str": "Bonn"},
                },
                "paraphrase_prompts": [],
                "neighborhood_prompts": ["Turin is in"],
            }
            for i in range(8)
        ]
        (tmp_path / "facts.json").write_text(json.dumps(records))
        write_checkpoint(tmp_path / "base")
        cell = {**cell, "data": str(tmp_path / "facts.json"), "model": str(tmp_path / "base")}
    path = write_study(tmp_path, cells=[{"name": "own", **cell}])
    for command in (["run", "--dry_run"], ["work"]):
        assert main(["study", command[0], str(path), *command[1:]]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_number_of_workers(tmp_path, capsys):
    assert main(["study", "run", str(write_study(tmp_path)), "--workers", "0"]) == 2
    assert "Invalid workers=0" in capsys.readouterr().err


def test_assignments_of_methods_are_read(tmp_path, capsys):
    file = tmp_path / "assignment.yaml"
    hybrid = {**FFT, "name": "hybrid", "method": "hybrid", "assignment": str(file)}
    path = write_study(tmp_path, methods=[FFT, hybrid])
    for text, code in ((None, 2), ("full: []", 2), ("full: [mlp]", 0)):
        if text is not None:
            file.write_text(text)
        assert main(["study", "run", str(path), "--dry_run"]) == code
        said = capsys.readouterr().err
        assert (f"study tried, method hybrid: assignment {file}" in said) == (code == 2)


def test_the_dry_run_of_paper_math_passes_on_a_small_model_and_data(tmp_path, monkeypatch, capsys):
    """All of the shipped study but its model and its data, which are on the Hub."""
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(find_study(Path("paper-math")).read_text())
    (cell,) = content["cells"]
    cell["model"] = str(write_checkpoint(tmp_path / "model", architecture="llama"))
    cell["data"] = write(tmp_path / "train.jsonl", maths(100))
    cell["eval_data"] = write(tmp_path / "test.jsonl", [gsm8k(f"{i} pens?", i) for i in range(4)])
    (tmp_path / "paper-math.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    capsys.readouterr()  # a progress bar of the model that was written
    assert main(["study", "run", "paper-math.yaml", "--dry_run"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    # 7 methods x (3 rates + 5 seeds), and 5 of the control at the rates of its method.
    assert lines[0] == "paper-math: 1 cell, 7 methods, at most 61 trials"
    assert lines[1].endswith(" 3 rates x 1 seed per method by accuracy on the validation part")
    assert lines[4].strip().startswith("at most 5 days with 1 worker at 7200 s a trial")
    # 64 / 32, and 64 / sqrt(64).
    scalings = "2 (lora); 8 (rslora-64, lora-rest, epd, gsnr, gsnr-shuffled)."
    assert lines[5:] == [
        "Methods differ in the scaling of LoRA factors, which alpha sets, in "
        f"{cell['name']}: {scalings}"
    ]
    assert not (tmp_path / "studies").exists()
