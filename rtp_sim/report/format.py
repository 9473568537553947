"""How reports print quantities: as `units` does, a mark for what is not known, one unit along an axis."""

from __future__ import annotations

from collections.abc import Mapping

from rtp_sim import units

MISSING = "–"
_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_SIZE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def digits(value: float) -> str:
    """About three significant digits, never in exponent form: 0.123, 1.23, 12.3, 123."""
    magnitude = abs(value)
    decimals = 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2 if magnitude >= 0.9995 else 3
    return f"{value:.{decimals}f}"


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which to print times up to `seconds`: its length in seconds and its name."""
    return next(((scale, unit) for scale, unit in _TIME_UNITS if abs(seconds) >= scale), _TIME_UNITS[-1])


def size_unit(size_bytes: float) -> tuple[int, str]:
    """The unit in which to print sizes up to `size_bytes`: its bytes and its name."""
    return next(((scale, unit) for scale, unit in _SIZE_UNITS if abs(size_bytes) >= scale), _SIZE_UNITS[-1])


def format_seconds(seconds: float | None) -> str:
    """1.23 ms. The missing mark for None."""
    return MISSING if seconds is None else units.format_time(round(seconds * 1e9, 6))


def format_bytes(size_bytes: float | None) -> str:
    """1.23 GiB. The missing mark for None."""
    return MISSING if size_bytes is None else units.format_bytes(size_bytes)


def format_count(value: float | None) -> str:
    """12.3K. The missing mark for None."""
    return MISSING if value is None else units.format_count(value)


def format_percent(fraction: float | None) -> str:
    """0.4567 -> 45.7 %. The missing mark for None."""
    return MISSING if fraction is None else f"{100 * fraction:.1f} %"


def format_shares(shares: Mapping[str, float]) -> str:
    """{"measured": 0.8, "assumed": 0.2} -> "measured 80 %, assumed 20 %", largest first."""
    ordered = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in ordered) or MISSING
