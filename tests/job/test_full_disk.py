"""Disks that are full, read-only or gone: known beforehand, and the trained weights are kept."""

import json
import re
import resource
import shutil
import subprocess

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from molf.checkpoint import writer
from molf.cli import main
from molf.disk import room
from molf.job import records, run_steps, trained_model, training
from molf.job.model import elsewhere
from molf.job.model import saving as model_saving
from process_faults import fill
from recorded import logits_of
from slow_cases import slow_after


def mounted(path, size):
    """A small file system in memory; None where that is not allowed."""
    path.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    return path


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB: a run of the tiny model takes 0.3."""
    path = mounted(tmp_path / "disk", "8m")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def tiny_disk(tmp_path):
    path = mounted(tmp_path / "tiny", "100k")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


class Fill(TrainerCallback):
    """Fills a disk at the end of a step, and makes room again at that of another."""

    def __init__(self, disk, first, last):
        self.disk, self.first, self.last = disk, first, last

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            fill(self.disk)
        if state.global_step == self.last:
            (self.disk / "full").unlink()


@pytest.fixture
def during(monkeypatch):
    """Have a callback take part in the training."""
    run = run_steps.run_training

    def take(callback):
        monkeypatch.setattr(
            run_steps,
            "run_training",
            lambda *given, **named: run(*given, **named, callbacks=[callback]),
        )

    return take


@pytest.fixture
def trained(monkeypatch):
    """What the trained model computes, and what happens when the training is over."""
    found = {}
    merge = training.merge_trained

    def after(happens):
        save_adapter, save_model = training.save_adapter, trained_model.save_model

        def saving_adapter(save, model, *given):
            found["logits"] = logits_of(model)
            if "happened" not in found:
                found["happened"] = happens()
            return save_adapter(save, model, *given)

        def saving_model(model, *given, **named):
            found["logits"] = logits_of(model)
            if "happened" not in found:
                found["happened"] = happens()
            return save_model(model, *given, **named)

        monkeypatch.setattr(training, "save_adapter", saving_adapter)
        monkeypatch.setattr(trained_model, "save_model", saving_model)
        return found

    assert merge is training.merge_trained
    return after


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "fallback"
    path.mkdir()
    return path


def last_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_disk_that_is_too_small_is_refused_at_opening(options, tiny_disk, capsys):
    assert main([*options, "--output_dir", str(tiny_disk / "run")]) == 2
    error = last_line(capsys)
    assert re.search(r"the run needs about 0\.\d MB there \(model 0\.\d MB, routing \d kB, ", error)
    assert "and 0.1 MB are free. Make room, or give another --output_dir." in error
    assert list(tiny_disk.iterdir()) == []


def test_temporary_folder_that_is_full_is_refused_at_opening(
    options, tiny_disk, tmp_path, monkeypatch, capsys
):
    fill(tiny_disk)
    monkeypatch.setattr("tempfile.tempdir", str(tiny_disk))
    assert main([*options, "--output_dir", str(tmp_path / "run")]) == 2
    assert "The temporary folder cannot be written: " in last_line(capsys)


def test_limit_of_a_file_is_refused_at_opening(options, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert main([*options, "--output_dir", str(tmp_path / "run")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "this process may write files of 0.1 MB. Raise the limit" in last_line(capsys)


@pytest.mark.parametrize("known", [True, False], ids=["known", "met while writing"])
@pytest.mark.parametrize("halves", [True, False], ids=["with halves", "alone"])
def test_model_is_kept(options, disk, place, trained, monkeypatch, capsys, known, halves):
    if not known:  # as of a quota, which no system tells of
        monkeypatch.setattr(model_saving, "require_room", lambda *given: None)
    found = trained(lambda: fill(disk))
    given = [*options, "--output_dir", str(disk / "run"), "--fallback_dir", str(place)]
    if halves:
        given += ["--save_dtype", "bfloat16", "--keep_low_halves"]
    assert main(given) == 1
    error = last_line(capsys)
    (kept,) = place.iterdir()
    assert kept.name.startswith("molf-run-")
    assert f"the disk is full: saving the model to {disk / 'run' / 'model'} needs about" in error
    assert (
        f"The trained model was saved in {kept / 'model'} instead, and verified: load it" in error
    )
    assert not (disk / "run" / "model").exists()
    if not halves:
        model = AutoModelForCausalLM.from_pretrained(kept / "model")
        assert torch.equal(logits_of(model), found["logits"])
    # It can be exported as the run could be.
    (disk / "full").unlink()
    assert main(["export", str(kept), "--dtype", "float32"]) == 0
    model = AutoModelForCausalLM.from_pretrained(kept / "model-float32")
    assert torch.equal(logits_of(model), found["logits"])
    # Brought back, it is the run's.
    shutil.copytree(kept / "model", disk / "run" / "model")
    assert main(["export", str(disk / "run"), "--output_dir", str(place / "again")]) == 0


@pytest.mark.parametrize("method", ["lora", "molf-e", "pissa", "adalora"])
def test_adapter_is_kept(options, base, disk, place, trained, monkeypatch, capsys, method):
    import peft

    monkeypatch.setattr(model_saving, "require_room", lambda *given: None)
    found = trained(lambda: fill(disk))
    given = [*options, "--method", method, "--output_dir", str(disk / "run")]
    if method == "adalora":
        given[given.index("--max_steps") + 1] = "12"
    assert main([*given, "--fallback_dir", str(place)]) == 1
    error = last_line(capsys)
    (kept,) = place.iterdir()
    assert "the disk is full: saving the adapter" in error
    assert (
        "The trained adapter was saved elsewhere, and verified: peft.PeftModel.from_pretrained("
        in error
    )
    assert f"'{kept / 'adapter'}') adds it to the base {base}." in error
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), kept / "adapter"
    )
    torch.testing.assert_close(logits_of(model), found["logits"], rtol=1e-4, atol=1e-4)


def test_kept_adapter_can_be_exported(options, disk, place, trained, capsys):
    trained(lambda: fill(disk))
    given = [*options, "--method", "lora", "--output_dir", str(disk / "run")]
    assert main([*given, "--fallback_dir", str(place)]) == 1
    (kept,) = place.iterdir()
    assert main(["export", str(kept), "--what", "adapter", "--dtype", "bfloat16"]) == 0
    assert main(["export", str(kept)]) == 2
    assert "has no model/: the run has not ended, or failed before saving it. It has" in last_line(
        capsys
    )


def test_adapter_that_is_saved_is_enough(options, disk, place, monkeypatch, capsys):
    merge = training.merge_trained

    def merging(*given):
        fill(disk)
        return merge(*given)

    monkeypatch.setattr(training, "merge_trained", merging)
    given = [*options, "--method", "lora", "--output_dir", str(disk / "run")]
    assert main([*given, "--fallback_dir", str(place)]) == 1
    error = last_line(capsys)
    assert "saving the model" in error
    assert "The adapter, which holds the whole training, is saved: " in error
    assert f"'{disk / 'run' / 'adapter'}'" in error
    assert list(place.iterdir()) == []


def test_first_place_that_has_room_takes_it(
    options, disk, tiny_disk, tmp_path, trained, monkeypatch, capsys
):
    """The chosen one is too small, the next cannot be made, the one after that takes it."""
    (tmp_path / "home").mkdir()
    usual = [tiny_disk, tmp_path / "none", tmp_path / "home"]
    monkeypatch.setattr(elsewhere, "places", lambda given: [*list(given)[:1], *usual])
    trained(lambda: fill(disk))
    given = ["--output_dir", str(disk / "run"), "--fallback_dir", str(tiny_disk)]
    assert main([*options, *given]) == 1
    (kept,) = (tmp_path / "home").iterdir()
    assert str(kept / "model") in last_line(capsys)
    assert list(tiny_disk.iterdir()) == []


def test_nothing_takes_it(options, disk, trained, monkeypatch, capsys):
    monkeypatch.setattr(elsewhere, "places", lambda given: [])
    monkeypatch.setattr(model_saving, "places", lambda given: [disk])
    trained(lambda: fill(disk))
    given = [*options, "--save_steps", "2", "--output_dir", str(disk / "run")]
    assert main(given) == 1
    error = last_line(capsys)
    assert (
        f"The trained model is lost: it could not be saved in any other directory ({disk})."
        in error
    )
    assert f"The latest checkpoint is {disk}/run/checkpoints/checkpoint-3." in error


@pytest.mark.parametrize("event", ["read-only", "deleted"])
def test_directory_that_cannot_be_written_any_more(options, disk, place, trained, capsys, event):
    def happens():
        if event == "deleted":
            shutil.rmtree(disk / "run")
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    trained(happens)
    given = [*options, "--output_dir", str(disk / "run"), "--fallback_dir", str(place)]
    assert main(given) == 1
    error = last_line(capsys)
    assert "the model could not be saved to" in error
    assert ("Read-only" if event == "read-only" else "No such file") in error
    # Nor could the traceback be; beside a deleted directory there is room for it.
    assert ("molf-error-" if event == "read-only" else "run.recovered-1/error.log") in error
    (kept,) = place.iterdir()
    assert f"in {kept / 'model'}" in error
    AutoModelForCausalLM.from_pretrained(kept / "model")


def test_tokenizer_that_cannot_be_saved_does_not_cost_the_weights(
    options, place, tmp_path, trained, monkeypatch, capsys
):
    def fail(*given, **named):
        raise TypeError("it is not serialisable")

    found = trained(lambda: monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail))
    given = [*options, "--output_dir", str(tmp_path / "run"), "--fallback_dir", str(place)]
    assert main(given) == 1
    assert "could not be saved to" in last_line(capsys)
    (kept,) = place.iterdir()
    model = AutoModelForCausalLM.from_pretrained(kept / "model")
    assert torch.equal(logits_of(model), found["logits"])


def test_numbers_that_do_not_fit_are_kept_in_float32(options, place, tmp_path, monkeypatch, capsys):
    save = trained_model.save_model

    def saving(model, *given, **named):
        model.model.norm.weight.data[0] = 1e5
        return save(model, *given, **named)

    monkeypatch.setattr(trained_model, "save_model", saving)
    given = [*options, "--save_dtype", "float16", "--output_dir", str(tmp_path / "run")]
    assert main([*given, "--fallback_dir", str(place)]) == 1
    (kept,) = place.iterdir()
    error = last_line(capsys)
    assert "model.norm.weight has numbers that are not finite, or do not fit torch.float16" in error
    assert f"was saved in {kept / 'model'} instead, and verified" in error
    model = AutoModelForCausalLM.from_pretrained(kept / "model", dtype=torch.float32)
    assert model.model.norm.weight[0] == 1e5


def test_copy_that_differs_is_not_taken(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(4.0), "b": torch.tensor(float("nan"))}
    save_file(tensors, tmp_path / "model.safetensors")
    elsewhere.check_written(tmp_path, tensors)
    with pytest.raises(OSError, match="a is not as it was written"):
        elsewhere.check_written(tmp_path, {"a": torch.arange(4.0) + 1})
    with pytest.raises(OSError, match="lacks 1 tensors, the first is c"):
        elsewhere.check_written(tmp_path, {"c": torch.zeros(1)})


def test_checkpoint_that_cannot_be_written(options, disk, during, monkeypatch, capsys):
    """Training goes on; later checkpoints and the model are written when there is room."""
    monkeypatch.setattr("molf.job.trainer.checkpoints.free_bytes", lambda path: None)
    during(Fill(disk, 0, 2))
    given = [*options, "--save_steps", "1", "--output_dir", str(disk / "run")]
    assert main(given) == 0
    error = capsys.readouterr().err
    assert (
        "warning: The checkpoint of step 1 was not written: the disk is full. There is none before "
        "it. Training continues, and molf tries to write the next checkpoint." in error
    )
    assert "warning: 2 checkpoints were not written (steps 1, 2)." in error
    written = [path.name for path in (disk / "run" / "checkpoints").glob("checkpoint-*")]
    assert written == ["checkpoint-3"]
    assert (disk / "run" / "eval.json").is_file()


def test_checkpoint_leaves_room_for_the_model(options, disk, during, capsys):
    class AlmostFull(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:  # the model takes 0.2, a checkpoint 1.0, and 1 is left over
                free = shutil.disk_usage(disk).free
                (disk / "full").write_bytes(bytes(free - 1_500_000))

    during(AlmostFull())
    given = [*options, "--save_steps", "1", "--output_dir", str(disk / "run")]
    assert main(given) == 0
    error = capsys.readouterr().err
    words = (
        r"step 2 was not written: it takes about 1\.0 MB, the trained model will take 0\.\d MB, "
    )
    words += r"and 1\.5 MB are free\. That of step 1 is whole\. Training continues"
    assert re.search(words, error)
    names = [path.name for path in (disk / "run" / "checkpoints").glob("checkpoint-*")]
    assert names == ["checkpoint-1"]
    assert (disk / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    "error",
    slow_after(
        2,
        [
            OSError(122, "Disk quota exceeded"),
            SafetensorError("Error while serializing: I/O error: No space left on device"),
            PermissionError(13, "Permission denied"),
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            Exception("Read-only file system (os error 30)"),
        ],
    ),
    ids=str,
)
@pytest.mark.parametrize("in_background", [False, True], ids=["waiting", "background"])
def test_any_error_of_writing_leaves_the_training_on(
    options, tmp_path, monkeypatch, capsys, error, in_background
):
    """Of the second checkpoint alone; nothing of it is left."""
    write, calls = writer.write_tensors, []

    def failing(directory, *given):
        write(directory, *given)
        calls.append(directory)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(writer, "write_tensors", failing)
    given = [*options, "--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert main([*given, *(["--async_save"] if in_background else [])]) == 0
    printed = capsys.readouterr().err
    assert "warning: The checkpoint of step 2 was not written: " in printed
    assert " That of step 1 is whole. Training continues" in printed
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "checkpoint-1",
        "checkpoint-3",
    ]


def test_run_may_stop_at_a_checkpoint_that_cannot_be_written(
    options, tmp_path, monkeypatch, capsys
):
    def fail(*given):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(writer, "write_tensors", fail)
    given = [*options, "--save_steps", "2", "--on_save_error", "stop"]
    assert main([*given, "--output_dir", str(tmp_path / "run")]) == 1
    error = last_line(capsys)
    assert "The checkpoint of step 2 was not written: [Errno 30] Read-only file system. " in error
    assert "There is none before it. (on_save_error=stop)" in error


def test_error_in_what_a_checkpoint_holds_is_not_swallowed(options, tmp_path, monkeypatch, capsys):
    def fail(*given):
        raise ValueError("a fault")

    monkeypatch.setattr("molf.job.trainer.trainer.training_state", fail)
    given = [*options, "--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert main(given) == 1
    assert "a fault" in last_line(capsys)


def test_logs_wait_for_room(options, disk, during, monkeypatch, capsys):
    monkeypatch.setattr(
        "molf.job.record.routing_log.time.monotonic", iter(range(0, 10**6, 100)).__next__
    )
    during(Fill(disk, 0, 2))
    assert main([*options, "--output_dir", str(disk / "run")]) == 0
    error = capsys.readouterr().err
    assert f"warning: {disk}/run/metrics.jsonl cannot be written: No space left" in error
    assert "warning: The routing cannot be written to" in error
    lines = (disk / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    from molf.job.record.routing_log import iter_steps

    assert [step["step"] for step in iter_steps(disk / "run")] == [0, 1, 2]


def test_logs_that_are_never_written_do_not_cost_the_model(options, disk, place, during, capsys):
    during(Fill(disk, 1, None))
    given = [*options, "--output_dir", str(disk / "run"), "--fallback_dir", str(place)]
    assert main(given) == 1
    lines = capsys.readouterr().err.splitlines()
    assert any("The routing of steps 1 to 3 was not written" in line for line in lines)
    (kept,) = place.iterdir()
    assert f"in {kept / 'model'}" in lines[-1]


def test_failure_after_saving_says_where_the_model_is(options, tmp_path, monkeypatch, capsys):
    write = records.write_jsonl

    def fail(path, value):
        if path.name == "predictions.jsonl":
            raise OSError(28, "No space left on device")
        write(path, value)

    monkeypatch.setattr(records, "write_jsonl", fail)
    assert main([*options, "--output_dir", str(tmp_path / "run")]) == 1
    assert f"The trained model is whole in {tmp_path}/run/model." in last_line(capsys)


def test_fallback_is_checked_at_once(options, tmp_path, capsys):
    given = [*options, "--output_dir", str(tmp_path / "run"), "--fallback_dir"]
    assert main([*given, str(tmp_path / "none")]) == 2
    assert "is not a directory. Give one that exists." in last_line(capsys)
    assert main([*given, "/proc/sys"]) == 2
    assert "fallback_dir /proc/sys cannot be written" in last_line(capsys)


def test_full_disk_is_known_by_any_library_s_words():
    assert room.is_disk_full(OSError(28, "x"))
    assert room.is_disk_full(OSError(122, "Disk quota exceeded"))
    assert room.is_disk_full(Exception("No space left on device (os error 28)"))  # tokenizers
    assert not room.is_disk_full(OSError(30, "Read-only file system"))


def test_export_to_a_full_disk(molf_run, disk, monkeypatch, capsys):
    fill(disk)
    assert main(["export", str(molf_run.path), "--output_dir", str(disk / "x")]) == 2
    assert "0 bytes are free" in last_line(capsys)
    monkeypatch.setattr("molf.job.model.export_place.check_room", lambda *given, **named: None)
    monkeypatch.setattr(model_saving, "require_room", lambda *given: None)
    assert main(["export", str(molf_run.path), "--output_dir", str(disk / "x")]) == 1
    assert "the disk is full: saving the x to" in last_line(capsys)
    assert [path.name for path in disk.iterdir()] == ["full"]


def test_evaluation_that_cannot_be_written_is_printed(molf_run, facts, disk, monkeypatch, capsys):
    from molf.cli import evaluation

    monkeypatch.setattr(evaluation, "_check_output", lambda options: None)
    fill(disk)
    given = ["eval", "--task", "fact", "--data", str(facts), "--output_dir", str(disk / "e")]
    given += ["--predictions", str(molf_run.path / "predictions.jsonl")]
    assert main(given) == 1
    printed = capsys.readouterr()
    assert "acc_new" in printed.out
    assert "could not be written" in printed.err
    assert "The metrics are those printed above." in printed.err


def test_traceback_that_cannot_be_written_does_not_hide_the_error(
    molf_run, tiny_disk, monkeypatch, capsys
):
    def fail(run):
        raise ZeroDivisionError("a fault")

    fill(tiny_disk)
    monkeypatch.setattr("tempfile.tempdir", str(tiny_disk))
    monkeypatch.setattr("molf.job.record.routing_shares.routing_shares", fail)
    assert main(["routing", str(molf_run.path)]) == 1
    error = last_line(capsys)
    assert "ZeroDivisionError: a fault (its traceback could not be written: No space left" in error
