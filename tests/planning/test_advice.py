"""Suggestions: each is planned, and fits."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from molf.errors import InputError
from molf.planning.advice import suggestions
from molf.planning.devices import DEVICES, GIB, Device
from molf.planning.memory import Planner
from molf.planning.workload import Workload
from plan_memory import method_config


@dataclass(frozen=True)
class Small(Device):
    """A device of some bytes."""

    room: int = 0

    @property
    def usable(self):
        return self.room


@pytest.fixture(scope="module")
def planner(untied):
    return Planner(untied)


@pytest.fixture
def workload():
    return Workload(
        method="molf", config=method_config("molf", ranks=(4,)), batch_size=4, length=128
    )


MODULES = ("q_proj", "up_proj")
FROZEN_BASE = {m: method_config(m, target_modules=MODULES) for m in ("molf-e", "lora")}


def find(planner, workload, room):
    return suggestions(planner, workload, Small(0, room), FROZEN_BASE)


class Endless:
    """A planner of a model that no change makes fit."""

    def step_peak(self, workload):
        return 2**60


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("molf", {"nonfinite": "skip"}),
        ("lora", {"optimizer_in_backward": True}),
    ],
)
def test_changes_that_other_options_exclude_are_left_out(method, options):
    config = method_config(method, ranks=(4,))
    workload = Workload(method=method, config=config, batch_size=2, length=256, **options)
    assert find(Endless(), workload, 2**30) == []


@pytest.mark.parametrize("option", ["optimizer_in_backward", "state_offload"])
def test_a_score_that_compares_layers_excludes_changes(option):
    config = replace(method_config("molf"), score="share:0.3:epd")
    workload = Workload(method="molf", config=config, batch_size=2, length=256)
    with pytest.raises(InputError, match=f"Invalid score=share:0.3:epd with {option}"):
        replace(workload, **{option: True})
    assert find(Endless(), workload, 2**30) == []


class OnManyGpus:
    """A planner of a model that fits several GPUs alone."""

    def step_peak(self, workload):
        return 1 if workload.devices > 1 else 2**60

    def memory(self, workload):
        return SimpleNamespace(peak=1)


@pytest.mark.parametrize("quantised", [None, "load_in_4bit"])
def test_a_quantised_base_is_not_divided_over_gpus(quantised):
    lora = method_config("lora", ranks=(4,))
    alone = Workload(method="lora", config=lora, batch_size=1, length=128, quantised=quantised)
    changes = [found.changes for found in find(OnManyGpus(), alone, 2**30)]
    assert changes == ([("--num_gpus 2",)] if quantised is None else [])


@pytest.mark.slow
def test_single_changes_come_first(planner, workload):
    peak = planner.memory(workload).peak
    found = find(planner, workload, peak - 1)
    texts = [" ".join(suggestion.changes) for suggestion in found]
    assert texts[:5] == [
        "--gradient_checkpointing",
        "--per_device_train_batch_size 2",
        "--state_dtype 8bit",
        "--dtype bfloat16",
        "--dtype bfloat16 --weight_rounding stochastic",
    ]
    # The buffers of a tiny model's collectives may take more than its halves save.
    two = planner.memory(replace(workload, num_gpus=2)).peak
    assert ("--num_gpus 2" in texts) == (two < peak)
    for suggestion in found:
        assert len(suggestion.changes) == 1
        assert suggestion.peak == planner.memory(suggestion.workload).peak < peak


@pytest.mark.slow
def test_the_least_change_of_an_option(planner, workload):
    """The batch is halved as often as needed and not once more."""
    peaks = {
        size: planner.memory(replace(workload, batch_size=size, accumulates=True, padded=size > 1))
        for size in (2, 1)
    }
    found = find(planner, workload, peaks[2].peak - 1)
    batch = [s for s in found if "batch_size" in s.changes[0]]
    assert [s.workload.batch_size for s in batch] == [1]


@pytest.mark.slow
def test_changes_together(planner):
    """What costs least is granted, where nothing alone is enough."""
    workload = Workload(
        method="fft", config=None, batch_size=2, length=100, dtype="bfloat16", num_gpus=64
    )
    both = replace(workload, checkpointing=True, batch_size=1, accumulates=True, padded=False)
    room = planner.memory(both).peak
    first, *others = [s for s in find(planner, workload, room) if len(s.changes) == 2]
    assert first.changes == ("--gradient_checkpointing", "--per_device_train_batch_size 1")
    assert first.peak == room
    assert all(s.changes[0] == "--gradient_checkpointing" and s.peak <= room for s in others)


@pytest.mark.slow
def test_a_frozen_base(tiny):
    wide = type(tiny)(**{**tiny.to_dict(), "hidden_size": 512, "intermediate_size": 2048})
    config = method_config("molf", ranks=(8,), target_modules=MODULES)
    workload = Workload(method="molf", config=config, batch_size=1, length=100)
    planner = Planner(wide)
    found = find(planner, workload, planner.memory(workload).peak // 2)
    methods = {s.changes: s.workload for s in found if s.workload.method != "molf"}
    assert methods.keys() == {("--method molf-e",), ("--method lora",)}
    few = find(planner, workload, planner.memory(methods[("--method lora",)]).peak - 1)
    assert "--method lora --load_in_8bit" in [" ".join(s.changes) for s in few]
    for changed in methods.values():
        assert changed.config == FROZEN_BASE[changed.method]


@pytest.mark.slow
def test_nothing_is_enough(planner, workload):
    assert find(planner, workload, 1000) == []


def test_devices():
    assert [device.name for device in DEVICES] == ["24 GB", "40 GB", "80 GB", "141 GB"]
    small = DEVICES[0]
    assert small.usable == pytest.approx((24 * 0.95 - 1) * GIB, abs=1)
    assert small.fits(small.usable)
    assert not small.fits(small.usable + 1)
