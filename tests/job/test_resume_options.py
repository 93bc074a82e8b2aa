"""What a resumed run may be given, what it refuses, and what it does about damage."""

from __future__ import annotations

import csv
import http.server
import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
import yaml

from molf.cli import main
from molf.core.optimizer import MoLFAdamW
from molf.job.record.resumed_run import is_finished, split_again
from molf.job.record.routing_log import read_routing

STEPS = 4


@pytest.fixture(scope="module")
def unfinished(options, workplace):
    """A run that failed in its fourth step; its checkpoints are those of steps 1 to 3."""
    path = workplace / "unfinished"
    step, calls = MoLFAdamW.step, []

    def failing(self, closure=None):
        calls.append(self)
        if len(calls) == STEPS:
            raise RuntimeError("a fault")
        return step(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoLFAdamW, "step", failing)
        assert main(command(options, path)) == 1
    return path


def command(options, path, *further):
    given = [*options, "--save_steps", "1", "--output_dir", str(path), *further]
    given[given.index("--max_steps") + 1] = str(STEPS)
    return given


@pytest.fixture
def run(unfinished, tmp_path):
    """A copy of the unfinished run, elsewhere: a run may be moved."""
    return shutil.copytree(unfinished, tmp_path / "run")


def resume(path, *further):
    return main(["train", "--output_dir", str(path), "--resume", *further])


def steps_in(path):
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_failure_shows_how_to_continue(options, workplace, tmp_path, monkeypatch, capsys):
    def fail(self, closure=None):
        raise RuntimeError("a fault")

    monkeypatch.setattr(MoLFAdamW, "step", fail)
    path = tmp_path / "run"
    assert main(command(options, path)) == 1
    assert "Continue with" not in capsys.readouterr().err  # there is no checkpoint


def test_a_training_that_a_library_ends_is_not_complete(options, tmp_path, monkeypatch, capsys):
    from molf.job.trainer.step_guard import StepGuard

    def ending(self, args, state, control, **given):
        control.should_training_stop = state.global_step == 2

    monkeypatch.setattr(StepGuard, "on_step_end", ending)
    path = tmp_path / "run"
    assert main(command(options, path)) == 1
    assert f"Training was ended after step 2 of {STEPS} by a callback" in capsys.readouterr().err
    monkeypatch.undo()
    assert resume(path) == 0
    assert steps_in(path) == [1, 2, 3, 4]


def test_new_run_is_named(options, tmp_path, capsys):
    """A job script begins with `--resume`; with a wrong name it would train anew unnoticed."""
    given = command(options, tmp_path / "new", "--resume")
    given[given.index("--max_steps") + 1] = "1"
    assert main(given) == 0
    assert f"There is no run in {tmp_path / 'new'} to resume" in capsys.readouterr().err


def test_run_continues_with_its_own_options(run, capsys):
    assert resume(run) == 0
    printed = capsys.readouterr()
    assert f"Resuming {run} from checkpoint-3." in printed.err
    assert steps_in(run) == [1, 2, 3, 4]
    assert read_routing(run)["step"].unique().to_pylist() == [0, 1, 2, 3]
    assert not (run / "error.log").exists()
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"checkpoint-{step}" for step in range(1, 5)]
    assert resume(run) == 0
    assert (
        capsys.readouterr().err == f"molf: note: {run} is complete: there is nothing to resume.\n"
    )


def test_seconds_are_summed_over_the_parts(run):
    from molf.checkpoint.store import read_values

    clock = read_values(run / "checkpoints" / "checkpoint-3")["trainer"]["clock"]
    stages = json.loads((run / "checkpoints" / "stages.json").read_text())
    assert resume(run) == 0
    with (run.parent / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["training_seconds"]) > round(clock["seconds"], 3)
    assert float(row["preparation_seconds"]) > round(clock["preparation"], 3) > 0
    assert float(row["evaluation_seconds"]) > round(stages["before"]["seconds"], 3) > 0


