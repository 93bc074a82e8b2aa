"""The command as a process: fast to start, quiet when its reader leaves."""

import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

MOLF = Path(sys.executable).parent / "molf"


def run(*arguments):
    return subprocess.run(arguments, capture_output=True, text=True, check=True)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from molf.cli import main; main(['--help']); main(['train', '--help']);"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'pyarrow'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    assert "routing" in run(sys.executable, "-c", code).stdout


def test_help_is_fast():
    """Half a second of processor time, which other processes do not change; the best of three."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(MOLF, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5


def test_runs_as_a_module():
    assert run(sys.executable, "-m", "molf", "--version").stdout.strip() == version("molf")


def test_wrong_input_needs_no_torch(tmp_path):
    code = (
        "import sys; from molf.cli import main;"
        "assert main(['train', '--task', 'fact', '--model', '/nowhere', '--data', 'x']) == 2;"
        "assert main(['train', '--report_to', 'nothing']) == 2;"
        "assert main(['train', '--training_args.nothing', 'x']) == 2;"
        "assert main(['train', '--training_args.dataloader_num_workers', 'many']) == 2;"
        "assert main(['train', '--training_args.packing', 'true']) == 2;"
        "assert main(['train', '--method', 'hybrid']) == 2;"
        "assert main(['train', '--method', 'hybrid', '--assignment', '/nowhere']) == 2;"
        "assert main(['train', '--method', 'hybrid', '--assignment', sys.argv[1]]) == 2;"
        "heavy = {'torch', 'transformers', 'trl'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    (tmp_path / "assignment.yaml").write_text("full: [layers..mlp]")
    run(sys.executable, "-c", code, str(tmp_path / "assignment.yaml"))


def test_reader_of_the_help_leaves():
    """Bash tells the exit code of each part; what was asked for was done."""
    script = f'{MOLF} train --help | true; echo "${{PIPESTATUS[0]}}"'
    assert run("bash", "-c", script).stdout.strip() == "0"


def test_progress_that_nobody_reads_any_more():
    """The run goes on: rich would end the process."""
    code = (
        "import os, sys; from molf.job.progress import make_reporter;"
        "reading, writing = os.pipe(); os.dup2(writing, 2); os.close(reading);"
        "reporter = make_reporter(); reporter.say('one'); reporter.say('two'); print('done')"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout == "done\n"


def test_reader_that_leaves(tmp_path):
    from molf.core.step.decision import Decision
    from molf.job.record.routing_log import RoutingWriter

    with RoutingWriter(tmp_path / "routing") as writer:
        for step in range(5000):
            writer.add(step, {"layer": Decision(("full",), {"full": 1.0, "lora0_r4": 0.5})})
    command = f"{MOLF} routing {tmp_path} --jsonl | head -n 1"
    finished = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert finished.stdout.startswith('{"step": 0')
    assert finished.stderr == ""


def exit_code(script):
    """The exit code of a line of bash, and what it wrote to standard error."""
    finished = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    return finished.returncode, finished.stderr


def test_output_that_cannot_be_written():
    """Python would end with code 120 where the last flush fails, or with a traceback."""
    assert exit_code(f"{MOLF} recipes ls > /dev/full") == (
        1,
        "molf: error: standard output cannot be written: No space left on device.\n",
    )
    assert exit_code(f"{MOLF} recipes ls --json >&-") == (
        1,
        "molf: error: standard output cannot be written: Bad file descriptor.\n",
    )
    assert exit_code(f"{MOLF} recipes ls > /dev/full 2> /dev/full")[0] == 1
    assert exit_code(f"{MOLF} train --model /nowhere --task fact 2> /dev/full")[0] == 2
    assert exit_code(f"{MOLF} train --model /nowhere --task fact >&- 2>&- <&-")[0] == 2


def test_a_finished_command_whose_last_line_is_lost():
    code = (
        "import sys; from molf.streams import result_on_disk, standard_streams\n"
        "with standard_streams():\n"
        "    with result_on_disk('It is complete'): sys.stdout.write('done')\n"
    )
    script = f'{sys.executable} -c "{code}"'
    returned, error = exit_code(f"{script} > /dev/full")
    assert returned == 0
    assert "It is complete, but standard output cannot be written: No space left" in error
    assert exit_code(f"{script} > /dev/full 2> /dev/full") == (0, "")


def test_names_that_the_terminal_cannot_show(tmp_path):
    """A path is bytes; letters that the encoding lacks are no reason to fail."""
    target = tmp_path / "r\u00e9cipe.yaml"
    script = f"PYTHONUTF8=0 PYTHONIOENCODING=ascii {MOLF} recipes cp demo-fact-molf {target}"
    assert exit_code(script) == (0, "")
    assert target.is_file()
