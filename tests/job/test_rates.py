"""`molf lr`: sweeps from the same weights, their evidence, files, and nothing that is a model."""

import csv
import json

import numpy as np
import pytest
import torch

from molf.cli import main
from molf.core.optimizer import MoLFAdamW
from molf.job.ahead.evidence import SweptRate, evidence_of
from molf.job.ahead.rate_texts import evidence_lines
from molf.job.settings.rates import RateSettings

RATES = np.geomspace(1e-6, 1, 121)


@pytest.fixture(scope="module")
def given(base, facts):
    return [
        *("--task", "fact", "--model", str(base), "--data", str(facts), "--ranks", "4"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    ]


@pytest.fixture(scope="module")
def swept(given, workplace):
    """A range test of molf, and what its optimizers had before each step."""
    path, seen = workplace / "rates", []
    step = MoLFAdamW.step

    def stepping(self, closure=None):
        group = self.param_groups[0]
        rest = [one["lr"] for one in self.param_groups if one.get("layer") is None]
        weights = [p.detach().clone() for p in group["params"]]
        (ratio,) = group["lora_lr_ratios"]
        seen.append((group["lr"], group["lr"] * ratio, rest[0], weights))
        return step(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoLFAdamW, "step", stepping)
        more = ["--max_steps", "24", "--from", "1e-4", "--to", "10"]
        assert main(["lr", *given, *more, "--output_dir", str(path)]) == 0
    return path, seen, json.loads((path / "rates.json").read_text())


def test_files(swept):
    path, _, record = swept
    files = ["rates.csv", "rates.json", "rates.png"]
    assert sorted(entry.name for entry in path.iterdir()) == files
    assert (path / "rates.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((path / "rates.csv").open()))
    assert [row["sweep"] for row in rows] == [
        one["option"] for one in record["sweeps"] for _ in one["rates"]
    ]
    for sweep in record["sweeps"]:
        own = [row for row in rows if row["sweep"] == sweep["option"]]
        assert [float(row["rate"]) for row in own] == pytest.approx(sweep["rates"], rel=1e-5)
        losses = [None if row["loss"] == "" else float(row["loss"]) for row in own]
        assert losses == pytest.approx(sweep["losses"], rel=1e-5)
    assert record["options"]["method"] == "molf"
    assert record["environment"]["packages"]["torch"]


def test_one_sweep_per_rate_with_the_other_held(swept):
    """The rate of each step is the planned one, and the weights start alike."""
    _, seen, record = swept
    dense, lora = record["sweeps"]
    assert (dense["option"], dense["held"]) == ("learning_rate", "lora_learning_rate")
    assert (lora["option"], lora["held"]) == ("lora_learning_rate", "learning_rate")
    assert dense["losses"][0] == lora["losses"][0]
    expected = np.geomspace(1e-4, 10, 24)
    steps = len(dense["rates"])
    assert dense["rates"] == pytest.approx(expected[:steps])
    first, second = seen[:steps], seen[steps:]
    assert [one[0] for one in first[: steps - 1]] == pytest.approx(expected[: steps - 1])
    assert {one[1] for one in first} == {0.0}
    assert [one[1] for one in second] == pytest.approx(expected[: len(second)])
    assert all(one[0] < 1e-12 for one in second)
    # 12 examples, 4 in a step.
    assert dense["passes"] == pytest.approx(steps / 3, abs=0.01)
    # Norms learn at the rate of the weights.
    assert [one[2] for one in first] == [one[0] for one in first]
    assert all(one[2] == 0 for one in second)
    assert all(map(torch.equal, first[0][3], second[0][3]))


def test_loss_that_is_not_finite_ends_the_sweep(given, tmp_path, capsys):
    path = tmp_path / "rates"
    more = ["--method", "lora", "--from", "1e-2", "--to", "1e30", "--max_steps", "40"]
    assert main(["lr", *given, *more, "--output_dir", str(path)]) == 0
    (sweep,) = json.loads((path / "rates.json").read_text())["sweeps"]
    assert (sweep["option"], sweep["held"]) == ("lora_learning_rate", None)
    assert sweep["diverged_at"] == sweep["rates"][-1] < 1e30
    assert len(sweep["losses"]) == len(sweep["rates"]) < 40
    assert sorted(entry.name for entry in path.iterdir())[-1] == "rates.png"
    printed = capsys.readouterr().out
    assert "lora_learning_rate of lora" in printed
    assert f"diverged    at {sweep['diverged_at']:.2g}" in printed
    assert all(line in printed for line in sweep["doubts"])
    # Replaced as a whole, and by nothing else than --overwrite.
    assert main(["lr", *given, *more, "--output_dir", str(path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (path / "notes.txt").touch()
    assert main(["lr", *given, *more, "--output_dir", str(path), "--overwrite"]) == 2
    assert "not a range test of molf lr alone (it holds notes.txt" in capsys.readouterr().err


def test_a_failed_test_is_replaced(given, tmp_path, capsys, monkeypatch):
    from molf.job.ahead import rates

    path = tmp_path / "rates"
    more = ["--method", "fft", "--max_steps", "20", "--output_dir", str(path)]
    with monkeypatch.context() as patch:
        patch.setattr(rates, "evidence_of", lambda *given, **named: 1 / 0)
        assert main(["lr", *given[:-6], *given[-4:], *more]) == 1
    assert f"(traceback: {path / 'error.log'})" in capsys.readouterr().err
    assert sorted(entry.name for entry in path.iterdir()) == ["error.log", "rates.json"]
    assert main(["lr", *given[:-6], *given[-4:], *more, "--overwrite"]) == 0
    assert not (path / "error.log").exists()
    assert json.loads((path / "rates.json").read_text())["to"] == 1.0


def curve(fall=3.0, at=1e-3, diverges=True, noise=0.1):
    """Losses that fall around a rate, and rise again two decades above it."""
    places = np.log10(RATES)
    losses = 4 - fall / (1 + np.exp(-4 * (places - np.log10(at))))
    if diverges:
        losses += np.exp(6 * (places - np.log10(at) - 2))
    losses += noise * np.random.default_rng(7).standard_normal(len(places))
    above = np.flatnonzero(losses > 6)
    count = above[0] + 1 if len(above) else len(losses)
    return evidence_of(RATES[:count], losses[:count], diverged=bool(len(above))), losses[:count]


def sweep_of(found, losses, *, passes=0.5, won=()):
    count = len(losses)
    return SweptRate("learning_rate", None, RATES[:count], losses, np.array(won), found, passes)


def test_evidence_of_a_curve():
    found, losses = curve()
    assert 5e-4 < found.steepest < 2e-3
    assert 5e-4 < found.half_at < 2e-3
    assert found.steepest_clear > 10
    assert found.suggestion == float(f"{found.half_at:.2g}")
    assert 1e-4 < found.fell_from < found.steepest < found.lowest_at < found.diverged_at < 0.5
    assert found.start == pytest.approx(4, abs=0.1)
    assert found.lowest == pytest.approx(1, abs=0.2)
    assert 0.07 < found.noise < 0.14
    assert found.fall > 20
    sweep = sweep_of(found, losses)
    assert sweep.doubts == []
    suggestion, grid, *_ = evidence_lines(sweep)
    assert suggestion == f"suggestion  --learning_rate {found.suggestion:g}"
    assert grid.startswith(f"grid        {found.suggestion:.2g}, {3 * found.suggestion:.2g}, ")


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_no_fall(seed):
    losses = 4 + 0.3 * np.random.default_rng(seed).standard_normal(len(RATES))
    found = evidence_of(RATES, losses, diverged=False)
    assert (found.suggestion, found.steepest, found.lowest_at) == (None, None, None)
    lines = sweep_of(found, losses).doubts
    assert lines[0].startswith("The loss did not fall clearly above its noise")
    assert lines[1].startswith("The loss did not diverge up to 1")
    assert evidence_lines(sweep_of(found, losses))[0] == "no suggestion"


@pytest.mark.parametrize(
    ("made", "further", "words"),
    [
        ({"diverges": False}, {}, "did not diverge up to 1"),
        ({"at": 1e-6}, {}, "fell from the lowest rate on"),
        ({"fall": 1.0, "noise": 0.5}, {}, "The noise of a step is"),
        ({}, {"passes": 2.5}, "Each example was seen 2.5 times"),
        ({}, {"won": [0.25] * 121}, "won 25.0% of the updates"),
    ],
)
def test_doubts(made, further, words):
    found, losses = curve(**made)
    if "won" in further:
        further = {"won": further["won"][: len(losses)]}
    assert any(words in line for line in sweep_of(found, losses, **further).doubts)


def test_few_steps_are_a_doubt():
    found = evidence_of(RATES[::8], 4 - np.arange(16.0) / 8, diverged=False)
    sweep = SweptRate("learning_rate", None, RATES[::8], np.ones(16), np.array([]), found, 0.1)
    assert any("2.5 steps per decade are few" in line for line in sweep.doubts)


def test_a_wide_range_has_a_noise():
    rates = np.geomspace(1e-30, 1e30, 20)
    found = evidence_of(rates[:12], 4 + np.arange(12) % 3 / 9, diverged=True)
    assert found.noise == pytest.approx(1 / 9)
    assert np.isfinite(found.fall)
    sweep = SweptRate("learning_rate", None, rates, np.ones(20), np.array([]), found, 0.1)
    assert any("0.32 steps per decade are few" in line for line in sweep.doubts)


def test_options_of_a_training_are_taken():
    """Those without effect are left out, in one line; recipes have a schedule."""
    with pytest.warns(UserWarning, match="Without effect in a range test: ") as caught:
        settings = RateSettings(
            save_steps=10,
            max_time=60.0,
            eval_steps=5,
            validation_data="other.jsonl",
            warmup_ratio=0.3,
            lora_learning_rate=0.0,
        )
    (warning,) = caught
    names = ("save_steps", "max_time", "eval_steps", "validation_data", "lora_learning_rate")
    assert all(name in str(warning.message) for name in names)
    training = settings.training
    assert training.lora_learning_rate is None
    assert "warmup_ratio" not in str(warning.message)
    assert (training.warmup_ratio, training.lr_scheduler_type) == (0, "constant")
    assert RateSettings(max_steps=None).training.max_steps == 120


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "0"], "Invalid from=0. Must be finite and greater than 0."),
        (["--to", "inf"], "Invalid to=inf."),
        (["--from", "1e-3", "--to", "5e-3"], "covers a factor of 10 or more"),
        (["--from", "much"], "--from"),
        (["--max_steps", "5"], "Invalid max_steps=5 for a range test. Must be at least 20."),
        (["--max_steps", "0"], "Invalid max_steps=0"),
        (["--dry_run"], "Invalid dry_run of a range test"),
        (["--resume"], "Invalid resume of a range test"),
        (["--model", "{tmp}/gone"], "gone"),
    ],
)
def test_wrong_input(given, tmp_path, capsys, arguments, words):
    path = tmp_path / "rates"
    more = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    kept = given[:2] + given[4:] if "--model" in more else given
    capsys.readouterr()
    assert main(["lr", *kept, *more, "--output_dir", str(path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert words in error
    assert not path.exists()


def test_without_matplotlib(given, tmp_path, capsys, monkeypatch):
    from molf import inputs

    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    assert main(["lr", *given, "--output_dir", str(tmp_path / "rates")]) == 2
    assert "molf lr needs matplotlib" in capsys.readouterr().err
