"""Several worker processes, some of them killed: nothing runs twice, and nothing is lost."""

import re
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace

import optuna
import pytest

from molf.cli import main
from molf.errors import InputError
from molf.study.ledger import Ledger
from molf.study.outcome import all_results, read_result, result_file, write_result
from molf.study.place import write_record
from molf.study.plan import Plan
from molf.study.storage import StorageError, check_present, storage_address
from study_helpers import FFT, LORA, Pretended, start_worker, study_of, work, write_study


class Interrupted(Pretended):
    def __call__(self, planned, point, trial=None):
        raise KeyboardInterrupt


def _events(log):
    lines = log.read_text().splitlines() if log.exists() else []
    return [tuple(line.split(" ", 2)) for line in lines]


def _running(log):
    """The worker and label of each trial that started and did not end."""
    events = _events(log)
    ended = {(pid, label) for event, pid, label in events if event == "end"}
    return [(pid, label) for event, pid, label in events if event == "start"
            if (pid, label) not in ended]  # fmt: skip


@pytest.mark.slow
def test_four_workers_two_killed_in_mid_trial(tmp_path):
    path = write_study(tmp_path, heartbeat=1, choose={"seeds": [1, 2]})
    log = tmp_path / "log"
    workers = {str(worker.pid): worker for worker in (start_worker(path, log, 0.4) for _ in "1234")}
    killed = {}
    deadline = time.monotonic() + 120
    while len(killed) < 2 and time.monotonic() < deadline:
        for pid, label in _running(log):
            if pid not in killed and len(killed) < 2:
                workers[pid].send_signal(signal.SIGKILL)
                workers[pid].wait()
                # It may have ended its trial before the signal.
                if (pid, label) in _running(log):
                    killed[pid] = label
        time.sleep(0.01)
    assert len(killed) == 2
    for pid, worker in workers.items():
        assert worker.wait(120) == (-signal.SIGKILL if pid in killed else 0)

    study, make = study_of(tmp_path, heartbeat=1, choose={"seeds": [1, 2]})
    results = all_results(study)
    events = _events(log)
    ended = Counter(label for event, _, label in events if event == "end")
    started = Counter(label for event, _, label in events if event == "start")
    assert len(ended) == len(results) == study.size == 2 * (3 * 2 + 5)
    assert set(ended.values()) == {1}
    # A killed trial starts once more; no other one does.
    assert started == ended + Counter(killed.values())
    snapshot = Ledger(study).read()
    plan = Plan(study, snapshot.outcomes, make, snapshot.drawn)
    assert not plan.unfinished
    assert not snapshot.running
    assert not snapshot.waiting


def test_a_running_trial_has_a_sign_of_life_from_its_start(tmp_path):
    """The worker may be killed before the thread of the heart-beats has run once."""
    study, make = study_of(tmp_path)
    (tmp_path / "out").mkdir()
    pretended, signs = Pretended(study), []

    def run(planned, point, trial):
        with sqlite3.connect(tmp_path / "out" / "optuna.sqlite") as database:
            found = database.execute("select trial_id from trial_heartbeats").fetchall()
        signs.append((trial._trial_id,) in found)
        return pretended(planned, point, trial)

    work(study, make, run)
    assert len(signs) == study.size
    assert all(signs)


def test_a_worker_that_slept_while_its_trial_was_given_up_goes_on(tmp_path):
    """Suspended past the grace of the heart-beats: its trial is not trained again."""
    study, make = study_of(tmp_path)
    pretended, slept = Pretended(study), []

    def run(planned, point, trial):
        outcome = pretended(planned, point, trial)
        if not slept:
            slept.append(planned.key)
            ledger = Ledger(study)
            storage, failed = ledger._storage, optuna.trial.TrialState.FAIL
            storage.set_trial_state_values(trial._trial_id, state=failed)
        return outcome

    done, _ = work(study, make, run)
    assert (done.done, done.failed, done.ended) == (study.size, 0, "finished")
    assert len(pretended.ran) == len(set(pretended.ran)) == study.size
    assert slept[0] in Ledger(study).read().outcomes


def test_a_worker_whose_trial_was_given_up_before_it_ran_goes_on(tmp_path, monkeypatch):
    study, make = study_of(tmp_path)
    suggest, lost = Ledger._suggest, []

    def fail_first(self, trial, planned):
        if not lost:
            lost.append(trial.number)
            state = optuna.trial.TrialState.FAIL
            self._storage.set_trial_state_values(trial._trial_id, state=state)
            trial.set_user_attr("worker", "late")
        return suggest(self, trial, planned)

    monkeypatch.setattr(Ledger, "_suggest", fail_first)
    done, _ = work(study, make, Pretended(study))
    assert (done.done, done.failed) == (study.size, 0)
    assert len(all_results(study)) == study.size


