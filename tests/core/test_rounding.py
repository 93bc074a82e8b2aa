"""Splitting, joining and stochastic rounding of float32 values for bfloat16 parameters."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from molf.core.storage.rounding import (
    RoundingKey,
    join_float32,
    join_rounded,
    low_bits,
    random_bits,
    round_stochastic,
    round_stochastic_float16,
    split_float32,
)

LOWS = [0, 1, 2, 0x4000, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF]
LARGEST = 0x7F7F  # the largest finite bfloat16
CPU = torch.device("cpu")
KEY = RoundingKey.of(0, "layer", 1)


def from_bits(bits) -> Tensor:
    """float32 values with the given 32 bits, moved as integers so that no NaN is touched."""
    unsigned = np.asarray(bits, dtype=np.int64) & 0xFFFFFFFF
    return torch.from_numpy(unsigned.astype(np.uint32).view(np.int32)).view(torch.float32)


def bits_of(values: Tensor) -> np.ndarray:
    """The bits of float32 or bfloat16 values as unsigned numbers in int64."""
    width = 8 * values.element_size()
    signed = values.view({16: torch.int16, 32: torch.int32}[width]).numpy().astype(np.int64)
    return signed & ((1 << width) - 1)


def every_high() -> np.ndarray:
    """All 65,536 upper halves with each of the chosen lower halves, as bits."""
    return ((np.arange(1 << 16)[:, None] << 16) | np.asarray(LOWS)).ravel()


def is_nan(bits: np.ndarray) -> np.ndarray:
    return (bits & 0x7FFFFFFF) > 0x7F800000


def is_shallow_nan(bits: np.ndarray) -> np.ndarray:
    """Signalling NaNs whose payload lies in the low half alone."""
    return is_nan(bits) & ((bits >> 16) & 0x7F == 0)


def random_values(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_split_then_join_gives_back_the_bits():
    bits = every_high()
    back = bits_of(join_float32(*split_float32(from_bits(bits))))
    expected = np.where(is_shallow_nan(bits), bits | 0x00400000, bits)
    np.testing.assert_array_equal(back, expected)


def test_split_then_join_gives_back_any_bits():
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 1 << 20)
    back = bits_of(join_float32(*split_float32(from_bits(bits))))
    np.testing.assert_array_equal(back[~is_shallow_nan(bits)], bits[~is_shallow_nan(bits)])


def test_join_then_split_is_the_identity_on_what_split_gives():
    """So a parameter and its low part never drift: what is read is what was written."""
    high, low = split_float32(from_bits(every_high()))
    again_high, again_low = split_float32(join_float32(high, low))
    np.testing.assert_array_equal(bits_of(again_high), bits_of(high))
    assert torch.equal(again_low, low)


def test_high_part_is_the_nearest_bfloat16_with_ties_away():
    bits = every_high()
    bits = bits[~is_nan(bits)]
    high, low = split_float32(from_bits(bits))
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    np.testing.assert_array_equal(bits_of(high), ((bits + 0x8000) >> 16) & 0xFFFF)
    np.testing.assert_array_equal(low.numpy(), bits - (((bits + 0x8000) >> 16) << 16))
    # Away from ties torch's conversion, to nearest and even, is the same.
    tie = bits & 0xFFFF == 0x8000
    same = from_bits(bits[~tie]).to(torch.bfloat16)
    np.testing.assert_array_equal(bits_of(high)[~tie], bits_of(same))
    assert set(low[torch.from_numpy(tie)].tolist()) == {-32768}


def test_nan_stays_nan_in_the_parameter():
    bits = every_high()
    high, _ = split_float32(from_bits(bits))
    assert torch.equal(high.isnan(), torch.from_numpy(is_nan(bits)))
    (high, low) = split_float32(from_bits([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]))
    assert high.isnan().all()
    np.testing.assert_array_equal(
        bits_of(join_float32(high, low)), [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001]
    )


def test_infinity_and_the_largest_values():
    values = from_bits([0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF])
    high, low = split_float32(values)
    assert high.isinf().tolist() == [True, True, True, True, False]
    assert low.tolist() == [0, 0, -1, -32768, 0x7FFF]
    assert torch.equal(join_float32(high, low), values)


@pytest.mark.parametrize("layout", ["transposed", "strided", "empty", "0-dim"])
def test_any_layout(layout):
    values = {
        "transposed": random_values(12, 0).view(3, 4).t(),
        "strided": random_values(12, 0)[::3],
        "empty": torch.empty(0, 3),
        "0-dim": torch.tensor(1.2345),
    }[layout]
    high, low = split_float32(values)
    assert high.shape == low.shape == values.shape
    assert torch.equal(join_float32(high, low), values)
    packed = values.contiguous()
    assert torch.equal(round_stochastic(values, KEY), round_stochastic(packed, KEY))


def test_wrong_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"Invalid values of dtype torch.float64"):
        split_float32(torch.ones(1, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"Invalid values of dtype torch.bfloat16"):
        round_stochastic(torch.ones(1, dtype=torch.bfloat16), KEY)
    with pytest.raises(TypeError, match=r"Must be torch.bfloat16, torch.int16"):
        join_float32(torch.ones(1), torch.ones(1, dtype=torch.int16))


def test_stochastic_takes_one_of_the_two_neighbours():
    bits = every_high()
    rounded = bits_of(round_stochastic(from_bits(bits), KEY))
    nan = is_nan(bits)
    np.testing.assert_array_equal(is_nan(rounded[nan] << 16), True)
    bits, rounded = bits[~nan], rounded[~nan]
    below, exact = bits >> 16, bits & 0xFFFF == 0
    np.testing.assert_array_equal(rounded[exact], below[exact])
    largest = below & 0x7FFF == LARGEST
    np.testing.assert_array_equal(rounded[largest], below[largest])
    between = ~exact & ~largest
    steps = (rounded - below)[between]
    assert set(steps.tolist()) == {0, 1}  # away from zero is up, as bits count


def test_stochastic_goes_up_as_often_as_the_draw_says():
    """The share of draws that carry is low / 65536: with the 16 bits uniform, no bias is left."""
    values = from_bits(np.full(1 << 16, 0x3F800000 + 0x1234))
    draws = random_bits(KEY, 0, values.numel(), CPU)
    went_up = torch.from_numpy(bits_of(round_stochastic(values, KEY)) == 0x3F81)
    assert torch.equal(went_up, draws + 0x1234 >= 0x10000)


@pytest.mark.parametrize("scale", [1.0, 1e-39, 1e30])  # 1e-39: subnormal
def test_mean_of_1000_repeats_is_the_value(scale):
    values = scale * random_values(400, 1)
    repeats = torch.stack(
        [
            round_stochastic(values, RoundingKey.of(7, "layer", step)).double()
            for step in range(1000)
        ]
    )
    # The exact standard error: a draw is Bernoulli between the two neighbours.
    below = from_bits((bits_of(values) >> 16) << 16).double()
    above = from_bits(((bits_of(values) >> 16) + 1) << 16).double()
    share = (values.double() - below) / (above - below)
    error = (above - below).abs() * (share * (1 - share) / 1000).sqrt()
    z = (repeats.mean(0) - values.double()) / error
    assert z.isfinite().all()
    # Within 3 standard errors over all elements, and singly but for what chance leaves outside.
    assert abs(z.mean().item()) * 400**0.5 < 3
    assert (z.abs() > 3).sum() <= 5  # 1.1 expected
    assert 0.8 < z.std().item() < 1.2


def test_small_updates_survive_on_average():
    """What rounding to nearest loses: 200 steps, each a 50th of a unit in the last place."""
    weight = torch.ones(4096)
    update = 2**-7 / 50
    nearest, stochastic = weight.bfloat16(), weight.bfloat16()
    for step in range(200):
        nearest = (nearest.float() + update).bfloat16()
        key = RoundingKey.of(0, "weight", step)
        stochastic = round_stochastic(stochastic.float() + update, key)
    assert torch.equal(nearest, weight.bfloat16())
    moved = (stochastic.float() - 1).mean().item() / (200 * update)
    # 4 units are expected, with a deviation of 2 in one element: 0.8% over 4,096.
    assert abs(moved - 1) < 0.03


def expected_draws(key: RoundingKey, first: int, count: int) -> np.ndarray:
    """The definition, once more, in unsigned arithmetic."""

    def mix(x):
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x85EBCA6B)
        x ^= x >> np.uint32(13)
        x *= np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    index = np.arange(first, first + count, dtype=np.uint64)
    low, high = index.astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
    mixed = mix(low ^ np.uint32(key.first)) ^ np.uint32(key.second) ^ high * np.uint32(0x9E3779B9)
    return (mix(mixed) >> np.uint32(16)).astype(np.int64)


@pytest.mark.parametrize("first", [0, 5, (1 << 32) - 100, 1 << 40])
@pytest.mark.parametrize("key", [KEY, RoundingKey(0, 0), RoundingKey(0xFFFFFFFF, 0x80000000)])
def test_draws_are_the_defined_hash(key, first):
    drawn = random_bits(key, first, 1000, CPU)
    assert drawn.dtype == torch.int32
    np.testing.assert_array_equal(drawn.numpy(), expected_draws(key, first, 1000))


def test_draws_belong_to_elements_and_not_to_parts():
    values = random_values(1000, 2)
    whole = round_stochastic(values, KEY)
    parts = [round_stochastic(values[a:b], KEY, a) for a, b in ((0, 1), (1, 333), (333, 1000))]
    assert torch.equal(torch.cat(parts), whole)


def test_key_depends_on_seed_name_and_step():
    """And on nothing else: the digest is written out here."""
    digest = hashlib.blake2b(b"3/model.layers.0/17", digest_size=8).digest()
    expected = tuple(int.from_bytes(word, "little") for word in (digest[:4], digest[4:]))
    assert RoundingKey.of(3, "model.layers.0", 17) == expected
    keys = {RoundingKey.of(s, n, t) for s in range(3) for n in "ab" for t in range(9)}
    assert len(keys) == 54


def test_draws_are_uniform_and_uncorrelated():
    """Within a tensor, between neighbours, between steps, between names."""
    count = 1 << 18
    draws = {
        (name, step): random_bits(RoundingKey.of(0, name, step), 0, count, CPU).double()
        for name in ("a", "b")
        for step in (1, 2)
    }
    for drawn in draws.values():
        filled = torch.histc(drawn, 256, 0, 65536)
        expected = count / 256
        chi_square = ((filled - expected) ** 2 / expected).sum().item()
        assert 160 < chi_square < 370  # 255 degrees of freedom: mean 255, deviation 23

    def correlation(x: Tensor, y: Tensor) -> float:
        return torch.corrcoef(torch.stack([x, y]))[0, 1].item()

    one = draws["a", 1]
    pairs = [(one[:-lag], one[lag:]) for lag in (1, 2, 3, 64, 1024, 4096)]
    pairs += [(one, draws["a", 2]), (one, draws["b", 1]), (draws["b", 2], draws["a", 2])]
    for x, y in pairs:
        assert abs(correlation(x, y)) < 5 / count**0.5


def test_what_was_rounded_stochastically_is_joined_to_the_same_bits():
    bits = every_high()
    values = from_bits(bits)
    values = values[values.abs() < 3.3e38]  # below the largest finite bfloat16 but one
    for step in range(3):
        key = RoundingKey.of(step, "layer", 0)
        high = round_stochastic(values, key, first=7)
        back = join_rounded(high, low_bits(values), key, first=7)
        assert np.array_equal(bits_of(back), bits_of(values))


def test_float16_is_rounded_to_a_neighbour_without_bias():
    for scale in (1.0, 0.02, 3e-5, 3e-7):  # the last two are subnormal
        values = (scale * random_values(200, 0)).abs() + 1e-8
        nearest = values.half().numpy()
        below = np.where(nearest <= values.numpy(), nearest, np.nextafter(nearest, np.float16(0)))
        above = torch.from_numpy(np.nextafter(below, np.float16(np.inf))).float()
        below = torch.from_numpy(below).float()
        keys = [RoundingKey.of(seed, "layer", 0) for seed in range(400)]
        drawn = torch.stack([round_stochastic_float16(values, key).float() for key in keys])
        assert bool(((drawn == below) | (drawn == above)).all())
        assert ((drawn.mean(0) - values) / (above - below)).mean().abs() < 0.01
        assert torch.equal(round_stochastic_float16(-values, keys[0]), -drawn[0].half())


def test_float16_keeps_what_it_holds_and_what_is_not_finite():
    held = torch.tensor([0.0, -0.0, 1.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-14)])
    assert torch.equal(round_stochastic_float16(held, KEY), held.half())
    assert round_stochastic_float16(torch.full((100,), 65510.0), KEY).isfinite().all()
    beyond = round_stochastic_float16(torch.tensor([1e6, -torch.inf, torch.nan]), KEY)
    assert beyond.tolist()[:2] == [torch.inf, -torch.inf]
    assert beyond[2].isnan()