def test_environments_of_all_parts_are_kept(run, capsys):
    environment = json.loads((run / "environment.json").read_text())
    environment["packages"]["torch"] = "2.0.0"
    (run / "environment.json").write_text(json.dumps(environment))
    assert resume(run) == 0
    error = capsys.readouterr().err
    assert f"Changed since the run was started: torch 2.0.0 to {torch.__version__}. The" in error
    found = json.loads((run / "environment.json").read_text())
    assert found["earlier_parts"] == [environment]
    assert found["packages"]["torch"] == torch.__version__


def test_data_and_plan_take_the_options_of_the_run(run, base, facts, capsys):
    assert main(["data", "--output_dir", str(run), "--resume"]) == 0
    assert capsys.readouterr().out.startswith(f"fact: {facts}\n")
    assert main(["plan", "--output_dir", str(run), "--resume", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["planned"]["ranks"]) == (str(base), [4])


def test_whole_command_may_be_repeated(options, run, capsys):
    assert main(command(options, run, "--resume")) == 0
    assert "from checkpoint-3" in capsys.readouterr().err


def test_free_options_may_change(run, capsys):
    further = ["--save_steps", "3", "--save_total_limit", "1", "--logging_steps", "2"]
    further += ["--async_save", "--gradient_checkpointing", "--report_to", "none"]
    further += ["--attn_implementation", "eager"]
    assert resume(run, *further) == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert steps_in(run) == [1, 2, 3, 4]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["logging_steps"], config["resume"]) == (2, False)