def test_status_names_several_commits_and_uncommitted_changes(tmp_path, capsys):
    study, make = study_of(tmp_path)

    class Committed(Pretended):
        def __call__(self, planned, point, trial=None):
            outcome = super().__call__(planned, point, trial)
            path = result_file(study, planned.cell.name, planned.method.name, planned.label(point))
            result = read_result(path)
            is_lora = planned.method.name == "lora"
            commit = "a" * 40 if is_lora else "b" * 40
            row = {**result.row, "commit": commit, "dirty": is_lora}
            write_result(path, replace(result, row=row))
            return outcome

    work(study, make, Committed(study))
    said = "rows come from 2 commits: bbbbbbbbbbbb (8), aaaaaaaaaaaa (8); 8 of 16 rows had"
    assert main(["study", "status", str(tmp_path / "study.yaml")]) == 0
    assert f"{said} uncommitted changes" in capsys.readouterr().out
    assert main(["study", "report", str(tmp_path / "study.yaml"), "--no_figures"]) == 0
    assert f"molf: warning: {said} uncommitted changes." in capsys.readouterr().err


def test_the_trial_of_a_dead_worker_runs_before_other_methods(tmp_path):
    """Else the second phase of its method would come last."""
    one = [{**FFT, "rates": {"learning_rate": [1e-3]}}]
    one.append({**LORA, "rates": {"lora_learning_rate": [1e-3]}})
    study, make = study_of(tmp_path, heartbeat=1, methods=one)
    (tmp_path / "out").mkdir()
    ledger = Ledger(study)
    plan = Plan(study, {}, make, {})
    ledger.enqueue(plan.trials, ledger.read())
    first = plan.trials[0]
    trial = ledger._at(first.place).ask()
    ledger._storage.record_heartbeat(trial._trial_id)
    with closing(sqlite3.connect(tmp_path / "out" / "optuna.sqlite")) as database, database:
        database.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")
    runner = Pretended(study)
    work(study, make, runner)
    assert [label.split("/")[1] for label in runner.ran] == ["fft"] * 6 + ["lora"] * 6


def test_a_trial_that_kills_its_workers_is_given_up(tmp_path):
    study, make = study_of(tmp_path, heartbeat=1, retries=1)
    (tmp_path / "out").mkdir()
    ledger = Ledger(study)
    plan = Plan(study, {}, make, {})
    bad = plan.trials[0]
    for _ in range(2):
        ledger.enqueue([bad], ledger.read())
        one = ledger._at(bad.place)
        trial = one.ask()
        one.tell(trial, state=optuna.trial.TrialState.FAIL)  # as if its worker had died
    outcome = ledger.read().outcomes[bad.key]
    assert outcome.state == "failed"
    assert outcome.error == "its worker died 2 times"
    assert ledger.enqueue([bad], ledger.read()) == 0


def test_two_queued_trials_of_one_identity_run_once(tmp_path):
    study, make = study_of(tmp_path)
    (tmp_path / "out").mkdir()
    ledger = Ledger(study)
    empty = ledger.read()
    plan = Plan(study, {}, make, {})
    assert ledger.enqueue(plan.trials, empty) == 6
    assert ledger.enqueue(plan.trials, empty) == 6  # another worker at the same moment
    runner = Pretended(study)
    done, _ = work(study, make, runner)
    assert done.done == study.size == len(runner.ran) == len(set(runner.ran))


def test_studies_of_one_name_in_one_database_keep_their_trials(tmp_path):
    """The trials of other folders are neither run nor dropped."""
    storage, ledgers = f"sqlite:///{tmp_path}/shared.sqlite", {}
    others = [{**FFT, "rates": {"learning_rate": [1e-6, 1e-5, 1e-4]}}, LORA]
    for folder, methods in (("one", [FFT, LORA]), ("equal", [FFT, LORA]), ("other", others)):
        (tmp_path / folder / "out").mkdir(parents=True)
        study, make = study_of(tmp_path / folder, storage=storage, methods=methods)
        ledgers[folder] = ledger = Ledger(study)
        ledger.enqueue(Plan(study, {}, make, {}).trials, ledger.read())
    queued = {folder: sum(ledger.read().waiting.values()) for folder, ledger in ledgers.items()}
    assert queued == dict.fromkeys(ledgers, 6)
    runner = Pretended(study)
    done, _ = work(study, make, runner)  # of the folder `other`
    assert done.done == len(runner.ran) == study.size
    ledgers["other"].stop(time.time())
    for folder in ("one", "equal"):
        snapshot = ledgers[folder].read()
        assert sum(snapshot.waiting.values()) == 6
        assert not snapshot.outcomes
        assert not ledgers[folder].stopped_at


