"""`Axis`: one thing that a sweep varies, with its values as written and, where they are quantities, as numbers.

An axis is written as NAME=V1,V2,...: values without a unit take that of the last one, so
link.ib.bandwidth=100,200,400Gb/s has three bandwidths.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rtp_sim.errors import InputError
from rtp_sim.units import parse_bandwidth, parse_bytes, parse_flops, parse_time_ns

_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_PARSERS: tuple[Callable[[str], int], ...] = (parse_bandwidth, parse_time_ns, parse_bytes, parse_flops)
EXAMPLE = "for example --vary link.ib.bandwidth=100,200,400Gb/s or --vary micro-batch=1,2,4"


@dataclass(frozen=True, slots=True)
class Value:
    """As written, its unit added; `number` is in the axis's unit, None if it is none."""

    text: str
    number: float | None


@dataclass(frozen=True, slots=True)
class Axis:
    """`unit` is that of the last value as written, "" for plain numbers and words."""

    name: str
    unit: str
    values: tuple[Value, ...]

    @property
    def is_numeric(self) -> bool:
        """Whether the values are quantities, so that there is something between them."""
        return all(value.number is not None for value in self.values)


def read_axis(text: str) -> Axis:
    """The axis that NAME=V1,V2,... says. InputError with an example if it is not of that form, or repeats a value."""
    name, equals, rest = text.partition("=")
    return axis_of(name.strip(), [part.strip() for part in rest.split(",")] if equals else [])


def axis_of(name: str, texts: list[str]) -> Axis:
    """The axis with these values. InputError as `read_axis`."""
    if not name or not texts or not all(texts):
        raise InputError(f"--vary {name}={','.join(texts)}: expected NAME=V1,V2,..., {EXAMPLE}")
    unit = _unit_of(texts[-1])
    whole = [text + unit if unit and _NUMBER.fullmatch(text) else text for text in texts]
    if len(set(whole)) < len(whole):
        twice = next(text for text in whole if whole.count(text) > 1)
        raise InputError(f"--vary {name}: {twice} is there twice; expected each value once")
    numbers = _numbers(whole, unit)
    return Axis(name, unit, tuple(Value(text, number) for text, number in zip(whole, numbers, strict=True)))


def _unit_of(text: str) -> str:
    """What follows the number; "" for plain numbers and for words."""
    number = _NUMBER.match(text)
    rest = text[number.end() :].strip() if number else ""
    return rest if rest and any(_parsed(parse, f"1{rest}") for parse in _PARSERS) else ""


def _numbers(texts: list[str], unit: str) -> list[float | None]:
    """The values in `unit`; all None if one of them is no such quantity."""
    if not unit:
        found: list[float | None] = [float(t.replace("_", "")) if _NUMBER.fullmatch(t) else None for t in texts]
    else:
        parse = next(p for p in _PARSERS if _parsed(p, f"1{unit}"))
        found = [_in_unit(parse, text, unit) for text in texts]
    return [None] * len(texts) if None in found else found


def _in_unit(parse: Callable[[str], int], text: str, unit: str) -> float | None:
    if text.endswith(unit) and _NUMBER.fullmatch(text.removesuffix(unit).strip()):
        return float(text.removesuffix(unit).replace("_", ""))
    base = _parsed(parse, text)
    return None if base is None else base / parse(f"1{unit}")


def _parsed(parse: Callable[[str], int], text: str) -> int | None:
    try:
        return parse(text)
    except InputError:
        return None
