"""`molf advise`: evidence from the log, the assignment, its cost, and plain doubts."""

import json
import math
import re
import shutil

import pytest
import yaml

from molf.cli import main
from molf.core.step.decision import Decision
from molf.disk.locks import Lock
from molf.job.model.loading import load_skeleton
from molf.job.record.assignment_source import read_assignment
from molf.job.record.routing_log import RoutingWriter, iter_steps
from molf.report.place import is_page

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def advised(capsys):
    """Advise on a run; return what it prints as JSON."""

    def call(path, *arguments):
        capsys.readouterr()
        assert main(["advise", str(path), "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def with_log(run_of, tmp_path):
    """A copy of a run of molf, with other decisions: a function of (name, step) of both scores."""

    def make(scores_of, steps=30):
        source, run = run_of("molf").path, tmp_path / "run"
        run.mkdir()
        for name in ("config.yaml", "environment.json"):
            shutil.copy(source / name, run)
        names = list(next(iter_steps(source))["selections"])
        with RoutingWriter(run / "routing") as writer:
            for step in range(steps):
                routing = {}
                for name in names:
                    full, lora = scores_of(name, step)
                    winner = "full" if full >= lora else "lora0_r4"
                    routing[name] = Decision((winner,), {"full": full, "lora0_r4": lora})
                writer.add(step, routing)
        return run

    return make


def by_kind(name, step):
    """k and v choose full, always and clearly."""
    return (3.0, 1.0) if name.endswith(("k_proj", "v_proj")) else (1.0, 3.0)


def test_advice_is_that_of_the_log(run_of, base, tmp_path, advised):
    """Counted from the log once more, and shape's prediction by the formula."""
    run, out = run_of("molf"), tmp_path / "assignment.yaml"
    found = advised(run.path, "--output", str(out), "--no_plan")
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    ratio = config["lora_learning_rate"] / config["learning_rate"]
    scaling = config["alpha"][0] / math.sqrt(config["ranks"][0])
    wins = {}
    for step in iter_steps(run.path):
        for name, one in step["selections"].items():
            if any(one["scores"].values()):
                wins.setdefault(name, []).append(one["winners"] == ["full"])
    assert [one["name"] for one in found["layers"]] == list(wins)
    differing = 0
    for one in found["layers"]:
        out_features, in_features = one["shape"]
        tips_at = math.sqrt(3) * (in_features + out_features) / (scaling * out_features)
        assert one["tips_at"] == pytest.approx(tips_at)
        predicted = "full" if ratio < tips_at else "lora"
        won = wins[one["name"]]
        full = sum(won) >= len(won) - sum(won)
        assert one["by_shape"]["train"] == predicted
        assert one["train"] == ("full" if full else "lora")
        assert one["wins"]["full"] == sum(won)
        differing += predicted != one["train"]
    assert found["differing_from_shape"] == differing
    assert found["doubts"][0].startswith(
        "Few steps: 2 decisions per layer."  # the first is at rate 0
    )
    assignment = read_assignment(out, load_skeleton(str(base)))
    assert {one.name: one.train for one in assignment.entries} == {
        one["name"]: one["train"] for one in found["layers"]
    }


def test_tables(with_log, capsys):
    run = with_log(by_kind)
    assert main(["advise", str(run)]) == 0
    text = capsys.readouterr().out
    assert "30 decisions for each of 14 layers" in text
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert set(LAYERS) < set(rows)
    assert "+0.500" in rows["k_proj"]
    assert "-0.500" in rows["up_proj"]
    assert "100% of the layers kept their winner after the first tenth" in text
    assert "14 layers: 4 full" in text
    assert {"full", "MoLF", "LoRA", "assigned"} < set(rows)
    assert str(run / "assignment.yaml") in text.splitlines()[-1]
    assert max(map(len, (line for line in text.splitlines() if line.startswith("│")))) <= 80


def test_share_and_score(with_log, advised):
    def scores(name, step):
        """up_proj leads by far in 14 of 30 steps and trails a little in the others."""
        if name.endswith("up_proj"):
            return (9.0, 1.0) if step < 14 else (1.0, 1.1)
        return by_kind(name, step)

    run = with_log(scores)

    def full_of(*arguments):
        found = advised(run, "--no_plan", "--overwrite", *arguments)
        return {one["name"].rpartition(".")[2] for one in found["layers"] if one["train"] == "full"}

    assert full_of() == {"k_proj", "v_proj"}
    assert full_of("--by", "score") == {"k_proj", "v_proj", "up_proj"}
    assert full_of("--share", "0.1429") <= {"k_proj", "v_proj"}  # 2 of 14 layers


def test_costs(with_log, advised):
    """Arithmetic by the shapes; the peaks are those of the planner."""
    found = advised(with_log(by_kind))
    costs = {one["method"]: one for one in found["costs"]}
    shapes = {one["name"]: one["shape"] for one in found["layers"]}
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    total, factors = sum(weights.values()), 4 * sum(map(sum, shapes.values()))
    assert costs["fft"]["operations"] == 6 * total
    assert costs["lora"]["operations"] == 4 * total + 6 * factors
    full = [name for name in shapes if name.endswith(("k_proj", "v_proj"))]
    hybrid = sum(
        6 * weights[name] if name in full else 4 * weights[name] + 6 * 4 * sum(shape)
        for name, shape in shapes.items()
    )
    assert costs["hybrid"]["operations"] == hybrid
    assert costs["lora"]["trained"] == factors
    assert costs["lora"]["peak"] < costs["hybrid"]["peak"] < costs["fft"]["peak"]


def test_advice_does_not_depend_on_the_plan(with_log, capsys):
    """The record of the run lacks an option that the plan needs."""
    run = with_log(by_kind)
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["per_device_train_batch_size"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["advise", str(run)]) == 0
    printed = capsys.readouterr()
    assert "14 layers: 4 full" in printed.out
    assert "The cost is not planned: " in printed.err
    assert (run / "assignment.yaml").is_file()


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (lambda name, step: (3.0, 1.0), "One-sided: all 14 layers"),
        (lambda name, step: (1.0, 1.05) if step else (1.0, 0.9), "Small margins: in 14 of 14"),
        (lambda name, step: (3.0, 1.0) if step < 20 else (1.0, 9.0), "Late changes: 14 of 14"),
    ],
)
def test_doubts(with_log, advised, scores, words):
    assert any(line.startswith(words) for line in advised(with_log(scores), "--no_plan")["doubts"])