def test_failed_trials_are_recorded_and_the_study_goes_on(tmp_path):
    study, make = study_of(tmp_path)
    done, lines = work(study, make, Pretended(study, fails=["lora/choose-lora_lr0.003"]))
    assert (done.failed, done.ended) == (1, "finished")
    assert any("failed the run has no finite metric es" in line for line in lines)
    snapshot = Ledger(study).read()
    plan = Plan(study, snapshot.outcomes, make, snapshot.drawn)
    assert plan.choices["facts", "lora"].point == {"lora_learning_rate": 1e-3}
    assert plan.choices["facts", "fft"].point == {"learning_rate": 1e-3}
    assert len(snapshot.failed) == 1


def test_a_method_without_a_working_rate_is_named(tmp_path):
    study, make = study_of(tmp_path)
    done, _ = work(study, make, Pretended(study, fails=["lora/choose"]))
    assert done.without_rates == ("facts/lora",)
    assert (done.done, done.failed) == (3 + 5 + 3, 3)


def test_failed_trials_run_again_on_request(tmp_path):
    study, make = study_of(tmp_path)
    work(study, make, Pretended(study, fails=["fft/report-lr0.001-seed13"]))
    with pytest.raises(KeyboardInterrupt):
        work(study, make, Interrupted(study), retry_failed=True)
    assert not Ledger(study).read().failed  # queued again
    runner = Pretended(study, fails=["fft/report-lr0.001-seed13"])
    done, _ = work(study, make, runner)
    assert runner.ran == ["facts/fft/report-lr0.001-seed13"]
    assert done.failed == 1
    runner = Pretended(study)
    done, lines = work(study, make, runner, retry_failed=True)
    assert lines[0] == "1 failed trial queued again"
    assert runner.ran == ["facts/fft/report-lr0.001-seed13"]
    assert done.failed == 0
    assert not Ledger(study).read().failed


def test_a_lost_storage_repeats_no_finished_trial(tmp_path):
    study, make = study_of(tmp_path)
    work(study, make, Pretended(study))
    (study.output_dir / "optuna.sqlite").unlink()
    with pytest.raises(StorageError, match=r"is gone\. 16 finished trials in .*repeats none"):
        check_present(study)
    runner = Pretended(study)
    done, _ = work(study, make, runner)
    assert runner.ran == []
    assert done.done == study.size


def test_workers_stop_after_their_trial(tmp_path):
    study, make = study_of(tmp_path)

    class Stopping(Pretended):
        def __call__(self, planned, point, trial=None):
            if len(self.ran) == 2:
                Ledger(study).stop(time.time() + 1)
            return super().__call__(planned, point, trial)

    done, _ = work(study, make, Stopping(study))
    assert (done.done, done.ended) == (3, "stopped")


def test_a_changed_file_ends_workers(tmp_path):
    study, make = study_of(tmp_path)

    class Changing(Pretended):
        def __call__(self, planned, point, trial=None):
            write_record(study_of(tmp_path, methods=[LORA])[0])
            return super().__call__(planned, point, trial)

    done, _ = work(study, make, Changing(study))
    assert (done.done, done.ended) == (1, "changed")


def test_tpe_draws_exactly_the_asked_number_of_rates(tmp_path):
    def ranged(method, name):
        return {**method, "rates": {name: {"low": 1e-4, "high": 1e-2}}}

    study, make = study_of(
        tmp_path,
        choose={"sampler": "tpe", "trials": 4, "seeds": [1, 2]},
        methods=[ranged(LORA, "lora_learning_rate")],
    )
    runner = Pretended(study)
    work(study, make, runner)
    tried = [label for label in runner.ran if "/choose-" in label]
    rates = Counter(label.split("-seed")[0] for label in tried)
    assert len(tried) == 8
    assert set(rates.values()) == {2}  # each rate with both seeds
    assert len([label for label in runner.ran if "/report-" in label]) == 5
    (study.output_dir / "optuna.sqlite").unlink()
    again = Pretended(study)
    done, _ = work(study, make, again)
    assert again.ran == []  # no other rates are drawn
    assert done.done == study.size


