"""A run and `molf eval` compare a model with its base, one in memory at a time."""

import csv
import json
import shutil
import weakref

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import write_checkpoint
from molf.amounts import fixed
from molf.cli import main
from molf.job.model import loading
from molf.job.model.loading import load_model
from molf.job.trained_model import TrainedModel
from molf.measure import default_plain_text
from molf.measure.divergence import read_base
from molf.tasks import TaskOptions, load_task
from molf.world import BASE_PATH

KL = ["kl_neutral", "kl_task"]


def metrics_of(path, when=None):
    found = json.loads((path / "eval.json").read_text())
    return found["metrics"] if when is None else found[when]


def swap_tokens(checkpoint):
    """Exchange the ids of two characters."""
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    ids = tokenizer["model"]["vocab"]
    first, second = [token for token in ids if len(token) == 1][:2]
    ids[first], ids[second] = ids[second], ids[first]
    path.write_text(json.dumps(tokenizer))


@torch.no_grad()
def direct(base, model, side):
    """The mean divergence with both models in memory, one row at a time, in float64."""
    found = []
    for row in side.rows:
        p, q = (m(torch.tensor([row])).logits[0].double().log_softmax(-1) for m in (base, model))
        found += (p.exp() * (p - q)).sum(-1).tolist()
    return sum(found) / len(found)


@pytest.fixture
def evaluate(facts, tmp_path, capsys):
    """Evaluate a model on the facts; return exit code, metrics, and what was printed."""

    def run(model, *options, task=("--task", "fact")):
        data = ("--data", str(facts)) if task[1] == "fact" else ()
        path = tmp_path / "evaluation"
        given = ["eval", str(model), *task, *data, *options, "--output_dir", str(path)]
        code = main([*given, "--overwrite"])
        captured = capsys.readouterr()
        return code, metrics_of(path) if code == 0 else None, captured

    return run


def test_a_run_records_the_divergence_of_its_saved_model(any_run, base, facts):
    before, after = (metrics_of(any_run.path, when) for when in ("before", "after"))
    assert [*after] == [*before, *KL]
    models = [load_model(str(path)) for path in (base, any_run.path / "model")]
    task = load_task(TaskOptions(name="fact", data=str(facts), evaluation_only=True))
    read = read_base(models[0].model, models[0].tokenizer, task, default_plain_text())
    for name, side in zip(KL, (read.neutral, read.task), strict=True):
        assert after[name]["value"] == pytest.approx(direct(*[m.model for m in models], side))
        assert 0 < after[name]["low"] < after[name]["value"] < after[name]["high"]
        assert after[name]["count"] == len(side.rows)
    with (any_run.path.parent / "results.csv").open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["run"] == any_run.path.name]
    card = (any_run.path / "model" / "README.md").read_text()
    for name in KL:
        assert float(row[f"after/{name}"]) == after[name]["value"]
        assert f"before/{name}" not in row
        value, low, high = (fixed(after[name][key], 3) for key in ("value", "low", "high"))
        shown = f"{value} [{low}, {high}] | {after[name]['count']} |"
        assert f"| {name} | - | {shown}\n" in card


