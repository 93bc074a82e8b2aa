"""Times, sizes and numbers as text. A small amount never reads as zero."""

from __future__ import annotations

_YEAR = 365.25 * 86400  # seconds
# A value below the limit in this unit has these decimals.
_DECIMAL = ((1000, 1, 0, "bytes"), (100, 1e3, 0, "kB"), (10, 1e6, 1, "MB"), (1000, 1e6, 0, "MB"))


def fixed(value: float, digits: int) -> str:
    """Return a number with this many decimals, or with two significant digits if it is small."""
    return f"{value:.2g}" if 0 < abs(value) < 10 ** (1 - digits) else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """Return a time as text, such as `0.25 s`, `33.2 s`, `4 min 10 s`, `3 h 20 min` or `4 days`."""
    if seconds >= 2 * _YEAR:
        return f"{seconds / _YEAR:,.0f} years"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    days, hours = divmod(minutes // 60, 24)
    if days >= 3:
        return f"{round(minutes / 1440)} days"
    return f"{24 * days + hours} h {minutes % 60} min"


def decimal_size(size: float) -> str:
    """Return a size in bytes as text in powers of 1000, such as `1.3 MB`: files, transfers."""
    # The rounded value chooses: 999,600,000 bytes are 1.00 GB, not 1,000 MB.
    for below, unit, digits, name in _DECIMAL:
        if round(size / unit, digits) < below:
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size / 1e9:,.2f} GB"


def binary_size(size: float) -> str:
    """Return a size in bytes as text in powers of 1024, such as `1.25 GiB`: memory."""
    for unit, digits, name in ((1, 0, "bytes"), (2**10, 1, "KiB"), (2**20, 1, "MiB")):
        if round(size / unit, digits) < 1024:
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size / 2**30:,.2f} GiB"
