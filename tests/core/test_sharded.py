"""Steps on shards (FSDP2, HSDP), beside DDP and one process; one world of four processes."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import sharded_world
from molf.core.options import OptionError, check_exclusions
from sharded_checks import assert_as_one_process, assert_resharded, winners_of
from sharded_models import joined, trained
from sharded_world import CHECKPOINTS, PARITY, RESHARDED, SCORES, SHARDS, STORAGES, WORLD

pytestmark = pytest.mark.slow  # the world of four processes takes a quarter of a minute


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def world(folder) -> list[dict]:
    """What all processes have come to, by scenario."""
    return sharded_world.start(folder)


@cache
def one_process(form: str, **options):
    return trained(form, **options)


@cache
def one_process_fed(storage: str, conv: bool):
    return joined([sharded_world.fed(storage, conv)])


def on_all(world: list[dict], scenario: str, key=None, shards: int = WORLD) -> list:
    found = [one[scenario] for one in world[:shards]]
    return found if key is None else [one[key] for one in found]


@pytest.mark.parametrize("case", PARITY[False], ids=str)
def test_winners_and_weights_are_those_of_one_process(world, case):
    form, name, _ = case
    found = on_all(world, "winner_parity", case, SHARDS.get(name, int(name[-1])))
    assert_as_one_process(found, one_process(form))


def test_full_and_lora_experts_win():
    """Else the trainings above would show half of a step."""
    for form in ("folded", "folded-conv", "explicit", "frozen"):
        won = {w for step in winners_of(one_process(form)) for w in step.values()}
        assert len(won) > 1, form
        assert (("full",) in won) == (form != "frozen")


@pytest.mark.parametrize("score", SCORES[False])
def test_every_score_has_the_winners_of_one_process(world, score):
    found = on_all(world, "scores", score, 3)
    assert_as_one_process(found, one_process("folded", score=score))


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_same_gradients_give_the_same_bits(world, storage, name, conv):
    """Matrices: all bits. A vector may end inside of a shard, where torch's kernel rounds alone."""
    parts = on_all(world, "same_gradients", (storage, conv, name), SHARDS[name])
    got, expected = joined(parts), one_process_fed(storage, conv)
    assert got.keys() == expected.keys()
    codes = {key for key in got if key.endswith("_codes")}
    assert bool(codes) == ("8bit" in storage)
    assert any(key.endswith("/low") for key in got) == storage.startswith("exact")
    for key, value in expected.items():
        if not torch.is_tensor(value):
            assert got[key] == value, key
            continue
        assert got[key].dtype == value.dtype, key
        if "/lora_B_exp_avg" in key:  # a product of other shapes
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-7)
            continue
        different = (got[key] != value).sum().item()
        assert different <= (12 if value.dim() == 1 else 0), key
        if different and not key.endswith("/low"):
            torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-9)


def test_shards_of_the_bits_are_uneven_and_empty(world):
    def rows(storage: str, name: str) -> list[int]:
        found = on_all(world, "same_gradients", (storage, False, "4"))
        return [len(one[name][0]) for one in found]

    assert rows("exact", "few.weight/") == [1, 1, 1, 0]
    assert rows("8bit", "up.weight/exp_avg_codes") == [17, 17, 17, 14]


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_the_order_of_an_accelerator_changes_no_winner(world, form):
    assert_as_one_process(on_all(world, "on_an_accelerator", form), one_process(form))


def test_collectives_have_the_bytes_of_the_formula(world):
    for found in on_all(world, "traffic_of_a_step"):
        *folded, adapter = found
        assert len(folded) == 2
        for row in folded:
            assert row["counted"] == row["formula"]
            assert row["counted"]["operands"] > 0
            assert row["fsdp"] == row["fsdp_formula"]
        assert adapter["counted"] == adapter["formula"]


@pytest.mark.parametrize("name", ["3", "2x2"])
def test_update_fidelity_is_that_of_one_process(world, name):
    expected = sharded_world.fidelity_on()
    for found in on_all(world, "fidelity", name, SHARDS[name]):
        for got, own in zip(found, expected, strict=True):
            assert own[0] > 0.1
            assert got == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize("form", ["folded", "frozen"])
@pytest.mark.parametrize("kind", ["nan", "inf", "large", "loss"])
def test_a_bad_number_in_one_process_is_refused_by_all_alike(world, form, kind):
    where = "up.weight" if form == "folded" else "up.lora_B.default.weight"
    reason = {
        "nan": f"Non-finite gradient in {where}",
        "inf": f"Non-finite gradient in {where}",
        "large": f"Gradient too large in {where}",
        "loss": "Non-finite loss (nan)",
    }[kind]
    raised = on_all(world, "nonfinite", (form, kind, "raise"))
    skipped = on_all(world, "nonfinite", (form, kind, "skip"))
    assert on_all(world, "nonfinite", (form, kind, "late")) == raised
    assert raised == raised[:1] * WORLD
    assert skipped == skipped[:1] * WORLD
    assert raised[0]["message"].startswith(f"NonFiniteError: {reason}")
    assert raised[0]["same"]
    assert skipped[0]["message"] == ""
    assert skipped[0]["reasons"][0].startswith(reason)
    assert skipped[0]["skipped"] == 1
    assert skipped[0]["same"]


