"""`--eval_part validation` in the commands: what is recorded, and what an evaluation warns of."""

import csv
import json

import pytest
import yaml

from molf.cli import main

SHORT = ["--max_steps", "1", "--max_samples", "8", "--max_eval_samples", "4"]
VALIDATION = ["--eval_part", "validation", "--validation_share", "0.3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each part of demo-med."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in (("test", ()), ("validation", VALIDATION)):
        given = ["--task", "demo-med", *SHORT, *options, "--output_dir", str(folder / name)]
        assert main(["train", *given]) == 0
    return folder


def test_the_part_is_recorded(runs):
    config = yaml.safe_load((runs / "validation" / "config.yaml").read_text())
    assert (config["eval_part"], config["validation_share"]) == ("validation", 0.3)
    task = config["run"]["task"]
    assert task["evaluated_on"] == "180 records of the validation part of demo-med (share 0.3)"
    with (runs / "results.csv").open(newline="") as file:
        rows = {row["run"]: row["eval_part"] for row in csv.DictReader(file)}
    assert rows == {"test": "test", "validation": "validation"}


def test_the_recorded_options_measure_the_same_records(runs, tmp_path):
    def indices(run):
        lines = (run / "predictions.jsonl").read_text().splitlines()
        return [json.loads(line)["index"] for line in lines]

    given = ["--config", str(runs / "validation" / "config.yaml"), "--output_dir"]
    assert main(["train", *given, str(tmp_path / "again")]) == 0
    assert indices(tmp_path / "again") == indices(runs / "validation")
    assert indices(runs / "test") != indices(runs / "validation")


@pytest.mark.parametrize(
    ("run", "options", "warned"),
    [
        ("validation", VALIDATION, False),
        ("validation", ["--eval_part", "validation"], True),
        ("validation", [], False),
        ("test", VALIDATION, True),
    ],
)
def test_an_evaluation_warns_of_a_part_that_was_trained(runs, capsys, run, options, warned):
    given = [str(runs / run / "model"), "--task", "demo-med", "--max_samples", "2", *options]
    assert main(["eval", *given]) == 0
    assert ("was not trained beside this validation part" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--eval_part", "dev"], "eval_part"),
        (["train", "--validation_share", "1.5"], "Invalid validation_share=1.5."),
        (["train", "--task", "custom", "--label_noise", "0.5"], "Invalid label_noise=0.5"),
        (
            ["eval", "model", "--task", "lm-eval:arc_easy", "--eval_part", "validation"],
            "Invalid eval_part=validation with lm-eval:arc_easy",
        ),
    ],
)
def test_wrong_options_exit_with_2(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
