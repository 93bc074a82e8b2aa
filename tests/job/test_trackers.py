"""Whole trainings with W&B (offline), MLflow, trackio and TensorBoard, read back as stored."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from checkpoints import write_checkpoint
from molf.cli import main
from tracker_files import mlflow_runs, trackio_runs, wandb_runs

pytestmark = pytest.mark.slow

PACKAGES = ["wandb", "mlflow", "trackio"]
SECRET = "hf_5ecret7890123456789012"


def needs(name):
    missing = find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed (make test-slow does)")


EACH = pytest.mark.parametrize("name", [pytest.param(x, marks=needs(x)) for x in PACKAGES])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A model and data; the trackers store their runs here, and none sends anything."""
    folder = tmp_path_factory.mktemp("trackers")
    write_checkpoint(folder / "base")
    rows = [{"prompt": f"{n} and {n} are", "completion": f" {2 * n}"} for n in range(40)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "plain.txt").write_text("Anna walks to the river and sits by the water. " * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_RUN_ID"):
            patch.delenv(name, raising=False)
        patch.chdir(folder)  # MLflow's files lie in the current directory
        yield folder


def command(folder, path, name, *further, every="2"):
    return [
        *("train", "--task", "custom", "--model", str(folder / "base")),
        *("--data", str(folder / "records.jsonl"), "--max_eval_samples", "3", "--eval_steps", "2"),
        *("--forgetting_data", str(folder / "plain.txt"), "--ranks", "4", "--max_steps", "4"),
        *("--logging_steps", every, "--no-report", "--no-spectra", "--report_to", name),
        *("--output_dir", str(path), *further),
    ]


def stored(folder, name):
    if name == "wandb":
        return wandb_runs(folder)
    if name == "mlflow":
        return mlflow_runs(os.environ["MLFLOW_TRACKING_URI"])
    # tests/conftest.py sets trackio's folder.
    database = Path(os.environ["TRACKIO_DIR"], "huggingface.db")
    return trackio_runs() if database.exists() else []


def near(pairs):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]


def prefix(name, of="train"):
    """Return the first part of a figure's name: MLflow has the trainer's own names."""
    return {"train": "", "eval": "eval_"}[of] if name == "mlflow" else f"{of}/"


@EACH
def test_all_arrives(workplace, name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    path = workplace / f"{name}-whole"
    assert main(command(workplace, path, name)) == 0
    (run,) = [one for one in stored(workplace, name) if one.name == path.name]

    logged = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    figures = ["loss", "learning_rate", "lora_learning_rate", "won/full", "won/lora0_r4"]
    for figure in [*figures, "score_margin", "tokens_per_second", "memory_bytes"]:
        expected = [(line["step"], line[figure]) for line in logged if figure in line]
        assert run.values[prefix(name) + figure] == near(expected)
    losses = [(line["step"], line["eval_loss"]) for line in logged if "eval_loss" in line]
    assert [step for step, _ in losses] == [2, 4]
    assert run.values[prefix(name, "eval") + "loss"] == near(losses)

    found = json.loads((path / "eval.json").read_text())
    for when, step in (("before", 0), ("after", 4)):
        for metric, record in found[when].items():
            for part, value in record.items():
                full = f"{when}/{metric}" + ("" if part == "value" else f"_{part}")
                if value is not None:
                    assert run.values[full] == near([(step, value)])
    assert {"after/kl_task", "after/exact_match_low"} <= run.values.keys()
    assert len(run.pictures) == 1
    assert run.pictures[0].startswith("routing/winners")

    options = yaml.safe_load((path / "config.yaml").read_text())
    sent = run.config["molf"] if name != "mlflow" else None
    if sent is None:
        assert (run.config["molf.method"], run.config["molf.ranks"]) == ("molf", "4")
        assert run.config["molf.score"] == options["score"]
    else:
        assert {key: sent[key] for key in ("method", "ranks", "score", "task")} == {
            key: options[key] for key in ("method", "ranks", "score", "task")
        }
    assert SECRET not in json.dumps(run.config)
    assert "hidden_size" in run.config  # of transformers' callback


@EACH
def test_a_second_training_of_the_process_has_a_run_of_its_own(workplace, name):
    before = len(stored(workplace, name))
    for part in ("one", "two"):  # directories of the same name
        path = workplace / part / f"{name}-twice"
        assert main(command(workplace, path, name, "--seed", str(len(part)))) == 0
    runs = stored(workplace, name)
    assert len(runs) == before + 2
    for run in runs[-2:]:
        assert [step for step, _ in run.values[prefix(name) + "loss"]] == [1, 2, 4]
        assert [step for step, _ in run.values["after/loss"]] == [4]


@EACH
def test_a_resumed_training_continues_its_run(workplace, name, monkeypatch, capfd):
    from molf.job.trainer.checkpoints import Checkpoints

    path = workplace / f"{name}-resumed"
    save = Checkpoints.save

    def stopping(self, snapshot, step):
        save(self, snapshot, step)
        raise OSError("the machine is gone")

    saving = ["--save_steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping)
        assert main(command(workplace, path, name, *saving)) == 1
    count = len(stored(workplace, name))
    # Another value of a parameter that MLflow has stored already.
    assert main(command(workplace, path, name, *saving, "--resume", every="1")) == 0
    assert "not allowed" not in capfd.readouterr().err
    runs = stored(workplace, name)
    parts = [one for one in runs if one.name == path.name]
    if name == "wandb":  # offline, each part is a folder; `wandb sync` joins those with one id
        assert len({one.identity for one in parts}) == 1
        assert len(parts) == 2
    else:
        assert len(runs) == count
        assert len(parts) == 1
    joined = {}
    for part in parts:
        for figure, values in part.values.items():
            joined.setdefault(figure, []).extend(values)
    assert [step for step, _ in joined[prefix(name) + "loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in joined["before/loss"]] == [0]
    assert [step for step, _ in joined["after/loss"]] == [4]
    if name == "mlflow":
        assert parts[0].identity == "FINISHED"


@needs("wandb")
def test_a_run_of_wandb_that_is_open_is_used_and_stays_open(workplace):
    import wandb

    own = wandb.init(project="own", name="own-wandb")
    try:
        assert main(command(workplace, workplace / "wandb-within", "wandb")) == 0
        assert wandb.run is own
    finally:
        own.finish()
    (run,) = [one for one in stored(workplace, "wandb") if one.name == "own-wandb"]
    assert {"train/loss", "before/loss", "after/loss"} <= run.values.keys()


@needs("mlflow")
def test_a_run_of_mlflow_that_is_open_is_used_and_stays_open(workplace):
    import mlflow

    with mlflow.start_run(run_name="own-mlflow") as own:
        assert main(command(workplace, workplace / "mlflow-within", "mlflow")) == 0
        assert mlflow.active_run().info.run_id == own.info.run_id
    (run,) = [one for one in stored(workplace, "mlflow") if one.name == "own-mlflow"]
    assert {"loss", "before/loss", "after/loss"} <= run.values.keys()


@needs("mlflow")
def test_a_run_of_mlflow_that_the_environment_names_is_continued(workplace, monkeypatch):
    import mlflow

    with mlflow.start_run(run_name="named") as named:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", named.info.run_id)
    assert main(command(workplace, workplace / "mlflow-named", "mlflow")) == 0
    assert mlflow.active_run() is None
    # transformers' callback gives it the name of the directory.
    (run,) = [one for one in stored(workplace, "mlflow") if one.name == "mlflow-named"]
    assert "named" not in [one.name for one in stored(workplace, "mlflow")]
    assert {"loss", "before/loss", "after/loss"} <= run.values.keys()
