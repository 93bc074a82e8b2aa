"""The server of forked processes has the libraries, so that no process imports them again."""

from forked import forking, write_imported


def test_forked_processes_have_the_libraries(tmp_path):
    process = forking().Process(target=write_imported, args=(tmp_path / "names",))
    process.start()
    process.join()
    names = (tmp_path / "names").read_text().split("\n")
    assert {"torch", "trl.trainer.sft_trainer", "killed_training", "launched"} <= set(names)