def test_partition_that_shape_predicts(with_log, advised, run_of):
    config = yaml.safe_load((run_of("molf").path / "config.yaml").read_text())
    ratio = config["lora_learning_rate"] / config["learning_rate"]
    first = advised(with_log(by_kind), "--no_plan")
    predicted = {one["name"]: one["by_shape"]["train"] for one in first["layers"]}
    shutil.rmtree(first["run"])

    def as_shape(name, step):
        return (3.0, 1.0) if predicted[name] == "full" else (1.0, 3.0)

    found = advised(with_log(as_shape), "--no_plan")
    assert found["differing_from_shape"] == 0
    doubt = found["doubts"][-1]
    assert doubt.startswith("Fixed partition")
    assert f"lora_lr {ratio:g} times lr" in doubt
    if set(predicted.values()) == {"full", "lora"}:
        assert len(found["doubts"]) == 1


def test_clear_evidence_has_no_doubts(with_log, capsys):
    def scores(name, step):
        """Full in the first decoder layer: no shape predicts that."""
        return (3.0, 1.0) if ".0." in name else (1.0, 3.0)

    run = with_log(scores)
    assert main(["advise", str(run), "--no_plan"]) == 0
    text = capsys.readouterr().out
    assert "No sign of thin evidence" in text
    assert "the log differs in 7 of 14 layers" in text


def test_controls_are_no_evidence(with_log, advised):
    run = with_log(by_kind)
    config = yaml.safe_load((run / "config.yaml").read_text())
    for score in ("random:0.3", "full", "shape"):
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "score": score}))
        found = advised(run, "--no_plan", "--overwrite")
        assert found["doubts"][0].startswith(f"score={score} is a control")


def test_a_score_that_was_registered_in_the_run(with_log, advised):
    """Its function is not here, and its decisions are."""
    run = with_log(by_kind)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "score": "grad-norm"}))
    found = advised(run, "--no_plan")
    assert found["score"] == "grad-norm"
    assert not any("control" in doubt for doubt in found["doubts"])


def test_without_a_full_expert(run_of, tmp_path, capsys):
    out = str(tmp_path / "assignment.yaml")
    run = str(run_of("molf-e").path)
    assert main(["advise", run, "--output", out, "--no_plan"]) == 0
    text = capsys.readouterr().out
    assert "There was no full expert" in text
    assert "margin" not in text
    assert "14 layers: 0 full" in text
    assert main(["advise", run, "--output", out, "--overwrite", "--share", "0.5"]) == 2
    assert "there is no full expert" in capsys.readouterr().err


def test_figures(with_log, tmp_path, capsys):
    folder = tmp_path / "new" / "figures"
    assert main(["advise", str(with_log(by_kind)), "--no_plan", "--figures", str(folder)]) == 0
    drawn = sorted(folder.iterdir())
    assert [path.name for path in drawn] == ["assignment-evidence.png", "assignment-map.png"]
    text = capsys.readouterr().out
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"written   {path}" in text


