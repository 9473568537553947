"""Values of flags: text in, a number or a pair out, or an argparse.ArgumentTypeError that says what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from rtp_sim.errors import InputError
from rtp_sim.units import parse_bandwidth, parse_time_ns


def fraction(text: str) -> float:
    """At least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction of 1 such as 0.15")
    return value


def amount(text: str) -> float:
    """Above 0, as 2e6."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount above 0 such as 2e6")
    return value


def duration_s(text: str) -> float:
    """ "30d", "12h": seconds."""
    unit = {"d": 86400.0, "h": 3600.0}.get(text[-1:], 0.0)
    try:
        value = float(text[:-1]) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in days or hours such as 30d")
    return value


def percent(text: str) -> float:
    """ "10%" or 0.1."""
    value = fraction(text[:-1]) / 100 if text.endswith("%") else fraction(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} leaves nothing: expected less than 100 %, such as 10%")
    return value


def probability(text: str) -> float:
    """At least 0 and below 1."""
    value = fraction(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability of at least 0 and below 1 such as 0.1")
    return value


def time_ns(text: str) -> int:
    """ "200us": nanoseconds."""
    return _quantity(parse_time_ns, text)


def bandwidth(text: str) -> int:
    """ "1GB/s": bytes per second."""
    return _quantity(parse_bandwidth, text)


def _quantity(parse: Callable[[str], int], text: str) -> int:
    try:
        return parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def factor(text: str) -> float:
    """Between 0.001 and 1e9."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.001 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a factor such as 1.5")
    return value


def slow_rank(text: str) -> tuple[int, int]:
    """ "1:1.5": rank and factor in thousandths."""
    rank, colon, times = text.partition(":")
    if not (rank.isdigit() and colon):
        raise argparse.ArgumentTypeError(f"{text!r} is not a rank and a factor such as 1:1.5")
    return int(rank), round(factor(times) * 1000)


def slow_gpu(text: str) -> tuple[int, float]:
    """ "3=1.3": rank and factor."""
    rank, equals, times = text.partition("=")
    if not (rank.isdigit() and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not a rank and a factor such as 3=1.3")
    return int(rank), factor(times)


def degraded_link(text: str) -> tuple[str, float]:
    """ "node0/gpu3->nvswitch=0.5": name of the link and fraction."""
    name, equals, share = text.rpartition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not a link and a fraction such as node0/gpu3->nvswitch=0.5")
    return name, fraction(share)


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def whole(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """ "1,2,4": whole numbers of at least 1."""
    return tuple(count(part) for part in text.split(","))
