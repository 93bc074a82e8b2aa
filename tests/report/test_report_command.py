"""`molf report`: files, wrong input in one line, secrets; the page of `molf train` and `eval`."""

import json

import pytest

from molf.cli import main
from molf.report import page as page_module
from molf.report.place import is_page
from run_files import write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def fails(capsys, *arguments):
    """The line of a refused command, which has written nothing to standard output."""
    assert main(["report", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_page_of_a_run(run, capsys):
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == ["run: complete", f"page      {run / 'report.html'}"]
    assert is_page(run / "report.html")
    assert main(["report", str(run)]) == 0  # its own page is replaced


def test_notices_are_printed(run, capsys):
    (run / "environment.json").unlink()
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["run: complete", "  environment.json is missing or cannot be read."]


def test_several_runs_and_figures(run, tmp_path, capsys):
    other = write_run(tmp_path / "other", method="lora")
    output, figures = tmp_path / "both.html", tmp_path / "figures"
    arguments = [str(run), str(other), "--output", str(output), "--figures", str(figures)]
    assert main(["report", *arguments]) == 0
    assert is_page(output)
    assert (figures / "run-winners.svg").is_file()
    assert (figures / "other-loss.png").is_file()
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"files in {figures}")


def test_wrong_input(run, tmp_path, capsys):
    assert "Give the directory of a run" in fails(capsys)
    assert "2 runs on one page need --output FILE." in fails(
        capsys, run, write_run(tmp_path / "other", method="lora")
    )
    assert "is not a directory" in fails(capsys, tmp_path / "none")
    own = tmp_path / "notes.html"
    own.write_text("mine")
    assert "exists. Give --overwrite" in fails(capsys, run, "--output", own)
    assert own.read_text() == "mine"
    assert "is a directory" in fails(capsys, run, "--output", tmp_path)
    assert "there is no directory" in fails(capsys, run, "--output", tmp_path / "no" / "a.html")
    assert "is a file. Give a folder." in fails(capsys, run, "--figures", own)
    assert not (run / "report.html").exists()
    assert main(["report", str(run), "--output", str(own), "--overwrite"]) == 0
    assert is_page(own)


def test_secrets_of_this_process_are_masked(run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    line = {"index": 0, "prediction": "hf_abcdefghijklmnopqrstuvwxyz", "right": True}
    (run / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["report", str(run)]) == 0
    assert "hf_abcdefghijklmnopqrstuvwxyz" not in (run / "report.html").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training with its page, and the lines that it has printed."""
    from checkpoints import write_checkpoint, write_facts

    folder = tmp_path_factory.mktemp("trained")
    arguments = [
        *("train", "--task", "fact", "--model", str(write_checkpoint(folder / "base"))),
        *("--data", str(write_facts(folder / "facts.jsonl")), "--ranks", "4", "--max_steps", "3"),
        *("--output_dir", str(folder / "run")),
    ]
    assert main(arguments) == 0
    return folder, arguments


def test_train_writes_its_page(trained, capsys):
    folder, arguments = trained
    run = folder / "run"
    assert is_page(run / "report.html")
    page = (run / "report.html").read_text()
    assert "Winners by layer and step" in page
    assert "The log has no shapes" not in page
    # The page is the run's own, so it is no reason against --overwrite; and it may be left out.
    assert main([*arguments, "--overwrite", "--no-report"]) == 0
    out = capsys.readouterr().out
    assert not (run / "report.html").exists()
    assert "page     " not in out


def test_failing_page_is_a_warning(trained, monkeypatch, capsys):
    folder, arguments = trained

    def failing(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(page_module, "render", failing)
    assert main([*arguments, "--overwrite"]) == 0
    out, err = capsys.readouterr()
    run = folder / "run"
    assert f"report.html was not written: no ink. molf report {run} writes it later." in err
    assert f"run      {run}" in out
    monkeypatch.undo()
    assert main([*arguments, "--overwrite"]) == 0
    assert f"page     {run / 'report.html'}" in capsys.readouterr().out


def test_eval_writes_its_page(trained, tmp_path, capsys):
    folder, _ = trained
    data = ["--task", "fact", "--data", str(folder / "facts.jsonl")]
    arguments = ["eval", str(folder / "base"), *data, "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    page = tmp_path / "out" / "report.html"
    assert f"page     {page}" in capsys.readouterr().out
    assert is_page(page)
    assert main([*arguments, "--overwrite", "--no-report"]) == 0