def test_batch_may_be_split_otherwise(run):
    assert (
        resume(run, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2") == 0
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--ranks", "8"], ["ranks=8 (the run has 4)"]),
        (["--score", "pfn"], ["score=pfn (the run has epd)"]),
        (["--method", "fft"], ["method=fft (the run has molf)"]),
        (["--weight_decay", "0.2"], ["weight_decay=0.2 (the run has 0.1)"]),
        (["--seed", "43", "--max_steps", "5"], ["max_steps=5 (the run has 4), seed=43"]),
        (["--per_device_train_batch_size", "4"], ["per_device_train_batch_size=4 (the run has 8)"]),
        (["--training_args.neftune_noise_alpha", "5"], ["training_args.neftune_noise_alpha=5"]),
        (["--dtype", "bfloat16"], ["dtype=bfloat16 (the run has float32)"]),
        (["--overwrite"], ["Invalid resume with overwrite"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_other_training_is_refused(run, given, words, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert resume(run, *given) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after warnings of options without effect
    assert all(word in line for word in words), line
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_other_data_is_refused(run, facts, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    lines = facts.read_text().splitlines(keepends=True)
    other.write_text("".join(lines[::-1]))
    assert resume(run, "--data", str(other)) == 2
    assert f"data={other} (the run has {facts})" in capsys.readouterr().err


def test_changed_examples_are_refused(options, facts, tmp_path, unfinished, capsys):
    """Without a record of the files, as with a data set of the Hub, their tokens show it."""
    own = tmp_path / "facts.jsonl"
    shutil.copy(facts, own)
    run = shutil.copytree(unfinished, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["run"]["data"]["files"]
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "data": str(own)}))
    own.write_text("".join(own.read_text().splitlines(keepends=True)[::-1]))
    assert resume(run) == 2
    assert "its examples have changed since it was started" in capsys.readouterr().err
    assert is_finished(run) is False


def test_changed_frozen_weight_is_refused(options, base, tmp_path, capsys, monkeypatch):
    """Without a record of the base's contents, as with one of the Hub, checksums show it."""
    from transformers import AutoModelForCausalLM

    own = shutil.copytree(base, tmp_path / "base")
    given = command(options, tmp_path / "run", "--method", "lora")
    given[given.index("--model") + 1] = str(own)

    def failing(*saved, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("molf.job.trained_model.save_model", failing)
    assert main(given) == 130
    assert "Continue with: molf train --output_dir" in capsys.readouterr().err
    monkeypatch.undo()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    del config["run"]["model"]["contents"]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    model = AutoModelForCausalLM.from_pretrained(own)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(own)
    assert resume(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "1 of " in error
    assert "layers.1.mlp.up_proj" in error
    assert "The base model has changed." in error


@pytest.mark.parametrize("changed", ["data", "forgetting_data", "model"])
def test_changed_content_is_refused(changed, options, facts, base, tmp_path, monkeypatch, capsys):
    """The base was measured before, and the checkpoint of `molf` has no weight of the base."""
    run, place = tmp_path / "run", tmp_path / f"{changed}.jsonl"
    file = shutil.copytree(base, place) / "model.safetensors" if changed == "model" else place
    content = (base / "model.safetensors" if changed == "model" else facts).read_bytes()
    file.write_bytes(content)
    given = command(options, run)
    if changed == "forgetting_data":
        given += ["--forgetting_data", str(place)]
    else:
        given[given.index(f"--{changed}") + 1] = str(place)

    def failing(*saved, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("molf.job.trained_model.save_model", failing)
        assert main(given) == 130
    before = (run / "config.yaml").read_bytes()
    file.write_bytes(content[:-1] + (b"\x01" if changed == "model" else b""))
    capsys.readouterr()
    assert resume(run) == 2
    assert f"the content of {changed} has changed since it was started" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before
    file.write_bytes(content)
    assert resume(run) == 0


def damage(checkpoint):
    """Cut the end of a file."""
    file = checkpoint / "tensors" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def test_damaged_checkpoint_is_reported_and_the_one_before_is_taken(run, capsys):
    damage(run / "checkpoints" / "checkpoint-3")
    assert resume(run) == 0
    error = capsys.readouterr().err
    assert f"warning: The checkpoint {run}/checkpoints/checkpoint-3 is damaged and is not" in error
    assert f"Resuming {run} from checkpoint-2." in error
    assert steps_in(run) == [1, 2, 3, 4]


def test_all_checkpoints_damaged(run, capsys):
    for step in (1, 2, 3):
        damage(run / "checkpoints" / f"checkpoint-{step}")
    assert resume(run) == 0
    error = capsys.readouterr().err
    assert f"{run} has no complete checkpoint: the training starts from the beginning." in error
    assert steps_in(run) == [1, 2, 3, 4]


def test_missing_and_truncated_routing_parts_are_reported(run, capsys):
    """The steps of the others are in the log and on the page of the resumed run."""
    first, second, _ = sorted((run / "routing").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    assert resume(run) == 0
    told = capsys.readouterr().err
    assert "1 of 3 parts of the routing are missing" in told
    assert "1 of 3 parts of the routing are damaged" in told
    assert f"the first is {second.name}: their steps are lost" in told
    assert f"{second} is not a readable Parquet file" in (run / "report.html").read_text()


class Facts(http.server.BaseHTTPRequestHandler):
    """Serves facts to those with the signature."""

    content = b""

    def do_GET(self):
        self.send_response(200 if self.path.endswith("?sig=s5ecret") else 403)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *given):
        pass


def test_signed_address_must_be_given_again(options, facts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOLF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Facts, "content", facts.read_bytes())
    run, step = tmp_path / "run", MoLFAdamW.step

    def interrupting(self, closure=None):
        if any(self.state.values()):
            raise KeyboardInterrupt
        return step(self, closure)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Facts) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/facts.jsonl"
        given = command(options, run)
        given[given.index("--data") + 1] = f"{address}?sig=s5ecret"
        with monkeypatch.context() as patch:
            patch.setattr(MoLFAdamW, "step", interrupting)
            assert main(given) == 130
        assert f"--output_dir {run} --resume --data ADDRESS" in capsys.readouterr().err
        assert resume(run) == 2
        error = capsys.readouterr().err
        assert f"{run} was started with data={address} and a query or user" in error
        assert "Give --data again, with the whole address." in error
        assert resume(run, "--data", f"{address}?sig=s5ecret") == 0
        server.shutdown()
    assert "from checkpoint-1" in capsys.readouterr().err
    assert "s5ecret" not in (run / "config.yaml").read_text()


def test_new_run_of_a_job_script(options, tmp_path, capsys):
    """The first start has nothing to resume."""
    assert main(command(options, tmp_path / "run", "--resume")) == 0
    assert "Resuming" not in capsys.readouterr().err
    assert is_finished(tmp_path / "run")


def test_foreign_directory_is_not_resumed(options, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(command(options, tmp_path, "--resume")) == 2
    assert "is not a run of molf train, so it cannot be resumed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_checkpoints_by_default_are_gone_at_the_end(options, tmp_path, monkeypatch):
    from molf.checkpoint import writer

    kept = []
    delete = writer.delete_old
    monkeypatch.setattr(writer, "delete_old", lambda *given: kept.append(given) or delete(*given))
    # Seconds at the start, after steps 1 and 2, and after each checkpoint.
    times = iter([0, 0, 600, 1000, 1000, 1000])
    clock = SimpleNamespace(monotonic=times.__next__)
    monkeypatch.setattr("molf.job.trainer.checkpoints.time", clock)
    assert main([*options, "--output_dir", str(tmp_path / "run")]) == 0
    assert len(kept) == 2  # one after 15 minutes, one at the end
    assert {given[1:] for given in kept} == {(2, ())}
    assert not (tmp_path / "run" / "checkpoints").exists()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["save_minutes"] == 15
    assert config["run"]["checkpoints"]["count"] == 2


def test_no_checkpoints(options, tmp_path, monkeypatch):
    monkeypatch.setattr("molf.checkpoint.writer.CheckpointWriter.write", None)
    assert main([*options, "--save_minutes", "0", "--output_dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("split", "before", "now", "fsdp", "expected"),
    [
        ((5, 1), 2, 1, "all", (5, 2, None)),  # passes alone
        ((3, 4), 1, 4, None, (3, 1, None)),
        ((3, 1), 4, 3, "2", (2, 2, "all")),  # 12 examples: 3 x 4, of passes of at most 3
        ((8, 1), 2, 8, "all", (2, 1, "all")),
        ((4, 2), 4, 4, "2", (4, 2, "2")),
        ((5, 1), 2, 4, "2", (5, 1, "2")),  # 10 examples do not divide: refused later
    ],
)
def test_steps_are_split_for_another_number_of_processes(split, before, now, fsdp, expected):
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "fsdp")
    options = dict(zip(names, (*split, fsdp), strict=True))
    split_again(options, before, now)
    assert tuple(options[name] for name in names) == expected


def test_a_given_size_stays():
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}
    split_again(options, 4, 3, keeps_size=True)
    assert options["per_device_train_batch_size"] == 3


def test_an_edited_assignment_of_the_run_is_refused(
    options, assignment, tmp_path, monkeypatch, capsys
):
    """Neither names nor shapes of the optimizer's state show another alpha."""
    run = tmp_path / "run"
    given = command(options, run, "--method", "hybrid", "--assignment", str(assignment))

    def failing(*saved, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("molf.job.trained_model.save_model", failing)
        assert main(given) == 130
    own = run / "assignment.yaml"
    text = own.read_text()
    capsys.readouterr()
    for edit in (
        ("r: 4, alpha: 8.0", "r: 4, alpha: 80.0"),
        ("use_rslora: false", "use_rslora: true"),
    ):
        assert edit[0] in text
        own.write_text(text.replace(*edit))
        assert resume(run) == 2
        error = capsys.readouterr().err
        assert "the content of its assignment.yaml has changed since it was started" in error
    own.write_text(f"# a comment\n{text}")
    assert resume(run) == 0