def test_page(with_log, tmp_path, capsys):
    run, page = with_log(by_kind), tmp_path / "advice.html"
    page.write_text("mine")
    assert main(["advise", str(run), "--page", str(page)]) == 2
    assert f"page {page} exists. Give --overwrite" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert not (run / "assignment.yaml").exists()
    both = ["--page", str(tmp_path / "a"), "--output", str(tmp_path / "a")]
    assert main(["advise", str(run), *both]) == 2
    assert "page and output are one file" in capsys.readouterr().err
    folder = str(tmp_path / "figures")
    for option in ("output", "page"):
        assert main(["advise", str(run), "--figures", folder, f"--{option}", folder]) == 2
        assert f"figures and {option} are one file" in capsys.readouterr().err
        assert not (tmp_path / "figures").exists()
    assert main(["advise", str(run), "--page", str(page), "--overwrite"]) == 0
    assert capsys.readouterr().out.endswith(f"written   {page}\n")
    assert is_page(page)
    text = page.read_text()
    rows = re.findall(r'<th scope="row">(model[^<]*)</th>\s*(.*?)</tr>', text, re.S)
    cells = {name: re.findall(r"<td>([^<]*)</td>", row) for name, row in rows}
    assert cells["model.layers.0.self_attn.k_proj"][1:3] == ["100%", "+0.500"]
    assert cells["model.layers.0.self_attn.k_proj"][-1] == "full"
    assert cells["model.layers.0.self_attn.q_proj"][-1] == "r 4"
    assert len(cells) == 14
    for title in ("By kind of projection", "Cost", "Winners by layer and step", "Score margins"):
        assert f">{title}<" in text


def test_the_file_belongs_to_the_run(with_log, tmp_path, capsys, facts, base):
    """`--overwrite` of `molf train` replaces a run with it."""
    from molf.job.record.ownership import A_RUN

    run = with_log(by_kind)
    assert main(["advise", str(run), "--no_plan"]) == 0
    assert A_RUN.fault(run) is None


def test_an_edited_file_is_kept(with_log, capsys):
    run = with_log(by_kind)
    path = run / "assignment.yaml"
    assert main(["advise", str(run), "--no_plan"]) == 0
    assert f"written   {path}\n" in capsys.readouterr().out
    assert main(["advise", str(run), "--no_plan"]) == 0
    assert f"kept      {path}, which is this assignment\n" in capsys.readouterr().out
    path.write_text("default: full\n")
    assert main(["advise", str(run), "--no_plan"]) == 0
    assert f"kept      {path}, which differs: --overwrite replaces it" in capsys.readouterr().out
    assert path.read_text() == "default: full\n"
    assert main(["advise", str(run), "--no_plan", "--output", str(path)]) == 2
    assert "Give --overwrite" in capsys.readouterr().err
    assert main(["advise", str(run), "--no_plan", "--overwrite"]) == 0
    assert path.read_text() != "default: full\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--share", "0"], "Invalid share=0. Must be above 0 and below 1."),
        (["--share", "1.5"], "Invalid share=1.5"),
        (["--share", "nan"], "Invalid share=nan"),
        (["--share", "0.5", "--by", "score"], "a share goes by the score already"),
        (["--by", "luck"], "luck"),
        (["--output", "{tmp}"], "is a directory. Give a file."),
        (["--output", "{tmp}/missing/file.yaml"], "there is no directory"),
        (["--figures", "{tmp}/run/config.yaml"], "is a file. Give a folder."),
    ],
)
def test_wrong_options(with_log, tmp_path, capsys, arguments, words):
    run = with_log(by_kind)
    capsys.readouterr()
    given = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    assert main(["advise", str(run), "--no_plan", *given]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (run / "assignment.yaml").exists()


def test_wrong_runs(run_of, with_log, tmp_path, capsys):
    run = with_log(by_kind)
    config = yaml.safe_load((run / "config.yaml").read_text())

    def refused(path, words):
        capsys.readouterr()
        assert main(["advise", str(path), "--no_plan"]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1

    refused(run_of("fft").path, "has no routing: only molf and molf-e route")
    refused(tmp_path / "missing", "missing")
    refused(tmp_path, "is not a run")
    with Lock(run):
        refused(run, "is in use")
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": str(tmp_path / "gone")}))
    refused(run, "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for value in ('"\\UFFFFFFFF"', "!!bool maybe", "["):
        (run / "config.yaml").write_text(f"{yaml.safe_dump(config)}score: {value}\n")
        refused(run, "config.yaml cannot be read: no YAML")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(run / "routing")
    with RoutingWriter(run / "routing") as writer:  # rate 0 alone
        writer.add(0, {"x.q_proj": Decision(("full",), {"full": 0.0, "lora0_r4": 0.0})})
    refused(run, "x.q_proj")
