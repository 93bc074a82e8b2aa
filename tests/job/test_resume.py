"""A run that was killed and resumed ends in the bits of one that was left alone."""

from __future__ import annotations

import signal

import pytest

from molf.checkpoint.store import complete_checkpoints
from resumed_runs import METHODS, STEPS, Runs, assert_same_runs
from slow_cases import slow_after

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed:UserWarning")

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def runs(workplace, base, facts):
    plain = workplace / "plain.txt"
    plain.write_text("Anna walks to the river and sits down by the water. " * 10)
    return Runs(workplace / "errors.txt", base, facts, plain)


@pytest.fixture(scope="module")
def alone(runs, workplace):
    """A run of molf that is left alone."""
    path = workplace / "alone"
    runs.to_the_end(runs.command(path))
    return path


@pytest.mark.slow
def test_run_is_killed_in_each_stage(runs, alone, workplace):
    """Each life continues the one before, and only the stage that was killed is repeated."""
    path = workplace / "killed"
    resume = ["train", "--output_dir", str(path), "--resume"]
    assert runs(runs.command(path), "evaluation")[0] == KILLED
    # The same command as a job script repeats it.
    code, errors = runs([*runs.command(path), "--resume"], "step", 2)
    assert code == KILLED
    assert f"{path} has no complete checkpoint: the training starts from the beginning" in errors
    code, errors = runs(resume, "checkpoint", 3)
    assert code == KILLED
    assert "Evaluating" not in errors  # the base is measured
    assert [step for step, _ in complete_checkpoints(path / "checkpoints")] == [2, 4]
    code, errors = runs(resume, "step", 1, signal.SIGINT)
    assert code == 3
    assert f"Resuming {path} from checkpoint-4." in errors
    assert errors.splitlines()[-1] == (
        f"molf: stopped: SIGINT after step 5 of {STEPS}. Continue with: molf train "
        f"--output_dir {path} --resume"
    )
    for moment, step in (("saving", 5), ("saved", STEPS)):
        code, errors = runs(resume, moment)
        assert code == KILLED
        assert f"Resuming {path} from checkpoint-{step}." in errors
    code, errors = runs(resume, "evaluation")
    assert code == KILLED
    errors = runs.to_the_end(resume)
    assert f"Resuming {path}: the model is trained and saved." in errors
    assert "Training" not in errors
    assert_same_runs(alone, path)
    assert runs.to_the_end(resume).startswith(
        f"molf: note: {path} is complete: there is nothing to resume."
    )


@pytest.mark.parametrize(
    "name",
    slow_after(0, METHODS),
)
def test_killed_run_ends_in_the_same_bits(runs, workplace, name):
    left, path = workplace / f"left {name}", workplace / f"killed {name}"
    runs.to_the_end(runs.command(left, *METHODS[name]))
    assert runs(runs.command(path, *METHODS[name]), "step", 6)[0] == KILLED
    errors = runs.to_the_end(["train", "--output_dir", str(path), "--resume"])
    assert f"Resuming {path} from checkpoint-4." in errors
    assert_same_runs(left, path)


@pytest.mark.slow
def test_hybrid_goes_on_with_the_assignment_that_it_began_with(runs, workplace, assignment):
    given = workplace / "given.yaml"
    given.write_text(assignment.read_text())
    options = ["--method", "hybrid", "--assignment", str(given)]
    left, path = workplace / "left by file", workplace / "killed by file"
    runs.to_the_end(runs.command(left, *options))
    assert runs(runs.command(path, *options), "step", 6)[0] == KILLED
    given.write_text("full: [mlp]\ndefault: frozen\n")
    errors = runs.to_the_end(["train", "--output_dir", str(path), "--resume"])
    assert f"Resuming {path} from checkpoint-4." in errors
    assert_same_runs(left, path)
    name = "assignment.yaml"
    assert (left / name).read_text() == (path / name).read_text()


@pytest.mark.slow
def test_checkpoints_in_the_background_are_the_same(runs, alone, workplace):
    path = workplace / "background"
    given = runs.command(path, "--async_save", "--save_total_limit", "2")
    code, errors = runs(given, "step", 6, signal.SIGTERM)
    assert code == 3
    assert f"SIGTERM after step 6 of {STEPS}. Continue with" in errors
    runs.to_the_end(["train", "--output_dir", str(path), "--resume"])
    steps = [step for step, _ in complete_checkpoints(path / "checkpoints")]
    assert steps == [STEPS - 2, STEPS]
    assert_same_runs(alone, path)
