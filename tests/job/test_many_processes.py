"""The same `molf train` in several processes (DDP): one result, one writer, resume."""

from __future__ import annotations

import signal

import pytest
import yaml

from molf.checkpoint.store import complete_checkpoints
from near_runs import STEPS, assert_near_runs, entries
from resumed_runs import assert_same_runs, row_of

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def two(launch, command, folder):
    """A run of two processes, and what they printed."""
    path = folder / "two"
    return path, launch.to_the_end(command(path, 5, 1))


def test_two_processes_train_as_one(one, two):
    """12 examples do not divide into steps of 2 x 5: each is taken once per epoch."""
    path, (main, other) = two
    assert_near_runs(one, path)
    assert entries(path)[-1]["step"] == STEPS
    tokens = [row_of(run)["tokens"] for run in (one, path)]
    assert tokens[0] == tokens[1]
    assert yaml.safe_load((path / "config.yaml").read_text())["run"]["processes"] == 2
    assert "of 10 examples (5 x 1 x 2 processes)" in main.errors
    assert str(path) in main.output
    assert (other.output, other.errors) == ("", "")


@pytest.mark.slow
def test_killed_process_ends_the_others_and_the_run_is_resumed(launch, command, folder, two):
    """As `torchrun --max-restarts` does: the same command again."""
    path = folder / "killed"
    given = [*command(path, 5, 1), "--resume"]
    main, other = launch(given, at=(1, ("step", 6)))
    assert other.code == KILLED
    assert main.code == 1
    assert main.errors.splitlines()[-1].startswith(
        "molf: error: The connection to another process is lost: it has ended."
    )
    main, other = launch.to_the_end(given)
    assert f"Resuming {path} from checkpoint-4." in main.errors
    assert other.errors == ""
    assert_same_runs(two[0], path)


@pytest.mark.slow
def test_signal_to_one_process_stops_all_and_another_number_continues(launch, command, folder, one):
    path = folder / "stopped"
    given = command(path, 5, 1)
    main, other = launch(given, at=(1, ("step", 3, signal.SIGTERM)))
    assert (main.code, other.code) == (3, 3)
    assert "molf: stopped: SIGTERM after step 3 of 8. Continue with: " in main.errors
    assert other.errors == ""
    assert [step for step, _ in complete_checkpoints(path / "checkpoints")] == [2, 3]
    # One process takes the examples of both: 2 forward passes per step.
    launch.to_the_end(["train", "--output_dir", str(path), "--resume"], 1)
    record = yaml.safe_load((path / "config.yaml").read_text())
    assert record["gradient_accumulation_steps"] == 2
    assert "processes" not in record["run"]
    assert_near_runs(one, path)


@pytest.mark.slow
def test_refusals_in_one_line_each(launch, command, folder, two):
    path, _ = two
    for given, said in (
        (command(folder / "new", 5, 1, "--optimizer_in_backward"), "processes=2"),
        (command(folder / "new", 5, 1, "--dry_run"), "dry_run runs in one process, and 2 were"),
        (["eval", str(folder / "base"), "--task", "demo-fact"], "molf eval runs in one process"),
        (command(path, 5, 1), f"output_dir {path} exists"),
    ):
        main, other = launch(given)
        assert (main.code, other.code) == (2, 2)
        assert said in main.errors
        assert len(main.errors.splitlines()) == 1
        assert other.errors == main.errors.replace("error: ", "error: rank 1: ")
    assert not (folder / "new").exists()
