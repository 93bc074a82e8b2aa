"""Times, sizes and numbers as text."""

import pytest

from molf.amounts import binary_size, decimal_size, duration, fixed

HOUR = 3600


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (0.04, "0.04 s"),
        (0.25, "0.25 s"),
        (33.24, "33.2 s"),
        (59.97, "1 min"),
        (90, "1 min 30 s"),
        (599.7, "10 min"),
        (20 * 60 + 31, "21 min"),
        (HOUR - 1, "1 h 0 min"),
        (3 * HOUR + 20 * 60, "3 h 20 min"),
        (25 * HOUR, "25 h 0 min"),
        (100 * HOUR, "4 days"),
        (95.9 * HOUR, "4 days"),
        (1000 * 24 * HOUR, "3 years"),
    ],
)
def test_times(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("size", "decimal", "binary"),
    [
        (0, "0 bytes", "0 bytes"),
        (400, "400 bytes", "400 bytes"),
        (40_000, "40 kB", "39.1 KiB"),
        (100_000, "0.1 MB", "97.7 KiB"),
        (12_345_678, "12 MB", "11.8 MiB"),
        (2**30 - 2**20, "1.07 GB", "1,023.0 MiB"),
        (3_210_000_000, "3.21 GB", "2.99 GiB"),
        # The rounded value chooses the unit and the decimals.
        (999.6, "1 kB", "1,000 bytes"),
        (1023.6, "1 kB", "1.0 KiB"),
        (99_600, "0.1 MB", "97.3 KiB"),
        (2**20 - 1, "1.0 MB", "1.0 MiB"),
        (9_960_000, "10 MB", "9.5 MiB"),
        (999_600_000, "1.00 GB", "953.3 MiB"),
        (2**30 - 1, "1.07 GB", "1.00 GiB"),
    ],
)
def test_sizes(size, decimal, binary):
    assert (decimal_size(size), binary_size(size)) == (decimal, binary)


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (1234.5, 0, "1,234"),
        (0.32, 0, "0.32"),
        (4.06, 0, "4.1"),
        (1.25, 3, "1.250"),
        (0.05, 3, "0.050"),
        (0.00042, 3, "0.00042"),
        (-0.00042, 3, "-0.00042"),
        (0.0, 3, "0.000"),
        (float("nan"), 3, "nan"),
    ],
)
def test_numbers(value, digits, shown):
    assert fixed(value, digits) == shown
