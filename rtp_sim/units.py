"""Quantities with units: a small closed grammar to read them, and short forms to show them to people.

A quantity is a number, optional blanks and a unit. Bytes: B with K, M, G, T, P (decimal) or Ki, Mi, Gi, Ti,
Pi (binary). Bandwidth: those per second, where a small b means bits (`400 Gb/s` is 50 GB/s). Time: ns, us,
ms, s, min, h. Compute: FLOP/s with K to E. Everything is exact decimal arithmetic until the last step, a
rounding to an integer. A missing or unknown unit, a negative or a non-finite number raises `InputError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

from rtp_sim.errors import InputError

_DECIMAL = {"": 1, "K": 10**3, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_PREFIXES = _DECIMAL | _BINARY

_BYTES = {f"{prefix}B": Fraction(factor) for prefix, factor in _PREFIXES.items()}
_BANDWIDTH = {f"{unit}/s": factor for unit, factor in _BYTES.items()} | {
    f"{prefix}b/s": Fraction(factor, 8) for prefix, factor in _PREFIXES.items()
}
_TIME_NS = {
    "ns": Fraction(1),
    "us": Fraction(10**3),
    "µs": Fraction(10**3),
    "μs": Fraction(10**3),
    "ms": Fraction(10**6),
    "s": Fraction(10**9),
    "min": Fraction(60 * 10**9),
    "h": Fraction(3600 * 10**9),
}
_FLOPS = {f"{prefix}FLOP/s": Fraction(factor) for prefix, factor in (_DECIMAL | {"E": 10**18}).items()}

_QUANTITY = re.compile(r"\s*([+-]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([^\d\s].*?)?\s*")


def parse_bytes(text: str) -> int:
    """Bytes in `text`: "80 GB" is 80 * 10^9, "25 MiB" is 25 * 2^20. Raises InputError."""
    return _parse(text, "a size", _BYTES, "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB", "80 GB")


def parse_bandwidth(text: str) -> int:
    """Bytes/s in `text`: "400 Gb/s" (bits) is 50 * 10^9, "300 GB/s" is 300 * 10^9. Raises InputError."""
    return _parse(text, "a bandwidth", _BANDWIDTH, "GB/s, MB/s, GiB/s or in bits Gb/s, Mb/s", "400 Gb/s")


def parse_time_ns(text: str) -> int:
    """Nanoseconds in `text`: "2.5 us" is 2500. Raises InputError."""
    return _parse(text, "a time", _TIME_NS, "ns, us, ms, s, min, h", "2.5 us")


def parse_flops(text: str) -> int:
    """FLOP per second in `text`: "312 TFLOP/s" is 312 * 10^12. Raises InputError."""
    return _parse(text, "a compute rate", _FLOPS, "FLOP/s, GFLOP/s, TFLOP/s, PFLOP/s", "312 TFLOP/s")


def _parse(text: str, what: str, units: Mapping[str, Fraction], unit_list: str, example: str) -> int:
    """The number times its unit, rounded half up to an integer."""
    expected = f'expected {what}: a number >= 0 and a unit ({unit_list}), for example "{example}"'
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"given {text!r}, {expected}")
    number, unit = Fraction(Decimal(match[1].replace("_", ""))), match[2]
    if unit is None:
        raise InputError(f"given {text!r} without a unit, {expected}")
    if unit not in units:
        raise InputError(f"given {text!r} with the unknown unit {unit!r}, {expected}")
    if number < 0:
        raise InputError(f"given the negative {text!r}, {expected}")
    return int(number * units[unit] + Fraction(1, 2))


def format_bytes(size_bytes: float) -> str:
    """Binary units, three digits or so: 85899345920 is "80.0 GiB", 512 is "512 B"."""
    return _scaled(size_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_bandwidth(bytes_per_s: float) -> str:
    """Decimal bytes per second: 50e9 is "50.0 GB/s"."""
    return _scaled(bytes_per_s, 1000, ("B/s", "KB/s", "MB/s", "GB/s", "TB/s", "PB/s"))


def format_time(time_ns: float) -> str:
    """The largest unit up to seconds that leaves a number >= 1: 2500 is "2.50 us", 90e9 is "90.0 s"."""
    return _scaled(time_ns, 1000, ("ns", "us", "ms", "s"))


def format_count(count: float) -> str:
    """Counts with K, M, B (10^9), T: 1_300_000_000 is "1.30B", 999 is "999"."""
    return _scaled(count, 1000, ("", "K", "M", "B", "T"), gap="")


def _scaled(value: float, base: int, units: tuple[str, ...], gap: str = " ") -> str:
    """Three significant digits in the unit that fits; integers below `base` are shown whole."""
    sign, rest = ("-", -value) if value < 0 else ("", value)
    step = 0
    while step + 1 < len(units) and _rounded(rest) >= base:
        rest, step = rest / base, step + 1
    whole = step == 0 and float(rest).is_integer()
    shown = str(int(rest)) if whole else f"{_rounded(rest):,.{_places(_rounded(rest))}f}"
    return f"{sign}{shown}{gap}{units[step]}" if units[step] else f"{sign}{shown}"


def _places(value: float) -> int:
    """Digits after the point that make three significant ones (none from 100 on)."""
    return 2 if value < 10 else 1 if value < 100 else 0


def _rounded(value: float) -> float:
    """`value` rounded to the digits shown, so that 999.96 KB turns into 1.00 MB and never 1000 KB."""
    exponent = Decimal(1).scaleb(-_places(value))
    return float(Decimal(repr(float(value))).quantize(exponent, rounding=ROUND_HALF_UP))