def test_it_is_printed_and_an_older_table_gets_the_columns(options, tmp_path, capsys):
    columns = "run,started,task,method,model,seed,training_loss,peak_memory_bytes,after/es"
    (tmp_path / "results.csv").write_text(f"{columns}\nold,a,fact,fft,m,1,0.5,1,0.25\n")
    assert main([*options, "--output_dir", str(tmp_path / "new")]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("Reading the base model again\n") == 1
    with (tmp_path / "results.csv").open(newline="") as file:
        old, new = csv.DictReader(file)
    assert (old["run"], old["after/es"], old["after/kl_task"]) == ("old", "0.25", "")
    for name in KL:
        (line,) = [line for line in captured.out.splitlines() if line.startswith(f"│ {name} ")]
        _, _, before, after, count, _ = (cell.strip() for cell in line.split("│"))
        assert before == "-"
        assert after.startswith(f"{fixed(float(new[f'after/{name}']), 3)} [")
        assert int(count) > 1


def test_one_model_is_in_memory_at_a_time(monkeypatch, options, base, facts, tmp_path, capsys):
    loaded, auto_class = [], loading.auto_class

    class Loading:
        def __init__(self, config):
            self.kind = auto_class(config)

        def from_pretrained(self, name, **options):
            assert [name for name, model in loaded if model() is not None] == []
            model, info = self.kind.from_pretrained(name, **options)
            loaded.append((name, weakref.ref(model)))
            return model, info

    monkeypatch.setattr(loading, "auto_class", Loading)
    out = tmp_path / "run"
    assert main([*options, "--output_dir", str(out)]) == 0
    assert [name for name, _ in loaded] == [str(base), str(base), str(out / "model")]
    loaded.clear()
    assert main(["eval", str(out / "model"), "--task", "fact", "--data", str(facts)]) == 0
    assert [name for name, _ in loaded] == [str(base), str(out / "model")]
    capsys.readouterr()


def test_bfloat16_models_are_compared_in_bfloat16(options, tmp_path, capsys):
    arguments = [given if given not in ("1e-2", "3e-2") else "1e-9" for given in options]
    arguments += ["--method", "fft", "--output_dir", str(tmp_path / "run")]
    assert main([*arguments, "--dtype", "bfloat16", "--save_dtype", "bfloat16"]) == 0
    for name in KL:  # few bits have moved, and the base is rounded in the same way
        assert metrics_of(tmp_path / "run", "after")[name]["value"] < 1e-9
    capsys.readouterr()


def test_a_base_that_is_gone_does_not_cost_the_training(
    monkeypatch, options, base, tmp_path, capsys, evaluate
):
    moved = shutil.copytree(base, tmp_path / "moved")
    arguments = [str(moved) if given == str(base) else given for given in options]
    save = TrainedModel.save

    def saving_and_deleting(self):
        record = save(self)
        shutil.rmtree(moved)
        return record

    monkeypatch.setattr(TrainedModel, "save", saving_and_deleting)
    out = tmp_path / "run"
    assert main([*arguments, "--output_dir", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("kl_neutral and kl_task are not measured") == 1
    assert f"model {moved}" in captured.err
    assert [*metrics_of(out, "after")] == [*metrics_of(out, "before")]

    code, metrics, captured = evaluate(out / "model")
    assert code == 0
    assert not set(KL) & set(metrics)
    (line,) = [line for line in captured.out.splitlines() if "kl not measured" in line]
    assert f"the base of {out} cannot be read" in line
    code, metrics, _ = evaluate(out / "model", "--base", str(base))
    assert code == 0
    assert metrics["kl_task"]["value"] > 0


def test_eval_takes_the_base_of_the_run(molf_run, evaluate, base):
    code, metrics, captured = evaluate(molf_run.path / "model")
    assert code == 0
    after = metrics_of(molf_run.path, "after")
    for name in KL:  # intervals are drawn by the seed
        assert metrics[name]["value"] == pytest.approx(after[name]["value"], rel=1e-5)
        assert metrics[name]["count"] == after[name]["count"]
    assert f"Reading the base model {base}" in captured.err
    assert "kl not measured" not in captured.out
    _, given, _ = evaluate(molf_run.path / "model", "--base", str(base))
    assert given == metrics


@pytest.mark.slow
def test_eval_on_several_tasks(evaluate, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(BASE_PATH)
    with torch.no_grad():
        other.model.norm.weight *= 1.2
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(BASE_PATH).save_pretrained(tmp_path / "other")
    options = ("--base", str(BASE_PATH), "--max_samples", "3")
    model = tmp_path / "other"
    found = [evaluate(model, *options, task=("--task", f"demo-{x}"))[1] for x in ("fact", "med")]
    path = tmp_path / "several"
    given = ["--task", "demo-fact,demo-med", *options, "--output_dir", str(path)]
    assert main(["eval", str(model), *given]) == 0
    several = json.loads((path / "eval.json").read_text())["tasks"]
    assert [entry["metrics"] for entry in several] == found
    assert found[0]["kl_neutral"] == found[1]["kl_neutral"]
    assert 0 < found[0]["kl_task"]["value"] != found[1]["kl_task"]["value"] > 0


def test_a_model_without_a_known_base_is_measured_without(base, evaluate):
    code, metrics, captured = evaluate(base)
    assert code == 0
    assert not set(KL) & set(metrics)
    lines = [line for line in captured.out.splitlines() if "kl" in line]
    assert lines == [f"kl not measured: no run recorded the base of {base}; give it with --base"]
    assert "Reading" not in captured.err


def test_the_base_itself_has_no_divergence(base, evaluate):
    _, metrics, _ = evaluate(base, "--base", str(base))
    for name in KL:
        assert (metrics[name]["value"], metrics[name]["low"], metrics[name]["high"]) == (0, 0, 0)


def test_wrong_bases(monkeypatch, molf_run, evaluate, base, tmp_path):
    model = molf_run.path / "model"

    def refused(*options, model=model, **task):
        monkeypatch.setattr("molf.measure.likelihood.last_logits", None)  # no model is measured
        code, _, captured = evaluate(model, *options, **task)
        assert code == 2
        *_, line = captured.err.strip().splitlines()
        assert "Traceback" not in captured.err
        assert not (tmp_path / "evaluation").exists()
        return line

    nowhere = tmp_path / "nowhere"
    assert f"Invalid base={nowhere}: model {nowhere}" in refused("--base", str(nowhere))
    assert f"{molf_run.path / 'model'}" in refused("--base", str(molf_run.path))

    other = shutil.copytree(base, tmp_path / "other")
    swap_tokens(other)
    line = refused("--base", str(other))
    assert f"Invalid base={other}: its tokenizer is not that of {model} (" in line
    assert "so their predictions cannot be compared." in line

    larger = shutil.copytree(base, tmp_path / "larger")
    resized = AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(520)
    resized.save_pretrained(larger)
    assert "The base predicts 520 tokens, and the model 512." in refused("--base", str(larger))

    line = refused("--base", str(base), task=("--task", "lm-eval:piqa"))
    assert "are not compared with a base. Leave it out." in line


def test_a_base_beside_saved_texts_is_refused(molf_run, base, facts, capsys):
    texts = str(molf_run.path / "predictions.jsonl")
    given = ["eval", "--task", "fact", "--data", str(facts), "--predictions", texts]
    assert main([*given, "--base", str(base)]) == 2
    assert f"Invalid base={base} with predictions" in capsys.readouterr().err


def test_a_recorded_base_with_other_tokens_is_one_line(molf_run, evaluate, base, tmp_path):
    copied = shutil.copytree(molf_run.path, tmp_path / "copied")
    other = write_checkpoint(tmp_path / "other")
    swap_tokens(other)
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["model"] = str(other)
    contents = config["run"]["model"].pop("contents")
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    code, metrics, captured = evaluate(copied / "model")
    assert code == 0
    assert not set(KL) & set(metrics)
    assert captured.out.count("kl not measured: the base of the run cannot be read") == 1
    config["run"]["model"]["contents"] = contents
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    code, metrics, captured = evaluate(copied / "model")
    assert code == 0
    assert not set(KL) & set(metrics)
    assert f"kl not measured: the base {other} has changed since {copied}" in captured.out
