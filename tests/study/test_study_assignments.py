"""Rows of method hybrid: their rules, the assignments of their trials, and what these cost."""

import json
import logging
import re
import sys
from dataclasses import replace

import pytest
import torch

from checkpoints import write_checkpoint
from molf.cli import main
from molf.core.assignment.assignment import Assignment
from molf.job.model.loading import load_skeleton
from molf.job.record.assignment_source import read_assignment
from molf.study.assigning.making import without_probe
from molf.study.assigning.rule import Rule
from molf.study.outcome import all_results, run_directory
from molf.study.plan import Plan
from molf.study.trial import TrialRunner
from study_helpers import FFT, MOLF, study_of, write_study

torch.set_num_threads(1)
HYBRID = {"method": "hybrid", "lora_dropout": 0, "rates": MOLF["rates"]}


def hybrid(name="hybrid", **rule):
    return {**HYBRID, "name": name, "assignment": {"of": "molf", **rule}}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (hybrid(off="molf"), r"assignment has no 'off'\. It has of, by, .* Did you mean of\?"),
        (hybrid(of=None), "methods, hybrid, assignment: of is missing. Give the name of a method"),
        (hybrid(of="mlof"), r"of: 'mlof' is none of the methods: fft, molf, .*mean molf\?"),
        (hybrid(of="fft"), "of: fft is no routed method with the expert full"),
        (hybrid(of="coin"), "of: the score of coin follows from the share of molf. Give a method"),
        (hybrid(by="share"), "Invalid by='share'. Must be one of wins, score, shape"),
        (hybrid(share=1.5), "Invalid share=1.5. Must be above 0 and below 1"),
        (hybrid(share=0.1, by="score"), "share=0.1 with by=score: a share goes by the score"),
        (hybrid(share=0.1, by="shape"), "share has no effect with by=shape. Leave it out"),
        (hybrid(steps=9, by="shape"), "steps has no effect with by=shape. Leave it out"),
        (hybrid(full=["k_proj"], by="wins"), "by has no effect with full. Leave it out"),
        (hybrid(full=["k_proj"], share=0.1), "share has no effect with full. Leave it out"),
        (hybrid(full=["k_proj"], steps=9), "steps has no effect with full. Leave it out"),
        (hybrid(full=[]), r"assignment, full: Invalid full=\[\]\. Must be one or more patterns"),
        (hybrid(full=["k_proj."]), "assignment, full: Invalid pattern 'k_proj.'"),
        (hybrid(steps=1), "steps: 1 is no whole number of at least 2"),
        (hybrid(random="perhaps"), "Invalid random='perhaps'. Must be true or false"),
        ({**hybrid(), "method": "lora"}, "assignment is for method=hybrid. Give that method"),
        (
            {**hybrid(), "rates": {"learning_rate": [1, 2, 3]}},
            "a trial of hybrid needs learning_rate, and lora_learning_rate or lora_lr_ratio",
        ),
    ],
)
def test_wrong_rules_are_refused_in_one_line(tmp_path, capsys, method, message):
    coin = {"name": "coin", "method": "molf", "share_of": "molf"}
    path = write_study(tmp_path, methods=[FFT, MOLF, coin, method])
    assert main(["study", "run", str(path), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == [path]


def test_a_rule_belongs_to_the_identity_of_a_trial_with_the_options_of_its_probe(tmp_path):
    def key(rule, **molf):
        study, make = study_of(tmp_path, methods=[{**MOLF, **molf}, hybrid(**rule)])
        return Plan(study, {}, make, {}).trials[-1].key

    keys = {
        key({}),
        key({"steps": 29}),
        key({"by": "score"}),
        key({"random": True}),
        key({}, ranks=4),
        key({}, score="gsnr"),
        key({"full": ["k_proj"]}),
        key({"full": ["v_proj"]}),
    }
    assert len(keys) == 8
    assert key({"steps": 30}) in keys  # the default
    assert key({"random": False}) in keys


def test_variants_of_axes_follow_those_of_their_method(tmp_path):
    study, _ = study_of(tmp_path, methods=[MOLF, hybrid()], axes={"weight_decay": [0, 0.1]})
    assert {m.name for m in study.methods} == {"molf", "hybrid"}  # it belongs to cells
    study, _ = study_of(tmp_path, methods=[MOLF, hybrid()], axes={"freeze_rest": ["false", "true"]})
    found = {m.name: m.rule.of for m in study.methods if m.rule}
    assert found["hybrid+freeze_rest=true"] == "molf+freeze_rest=true"


def sums_cell(folder, model, name="sums"):
    """A cell of 20 records for training and 6 for the test."""
    lines = [
        json.dumps({"prompt": f"{i} and {i + 1} make", "completion": f" {2 * i + 1}"})
        for i in range(26)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines[:20]) + "\n")
    (folder / "test.jsonl").write_text("\n".join(lines[20:]) + "\n")
    return {
        "name": name,
        "task": "custom",
        "model": str(model),
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "test.jsonl"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "metric": "loss",
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Rows by wins, by shape, by a share, and drawn, on a tiny model."""
    folder = tmp_path_factory.mktemp("assigned")
    cell = sums_cell(folder, write_checkpoint(folder / "base"))
    molf = {**MOLF, "ranks": 2, "rates": {"learning_rate": [1e-2], "lora_lr_ratio": [2]}}
    rules = {
        "wins": {"steps": 3},
        "half": {"steps": 3, "share": 0.5},
        "drawn": {"steps": 3, "share": 0.5, "random": True},
        "again": {"steps": 3, "by": "score", "share": None},
        "shape": {"by": "shape"},
        "named": {"full": ["k_proj", "v_proj"]},
        "other": {"full": ["k_proj", "v_proj"], "random": True},
    }
    methods = [molf, *({**hybrid(n, **r), "rates": molf["rates"]} for n, r in rules.items())]
    return study_of(folder, cells=[cell], methods=methods)


@pytest.fixture(scope="module")
def rows(study):
    """The first trial of each row, run in the order of the file."""
    opened, make = study
    trials = {t.method.name: t for t in Plan(opened, {}, make, {}).trials if t.phase == "choose"}
    runner = TrialRunner(opened, None)
    outcomes = {n: runner(t, t.point) for n, t in trials.items() if n != "molf"}
    assert {outcome.error for outcome in outcomes.values()} == {""}
    found = {result.row["method"]: result.row for result in all_results(opened).values()}
    return {name: {**row, "reused": outcomes[name].is_reused} for name, row in found.items()}


def test_each_trial_trains_by_the_assignment_of_its_rule(study, rows):
    opened, _ = study
    assert rows["half"]["full_layers"] == rows["half"]["lora_layers"]
    assert rows["drawn"]["full_weights"] == rows["half"]["full_weights"]
    sources = {
        "half": "full in the 50% of layers where it leads most, 2 steps of ",
        "drawn": "random like full in the 50% of layers where it leads most",
        "shape": "by shape, lora_lr 2 times lr",
        "named": "patterns",
        "other": "random like patterns",
    }
    for name, row in rows.items():
        if row["reused"]:
            continue
        run = run_directory(opened, "sums", name, "choose-lr0.01-ratio2-seed1")
        given = read_assignment(run.with_name(f"{run.name}-assignment.yaml"))
        used = read_assignment(run / "assignment.yaml")
        assert [(e.name, e.train, e.r) for e in used.entries] == [
            (e.name, e.train, e.r) for e in given.entries
        ]
        assert used.source.startswith(sources.get(name, used.source))
        assert len(used.full) == row["full_layers"]
        kinds = {entry.train for entry in used.entries}
        assert row["assignment"] == ("mixed" if len(kinds) > 1 else f"all {kinds.pop()}")
        assert {entry.r for entry in used.lora} <= {2}


def test_patterns_name_the_layers_in_full_and_the_others_get_the_experts_rank(study, rows):
    opened, _ = study
    run = run_directory(opened, "sums", "named", "choose-lr0.01-ratio2-seed1")
    used = read_assignment(run / "assignment.yaml")
    assert {entry.name.rpartition(".")[2] for entry in used.full} == {"k_proj", "v_proj"}
    assert not used.frozen
    assert used.use_rslora
    assert {(entry.r, entry.alpha) for entry in used.lora} == {(2, 32)}  # of method molf
    assert rows["other"]["full_weights"] == rows["named"]["full_weights"]
    assert rows["other"]["assignment_key"] != rows["named"]["assignment_key"]


def test_a_rank_above_a_layers_side_is_fitted_as_in_an_assignment_by_shape(tmp_path):
    cell = sums_cell(tmp_path, write_checkpoint(tmp_path / "base"))
    methods = [{**MOLF, "ranks": 20}, hybrid(full=["down_proj"]), hybrid(by="shape")]
    methods[2]["name"] = "shape"
    study, make = study_of(tmp_path, cells=[cell], methods=methods)
    rates = {"learning_rate": 1e-4, "lora_learning_rate": 1.0}  # LoRA in every layer by shape
    settings = replace(make.options(study.cells[0], study.methods[0]), **rates)
    named, shaped = (without_probe(method.rule, settings) for method in study.methods[1:])
    assert len({layer.r for layer in shaped.lora}) > 1
    assert {layer.name.rpartition(".")[2] for layer in named.full} == {"down_proj"}
    others = {name: layer for name, layer in shaped.layers.items() if "down_proj" not in name}
    assert {layer.name: layer for layer in named.lora} == others
    assert named.use_rslora is shaped.use_rslora is True


def test_a_rule_is_recorded_and_read_again():
    patterns = Rule("epd", full=("k_proj", "v_proj"), random=True)
    for rule in (Rule("epd", share=0.5), patterns):
        assert Rule.from_values(json.loads(json.dumps(rule.as_values()))) == rule
    # Identities of earlier rows.
    assert set(Rule("epd").as_values()) == {"of", "by", "share", "random", "steps"}
    assert str(patterns) == "random like full: k_proj, v_proj"


def test_rows_of_one_probe_share_it_and_each_counts_it(study, rows):
    opened, _ = study
    assert len(list((opened.output_dir / "probes/sums").glob("*.json"))) == 1
    for name, row in rows.items():
        probes = name not in {"shape", "named", "other"}
        assert row["probe_steps"] == (3 if probes else 0)
        assert (row["probe_seconds"] > 0) is (row["probe_flops"] > 0) is probes
        assert row["seconds"] > row["probe_seconds"]
        assert row["training_flops"] == row["probe_flops"] + row["tokens"] * (
            4 * row["parameters"] + 2 * row["trained_parameters"]
        )


def test_equal_assignments_of_different_rules_are_trained_once(study, rows):
    opened, make = study
    keys = [row["assignment_key"] for row in rows.values()]
    assert sum(not row["reused"] for row in rows.values()) == len(set(keys))
    (planned,) = (
        t for t in Plan(opened, {}, make, {}).trials
        if (t.method.name, t.phase) == ("wins", "choose")
    )  # fmt: skip
    # A rule of its own, whose decisions are the same.
    rule = replace(planned.trial_rule, rule=replace(planned.trial_rule.rule, steps=4))
    other = replace(planned, key="other", trial_rule=rule, method=replace(planned.method, name="b"))
    outcome = TrialRunner(opened, None)(other, other.point)
    row = next(r.row for r in all_results(opened).values() if r.row["method"] == "b")
    assert outcome.is_reused is (row["assignment_key"] == rows["wins"]["assignment_key"])
    assert (row["probe_steps"], rows["wins"]["probe_steps"]) == (4, 3)


def test_an_assignment_of_one_class_is_a_trial_whose_row_shows_it(study):
    opened, make = study
    (planned,) = (
        t for t in Plan(opened, {}, make, {}).trials
        if (t.method.name, t.phase) == ("shape", "choose")
    )  # fmt: skip
    one_class = replace(planned, key="one", method=replace(planned.method, name="one"))
    point = {"learning_rate": 1e-4, "lora_lr_ratio": 100}
    with pytest.warns(UserWarning, match="All .* layers are lora"):
        outcome = TrialRunner(opened, None)(one_class, point)
    assert outcome.state == "complete"
    row = next(r.row for r in all_results(opened).values() if r.row["method"] == "one")
    assert (row["assignment"], row["full_layers"], row["full_weights"]) == ("all lora", 0, 0)


def test_an_assignment_of_another_model_is_refused_before_any_trial(tmp_path, capsys):
    """In a dry run too: with the cell, the method and the layers that differ."""
    base = write_checkpoint(tmp_path / "base")
    other = write_checkpoint(tmp_path / "other", num_hidden_layers=3)
    model = load_skeleton(str(other))
    given = Assignment.from_patterns(model, {"full": ["k_proj"], "default": {"r": 2}})
    file = tmp_path / "assignment.yaml"
    file.write_text(given.to_yaml())
    cells = [sums_cell(tmp_path, other, "fits"), sums_cell(tmp_path, base)]
    fixed = {**HYBRID, "name": "fixed", "assignment": str(file)}
    before = {*tmp_path.iterdir()}
    path = write_study(tmp_path, cells=cells, methods=[FFT, fixed])
    for more in (["--dry_run"], []):
        assert main(["study", "run", str(path), *more]) == 2
        *_, error = capsys.readouterr().err.splitlines()
        assert "study tried, cell sums, method fixed: assignment" in error
        assert "model.layers.2.self_attn.q_proj" in error
        assert {*tmp_path.iterdir()} == before | {path}
    path = write_study(tmp_path, cells=cells[:1], methods=[FFT, fixed])
    assert main(["study", "run", str(path), "--dry_run"]) == 0


@pytest.mark.parametrize(
    ("full", "molf", "message"),
    [
        (["qkv"], {}, "assignment, full: Invalid full pattern 'qkv': it matches no linear layer"),
        (["lm_head"], {}, "assignment, full: lm_head is not routed by molf. Give patterns of"),
        (
            ["k_proj"],
            {"ranks": [2, 4]},
            "assignment, full: molf has 2 LoRA experts, and each other layer gets one",
        ),
        (
            ["k_proj", "down_proj"],
            {"exclude_modules": ["down_proj"]},
            "layers.0.mlp.down_proj, model.layers.1.mlp.down_proj are not routed by molf",
        ),
    ],
)
def test_patterns_that_do_not_fit_are_refused_before_any_trial(
    tmp_path, capsys, full, molf, message
):
    cell = sums_cell(tmp_path, write_checkpoint(tmp_path / "base"))
    methods = [FFT, {**MOLF, "ranks": 2, **molf}, hybrid(full=full)]
    path = write_study(tmp_path, cells=[cell], methods=methods)
    before = {*tmp_path.iterdir()}
    assert main(["study", "run", str(path), "--dry_run"]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert re.search(message, error), error
    assert "study tried, cell sums, method hybrid: " in error
    assert {*tmp_path.iterdir()} == before


def test_messages_of_libraries_do_not_appear_while_assignments_are_checked(
    tmp_path, capsys, monkeypatch
):
    def load(model):
        logging.getLogger("torchao").warning("Failed to load a kernel")
        return load_skeleton(model)

    monkeypatch.setattr("molf.job.model.loading.load_skeleton", load)
    cell = sums_cell(tmp_path, write_checkpoint(tmp_path / "base"))
    methods = [FFT, {**MOLF, "ranks": 2}, hybrid(full=["k_proj"])]
    path = write_study(tmp_path, cells=[cell], methods=methods)
    logging.getLogger("torchao").addHandler(handler := logging.StreamHandler(sys.stderr))
    try:
        assert main(["study", "run", str(path), "--dry_run"]) == 0
    finally:
        logging.getLogger("torchao").removeHandler(handler)
    assert "kernel" not in capsys.readouterr().err