def test_cpu_offload_policy_changes_nothing(world):
    assert_as_one_process(on_all(world, "policies", "offload"), one_process("folded"))


def test_mixed_precision_keeps_float32_shards(world):
    found = on_all(world, "policies", "mixed")
    assert all(winners_of(one) == winners_of(found[0]) for one in found)
    for name, expected in one_process("folded")["weights"].items():
        assert found[0]["weights"][name].dtype == torch.float32
        torch.testing.assert_close(found[0]["weights"][name], expected, rtol=0, atol=0.05)


def test_bfloat16_shards_are_exact(world):
    for found in on_all(world, "policies", "exact"):
        assert found["routing"]
        for name, values in found["weights"].items():
            high = found["high"][name]
            assert high.dtype == torch.bfloat16
            torch.testing.assert_close(values, high.float(), rtol=2**-8, atol=0)
        pairs = [(n, x, found["high"][n].float()) for n, x in found["weights"].items()]
        exact = [name for name, values, high in pairs if not torch.equal(values, high)]
        assert {"embed.weight", "up.weight", "down.weight"} <= set(exact)
        assert "restore_float32 is not possible with sharded parameters" in found["restore"]


@pytest.mark.parametrize("form", ["folded", "folded-conv", "frozen"])
def test_factors_are_set_and_read_whole(world, form):
    for given, got in on_all(world, "factors", form):
        for pair, own in zip(given, got, strict=True):
            torch.testing.assert_close(own, pair, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_frozen_whole_parts_are_left_alone(world, form):
    """A whole frozen parameter beside shards has no gradient to be summed."""
    expected = trained(form, model=sharded_world.partly_frozen())
    assert_as_one_process(on_all(world, "frozen_whole", form, 2), expected)


def test_the_size_of_buckets_changes_no_bit(world):
    for found in on_all(world, "buckets"):
        assert found["one"].keys() == found["all"].keys()
        for name, value in found["one"].items():
            assert torch.equal(value, found["all"][name]), name


_BEFORE = "RuntimeError: No parameter of the optimizer has a gradient. Was it built before fully_"
REFUSALS = {
    "columns": "ShardingError: The weight of layer up is a DTensor with placements (Shard(dim=",
    "columns fft": "ShardingError: embed.weight is a DTensor with placements (Shard(dim=1),)",
    "replicated": "ShardingError: The weight of layer up is a DTensor with placements (Replica",
    "replicated fft": "ShardingError: embed.weight is a DTensor with placements (Replicate(),)",
    "two shards": "ShardingError: The weight of layer up is a DTensor with placements (Shard(d",
    "two shards fft": "ShardingError: embed.weight is a DTensor with placements (Shard(dim=0),",
    "mixed": "ShardingError: up.weight is sharded (DTensor) and down.weight is not: their grad",
    "mixed fft": "ShardingError: up.weight is sharded (DTensor) and embed.weight is not: their",
    "adapted late": "ShardingError: up.weight is sharded (DTensor) and up.lora_A.default.weigh",
    "two meshes": "ShardingError: up.weight is sharded over DeviceMesh((4,), 'cpu', stride=(1,))",
    "optimizer_in_backward": "OptionError: optimizer_in_backward=True is not possible with 4 p",
    "state_offload": "OptionError: state_offload=True is not possible with sharded parameters:",
    "kernels": "ValueError: kernels='triton' needs CUDA, and up.weight is on cpu",
    "grad_accumulation_dtype": "OptionError: grad_accumulation_dtype='float32' is not possible",
    "built before folded": _BEFORE,
    "built before fft": _BEFORE,
    "swapped with offload": "OptionError: state_offload=True is not possible with sharded para",
    "swapped columns": "ShardingError: up.weight is a DTensor with placements (Shard(dim=1),).",
    "unsharded": "RuntimeError: Parameter embed.weight is gathered in the model, by a forward",
    "sharded state": "ValueError: The optimizer state is sharded and the parameters are not. L",
}


def test_refusals_are_the_same_in_all_processes(world):
    first, *others = on_all(world, "refusals")
    assert all(one == first for one in others)
    assert first.keys() == {*REFUSALS, "swapped", "sharded again"}
    assert first["swapped"] == ""  # accelerate's replacement by position is no error
    assert first["sharded again"] == ""
    assert not any("\n" in message for message in first.values())


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name(world, name):
    message = world[0]["refusals"][name]
    assert message.startswith(REFUSALS[name]), message


def test_kernels_are_refused_with_shards():
    with pytest.raises(OptionError, match=r"^kernels='triton' is not possible with sharded param"):
        check_exclusions({"shards": 4, "kernels": "triton"})


def test_a_state_of_one_process_is_cut(world):
    found = on_all(world, "meeting")
    expected = joined([found[0]["whole"]])
    for key in ("state", "again"):
        got = joined([one[key] for one in found])
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            same = torch.equal(got[name], value) if torch.is_tensor(value) else got[name] == value
            assert same, name


@pytest.mark.parametrize("name", CHECKPOINTS[False])
@pytest.mark.parametrize(("source", "target"), [*RESHARDED, ("4", "1"), ("2x2", "1")])
def test_checkpoints_load_in_any_number_of_processes(world, folder, name, source, target):
    assert_resharded(on_all(world, "checkpoints"), folder, name, source, target)
