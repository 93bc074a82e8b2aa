"""Spectra of the change: against exact SVD, within the time, and never a reason to fail."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from molf.cli import main
from molf.job.extract import spectra
from molf.job.extract.spectra import DIRECTIONS, _spread, spectrum, write_spectra
from molf.job.model.stored import StoredCheckpoint
from molf.job.record.finished_run import read_run


def of_rank(rank, out=96, columns=80, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(out, rank, generator=generator)
    return size * left @ torch.randn(rank, columns, generator=generator) / math.sqrt(rank * out)


def test_spectrum_of_a_known_change():
    old = of_rank(80, seed=1)
    change = of_rank(6, size=0.1)
    found = spectrum("a", old, old + change)
    values = torch.linalg.svdvals((old + change - old).double())
    shares = values.square().cumsum(0) / values.square().sum()
    weights = values[:DIRECTIONS] / values[:DIRECTIONS].sum()
    assert found.shape == (96, 80)
    assert found.base_norm == pytest.approx(old.norm().item(), rel=1e-5)
    assert found.change_norm == pytest.approx(change.norm().item(), rel=1e-4)
    assert found.directions_90 == int((shares < 0.9).sum()) + 1 <= 6
    assert found.held == pytest.approx(1, abs=1e-5)
    entropy = -(weights * weights.log()).nansum()
    assert found.effective_rank == pytest.approx(entropy.exp().item(), rel=0.01)
    assert found.intruders == 0


def test_change_of_many_directions():
    old = of_rank(100, 200, 200, seed=1)
    found = spectrum("a", old, old + of_rank(200, 200, 200, size=0.1))
    assert found.directions_90 is None
    assert 0.4 < found.held < 0.9


def test_intruders_are_counted():
    """Two new strong directions lead W and are like none of W0."""
    old = of_rank(8, 200, 60, seed=1)
    left = torch.linalg.qr(torch.cat([old[:, :20], torch.randn(200, 2)], dim=1))[0][:, -2:]
    right = torch.linalg.qr(torch.randn(60, 2))[0]
    assert spectrum("a", old, old + 10 * old.norm() * left @ right.T).intruders >= 2


def test_no_change():
    old = of_rank(10)
    found = spectrum("a", old, old.clone())
    assert (found.change_norm, found.directions_90, found.intruders) == (0.0, 0, 0)


def test_order_is_spread():
    for count in (1, 2, 5, 8, 21):
        assert sorted(_spread(count)) == [*range(count)]
    assert [*_spread(8)] == [0, 4, 2, 6, 1, 5, 3, 7]


def test_spectra_of_a_run(molf_run, base):
    """The layers are those of the saved model, and the change that of the files."""
    run = read_run(molf_run.path)
    assert write_spectra(run, 1e9)
    found = json.loads((run.path / "spectra.json").read_text())
    assert found["not_measured"] == []
    names = [one["name"] for one in found["layers"]]
    assert set(molf_run.routing[0]) <= set(names)
    old, new = StoredCheckpoint(str(base)), StoredCheckpoint(str(run.path / "model"))
    for one in found["layers"]:
        name = f"{one['name']}.weight"
        change = new.read(name).float() - old.read(name).float()
        assert one["change_norm"] == pytest.approx(change.norm().item(), rel=1e-4)
        assert one["shape"] == list(change.shape)


def test_time_is_bounded(molf_run, tmp_path):
    """Each look at the clock takes a second: the limit of 4.5 leaves two layers."""
    run, seconds = read_run(molf_run.path), iter(range(1000))
    assert write_spectra(run, 1e9)
    kept = (run.path / "spectra.json").read_text()
    assert write_spectra(run, 4.5, clock=lambda: next(seconds))
    found = json.loads((run.path / "spectra.json").read_text())
    assert len(found["layers"]) == 2
    names = {one["name"].split(".")[2] for one in found["layers"]}
    assert len(names) == 2  # of two depths
    assert len(found["not_measured"]) + 2 == len(json.loads(kept)["layers"])
    assert write_spectra(run, -1.0)
    found = json.loads((run.path / "spectra.json").read_text())
    assert (found["layers"], len(found["not_measured"])) == ([], len(json.loads(kept)["layers"]))
    (run.path / "spectra.json").write_text(kept)


def test_random_numbers_of_all_devices_are_restored(tmp_path, monkeypatch):
    """A seed is set on every device."""
    forked, fork = [], torch.random.fork_rng

    def without_devices(devices):
        forked.extend(devices)
        return fork(devices=[])

    monkeypatch.setattr(torch.random, "fork_rng", without_devices)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(spectra, "_layers", lambda run: iter(()))
    assert write_spectra(SimpleNamespace(config={"run": {}}, seed=3, path=tmp_path), 1.0)
    assert forked == [0, 1]


def test_quantised_base_is_left_out(molf_run):
    run = read_run(molf_run.path)
    run.config["run"]["model"]["quantised"] = "4-bit"
    assert not write_spectra(run, 1e9)


def test_failure_is_a_warning_and_option_leaves_them_out(options, tmp_path, monkeypatch, capsys):
    def failing(*_):
        raise RuntimeError("no convergence")

    monkeypatch.setattr(spectra, "write_spectra", failing)
    assert main([*options, "--output_dir", str(tmp_path / "a")]) == 0
    assert "spectra.json was not written: no convergence" in capsys.readouterr().err
    arguments = ["--no-spectra", "--no-report", "--output_dir", str(tmp_path / "b")]
    assert main([*options, *arguments]) == 0
    assert "spectra.json" not in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert not names & {"spectra.json", "report.html"}
