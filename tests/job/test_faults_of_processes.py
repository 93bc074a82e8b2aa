"""Faults of one of several processes (DDP): all of them do the same, or end with a line each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from checkpoints import write_facts
from molf.checkpoint.store import complete_checkpoints
from process_faults import fill_disk, kill_worker, limit_files, spoil
from resumed_runs import assert_same_runs, logged

STEPS = 4
CHECKPOINTS = ("--save_steps", "2")
LOST = "molf: error: The connection to another process is lost: it has ended."


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command_of(folder):
    """A training of 4 steps with batches of 3; the run is `out`."""

    def make(
        *further,
        base=folder / "base",
        data=folder / "facts.jsonl",
        out,
        steps=STEPS,
        size=3,
    ):
        return [
            *("train", "--task", "fact", "--model", str(base), "--data", str(data)),
            *("--alpha", "4", "--ranks", "4", "--logging_steps", "1", "--max_steps", str(steps)),
            *("--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", "1"),
            *("--max_eval_samples", "2", "--forgetting_data", str(folder / "plain.txt")),
            *("--no-report", "--no-spectra", "--output_dir", str(out), *further),
        ]

    return make


@pytest.fixture
def command(command_of, tmp_path):
    return partial(command_of, out=tmp_path / "out")


def last_lines(ended):
    """The last line of each process, without its rank."""
    lines = [one.errors.splitlines()[-1] for one in ended]
    return [line.replace(f"error: rank {rank}: ", "error: ") for rank, line in enumerate(lines)]


MORE_KINDS = (("fft",), ("molf", "--fsdp", "all"))
METHODS = ["molf", "fft"]  # fft: torch's optimizer


@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_one_process_that_is_not_finite_stops_all(launch, command, tmp_path, method):
    given = command("--method", method)
    ended = launch(given, before={1: partial(spoil, {2: "gradient"})})
    assert [one.code for one in ended] == [1, 1]
    for line in last_lines(ended):
        assert line.startswith(
            "molf: error: Step 2 of 4: Non-finite gradient in model.embed_tokens.weight. "
        )
    assert [entry["step"] for entry in logged(tmp_path / "out")] == [1]


@pytest.mark.parametrize(
    "kind",
    [("molf",), *MORE_KINDS],
    ids=" ".join,
)
def test_steps_of_one_process_that_are_not_finite_are_skipped_by_all(
    launch, command, tmp_path, kind
):
    """Weights and states of the processes would differ otherwise, and the winners with them."""
    given = command("--method", *kind, "--nonfinite", "skip")
    faults = {0: partial(spoil, {3: "loss"}), 1: partial(spoil, {2: "gradient"})}
    main, _ = launch.to_the_end(given, before=faults)
    assert "Step 2 of 4 is skipped: Non-finite gradient in model.embed_tokens" in main.errors
    entries = logged(tmp_path / "out")
    assert [entry.get("skipped_steps") for entry in entries] == [None, 1, 2, 2]
    assert [entry["loss"] is None for entry in entries] == [False, True, True, False]


def test_killed_worker_of_the_data_loader_ends_all(launch, command, tmp_path):
    """The process with the worker has its reason, and the other the lost connection."""
    given = command("--training_args.dataloader_num_workers", "1", "--save_steps", "1")
    main, other = launch(given, before={1: partial(kill_worker, 3)})
    assert (main.code, other.code) == (1, 1)
    assert LOST in main.errors
    assert "--output_dir" in main.errors
    (line,) = other.errors.splitlines()
    assert line.startswith("molf: error: rank 1: DataLoader worker (pid ")
    steps = [step for step, _ in complete_checkpoints(tmp_path / "out" / "checkpoints")]
    assert steps == [1, 2]


def test_process_that_hangs_ends_the_others_after_the_timeout(launch, command):
    # The start of the processes has the same limit.
    given = command("--training_args.ddp_timeout", "15")
    main, other = launch(given, at=(1, ("step", 2, signal.SIGSTOP)), patience=1)
    assert (main.code, other.code) == (
        1,
        -signal.SIGKILL,
    )  # the launcher kills a process that hangs
    assert (
        "molf: error: Another process did not answer in time (--training_args.ddp_" in main.errors
    )


def test_killed_process_of_four_ends_three(launch, command):
    given = command(size=1)
    ended = launch(given, 4, at=(2, ("step", 2)))
    assert [one.code for one in ended] == [1, 1, -signal.SIGKILL, 1]
    for rank in (0, 1, 3):
        assert LOST[12:] in ended[rank].errors.splitlines()[-1]
    assert [len(ended[rank].errors.splitlines()) for rank in (1, 3)] == [1, 1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ((), "the disk is full"),
        (("--fsdp", "all"), "a file of it was cut short"),
    ],
    ids=["ddp", "fsdp"],
)
def test_process_that_cannot_write_its_part_of_a_checkpoint(
    launch, command, tmp_path, kind, reason
):
    """All leave it out, and write the next one."""
    faults = {1: partial(limit_files, 2, 3)}
    main, other = launch.to_the_end(command("--save_steps", "1", *kind), before=faults)
    assert f"warning: The checkpoint of step 2 was not written: {reason}" in main.errors
    assert "That of step 1 is whole. Training continues, and molf tries" in main.errors
    assert other.errors == ""
    steps = [step for step, _ in complete_checkpoints(tmp_path / "out" / "checkpoints")]
    assert steps == [1, 3, 4]


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB: a run of the tiny model takes 0.3."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_full_disk_of_several_processes(launch, command, disk):
    faults = {0: partial(fill_disk, disk, 2, 4)}
    given = command("--save_steps", "1", out=disk / "out")
    main, other = launch.to_the_end(given, before=faults)
    assert "warning: The checkpoint of step 2 was not written: the disk is full." in main.errors
    assert "warning: 2 checkpoints were not written (steps 2, 3)." in main.errors
    assert other.errors == ""
    steps = [step for step, _ in complete_checkpoints(disk / "out" / "checkpoints")]
    assert steps == [1, 4]
    assert [entry["step"] for entry in logged(disk / "out")] == [1, 2, 3, 4]


def test_process_without_the_model_or_with_other_data(launch, command, folder, tmp_path):
    """Machines with disks of their own, as working directories; nothing is written."""
    machines = [tmp_path / "machine0", tmp_path / "machine1"]
    for machine in machines:
        machine.mkdir()
        shutil.copytree(folder / "base", machine / "base")
        shutil.copy(folder / "facts.jsonl", machine)
    before = {rank: partial(os.chdir, machine) for rank, machine in enumerate(machines)}
    given = command(base="base", data="facts.jsonl")
    write_facts(machines[1] / "facts.jsonl", 10)
    ended = launch(given, before=before)
    for line in last_lines(ended):
        assert line.startswith("molf: error: The examples of rank 1 differ from those of rank 0")
    assert [one.code for one in ended] == [2, 2]
    os.truncate(machines[1] / "base" / "model.safetensors", 10_000)
    main, other = launch(given, before=before)
    assert (main.code, other.code) == (1, 2)
    assert f"error: rank 1: model {machines[1] / 'base'}: model.safetensors" in other.errors
    assert LOST in main.errors.splitlines()[-1]
    (machines[1] / "facts.jsonl").unlink()
    main, other = launch(given, before=before, patience=1)
    assert other.code == 2
    assert "error: rank 1: data: file not found: there is no file or folder facts" in other.errors
    assert main.code not in (None, 0)  # ended by the launcher
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def whole(launch, command_of, folder):
    """A run of two processes that was never stopped."""
    path = folder / "whole"
    launch.to_the_end(command_of(*CHECKPOINTS, out=path, steps=8))
    return path


def test_truncated_checkpoint_of_several_processes(launch, command_of, tmp_path, whole):
    path = tmp_path / "out"
    given = command_of(*CHECKPOINTS, "--resume", out=path, steps=8)
    launch(given, at=(0, ("step", 7)), patience=10)
    newest = path / "checkpoints" / "checkpoint-6"
    (part,) = (newest / "tensors").glob("__1_*")
    os.truncate(part, part.stat().st_size - 100)
    main, other = launch.to_the_end(given)
    assert f"The checkpoint {newest} is damaged and is not used: " in main.errors
    assert f"Resuming {path} from checkpoint-4." in main.errors
    assert other.errors == ""
    assert_same_runs(whole, path)


def test_torchrun_restarts_and_the_result_is_the_same(command_of, tmp_path, whole):
    path = tmp_path / "out"
    given = command_of(*CHECKPOINTS, "--resume", out=path, steps=8)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    torchrun += ["--max-restarts", "1", "--monitor-interval", "0.2", "--standalone"]
    script = Path(__file__).parents[1] / "helpers" / "killed_once.py"
    ended = subprocess.run([*torchrun, str(script), "6", *given], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert f"Resuming {path} from checkpoint-4." in ended.stderr
    assert_same_runs(whole, path)