def test_interrupted_trials_are_queued_again(tmp_path):
    study, make = study_of(tmp_path, retries=0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            work(study, make, Interrupted(study))
    done, _ = work(study, make, Pretended(study))
    assert (done.done, done.failed) == (study.size, 0)


def test_storage_that_cannot_be_opened(tmp_path):
    (tmp_path / "out").mkdir()
    for address, message in (
        ("nothing://host/name", r"nothing://host/name cannot be opened: .*nothing"),
        ("sqlite:////proc/none/x.sqlite", r"cannot be opened: unable to open database file"),
    ):
        study, _ = study_of(tmp_path, storage=address)
        with pytest.raises(InputError, match=message):
            Ledger(study)
    (tmp_path / "out" / "optuna.sqlite").write_text("no database " * 100)
    study, _ = study_of(tmp_path)
    with pytest.raises(InputError, match="cannot be opened: file is not a database"):
        Ledger(study)


def test_a_storage_that_cannot_be_opened_stops_a_run_before_its_workers(tmp_path, capfd):
    path = write_study(tmp_path, storage="sqlite:////proc/none/x.sqlite")
    for command in (["run", "--workers", "2"], ["work"]):
        assert main(["study", command[0], str(path), *command[1:]]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert re.match("molf: error: The storage .* cannot be opened: unable to open", line)
        assert not (tmp_path / "out").exists()


def test_a_locked_storage_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("molf.study.storage._LOCKED_SECONDS", 0.1)
    study, make = study_of(tmp_path)
    (tmp_path / "out").mkdir()
    ledger = Ledger(study)
    trials = Plan(study, {}, make, {}).trials
    snapshot = ledger.read()
    place = (trials[0].cell.name, trials[0].method.name, trials[0].phase)
    with closing(sqlite3.connect(tmp_path / "out" / "optuna.sqlite")) as other:
        other.execute("BEGIN EXCLUSIVE")
        for use in (
            lambda: ledger.stopped_at,
            lambda: ledger.stop(1.0),
            lambda: ledger.read(),
            lambda: ledger.enqueue(trials, snapshot),
            lambda: ledger.run(place, {}, "a worker", None),
        ):
            with pytest.raises(StorageError, match=r"failed: database is locked\. Finished trials"):
                use()
        with pytest.raises(InputError, match=r"cannot be opened: database is locked\.$"):
            Ledger(study)


def test_passwords_of_addresses_are_not_printed(tmp_path):
    (tmp_path / "out").mkdir()
    study, _ = study_of(tmp_path, storage="postgresql://anna:geheim@127.0.0.1:1/none")
    assert storage_address(study).startswith("postgresql+psycopg://anna:geheim@")
    with pytest.raises(InputError) as raised:
        Ledger(study)
    assert "geheim" not in str(raised.value)
    assert "\n" not in str(raised.value)


def taken_trial(study, make, ledger):
    """The first trial, its study of Optuna, and its trial there, which a worker has taken."""
    first = Plan(study, {}, make, {}).trials[0]
    ledger.enqueue([first], ledger.read())
    one = ledger._at(first.place)
    return first, one, one.ask()


def test_a_trial_of_a_worker_that_died_after_its_result_is_finished(tmp_path):
    study, make = study_of(tmp_path, retries=0)
    (tmp_path / "out").mkdir()
    ledger = Ledger(study)
    first, one, trial = taken_trial(study, make, ledger)
    Pretended(study)(first, first.point)
    one.tell(trial, state=optuna.trial.TrialState.FAIL)  # as if its worker had died
    assert ledger.read().outcomes[first.key].state == "complete"


def test_a_worker_that_dies_at_once_after_another_one_is_noticed(tmp_path):
    """The trial that was queued again had the attributes of the first, and ran for ever."""
    study, make = study_of(tmp_path, heartbeat=1)
    (tmp_path / "out").mkdir()
    ledger = Ledger(study)
    first, one, trial = taken_trial(study, make, ledger)
    ledger._storage.record_heartbeat(trial._trial_id)
    trial.set_user_attr("worker", "first")
    database = tmp_path / "out" / "optuna.sqlite"
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")
    place = [first.place]
    ledger.fail_stale(place)
    ledger.enqueue([first], ledger.read())
    one.ask()  # and dies before its first sign of life
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("update trials set datetime_start = datetime('now', '-1 day')")
    again = Ledger(study)  # a new process
    again.fail_stale(place)
    assert not again.read().running


def test_status_counts_running_trials_that_differ_in_their_rate_alone(tmp_path, capsys):
    study, make = study_of(tmp_path, methods=[FFT])
    write_record(study)
    ledger = Ledger(study)
    plan = Plan(study, {}, make, {})
    ledger.enqueue(plan.trials, ledger.read())
    first = plan.trials[0]
    for _ in range(2):
        ledger._at(first.place).ask()
    assert main(["study", "status", str(tmp_path / "study.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "2 running, 8 left" in printed
    assert "with 2 workers" in printed
    assert "running: facts/fft/choose-lr0.0001-seed1" in printed
