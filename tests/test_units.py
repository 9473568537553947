"""Units: every value here is worked out by hand from the definitions of the prefixes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtp_sim.errors import InputError
from rtp_sim.units import (
    format_bandwidth,
    format_bytes,
    format_count,
    format_time,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_time_ns,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80 GB", 80_000_000_000),
        ("25 MiB", 26_214_400),
        ("25MiB", 26_214_400),
        (" 1.5 KiB ", 1536),
        ("0 B", 0),
        ("1e3 B", 1000),
        ("16_914_055_168 B", 16_914_055_168),
        ("0.1 GB", 100_000_000),
        ("64 kB", 64_000),
    ],
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("400 Gb/s", 50_000_000_000),  # a network port speaks bits
        ("300 GB/s", 300_000_000_000),
        ("200Gb/s", 25_000_000_000),
        ("1 Gib/s", 134_217_728),
        ("2 GiB/s", 2_147_483_648),
        ("8 b/s", 1),
    ],
)
def test_bandwidth(text: str, expected: int) -> None:
    assert parse_bandwidth(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.5 us", 2500),
        ("2.5 µs", 2500),
        ("4 ms", 4_000_000),
        ("1 s", 10**9),
        ("2 min", 120 * 10**9),
        ("7ns", 7),
    ],
)
def test_time(text: str, expected: int) -> None:
    assert parse_time_ns(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("312 TFLOP/s", 312 * 10**12), ("98.5 GFLOP/s", 98_500_000_000), ("1 EFLOP/s", 10**18)],
)
def test_flops(text: str, expected: int) -> None:
    assert parse_flops(text) == expected


@pytest.mark.parametrize(
    ("parse", "text", "reason"),
    [
        (parse_bytes, "80", "without a unit"),
        (parse_bytes, "-1 GB", "negative"),
        (parse_bytes, "80 Gb", "unknown unit 'Gb'"),  # bits are no size
        (parse_bytes, "80 GB/s", "unknown unit 'GB/s'"),
        (parse_bytes, "many GB", "given 'many GB'"),
        (parse_bytes, "nan GB", "given 'nan GB'"),
        (parse_bytes, "", "given ''"),
        (parse_bandwidth, "400 Gbps", "unknown unit 'Gbps'"),
        (parse_bandwidth, "400 GB", "unknown unit 'GB'"),
        (parse_bandwidth, "400", "without a unit"),
        (parse_time_ns, "3", "without a unit"),
        (parse_time_ns, "3 days", "unknown unit 'days'"),
        (parse_flops, "312 TFLOPS", "unknown unit 'TFLOPS'"),
    ],
)
def test_a_mistake_is_told_with_what_was_given_and_an_example(
    parse: Callable[[str], int], text: str, reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    message = str(caught.value)
    assert reason in message
    assert "expected" in message
    assert "for example" in message


def test_a_bare_number_is_refused_too() -> None:
    with pytest.raises(InputError, match="given 80, expected a size"):
        parse_bytes(80)  # type: ignore[arg-type]  # what a user's TOML may hold


@given(st.integers(min_value=0, max_value=10**15))
def test_whole_bytes_survive(size_bytes: int) -> None:
    assert parse_bytes(f"{size_bytes} B") == size_bytes


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_bytes(512), "512 B"),
        (format_bytes(80 * 2**30), "80.0 GiB"),
        (format_bytes(1536), "1.50 KiB"),
        (format_bytes(1023.9), "1.00 KiB"),
        (format_bytes(-(2**20)), "-1.00 MiB"),
        (format_bandwidth(50e9), "50.0 GB/s"),
        (format_bandwidth(3.35e12), "3.35 TB/s"),
        (format_time(2500), "2.50 us"),
        (format_time(999_999), "1.00 ms"),
        (format_time(0), "0 ns"),
        (format_time(90e9), "90.0 s"),
        (format_count(999), "999"),
        (format_count(1_300_000_000), "1.30B"),
        (format_count(1_048_576), "1.05M"),
        (format_time(4_000e9), "4,000 s"),
    ],
)
def test_formats(shown: str, expected: str) -> None:
    assert shown == expected
