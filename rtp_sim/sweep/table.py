"""`Table`: the rows of a sweep in the order of its grid, as documents without anything that differs from run to run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from rtp_sim.sweep.axes import Axis
from rtp_sim.sweep.crossings import Crossing, crossings
from rtp_sim.sweep.evaluate import Row
from rtp_sim.sweep.folder import SCHEMA

STRATEGY = "strategy"
At = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """`axes` in the order of the coordinates, the last one fastest; `rows` by coordinates."""

    axes: tuple[Axis, ...]
    rows: Mapping[At, Row]

    def axis(self, name: str) -> int:
        """The place of an axis among the coordinates."""
        return [axis.name for axis in self.axes].index(name)

    def lines(self, x: str, rest: Mapping[str, str]) -> dict[str, list[Row]]:
        """Per strategy the rows along axis `x`, in ascending order of its numbers, the other axes as `rest` says."""
        along, order = self.axis(x), ascending(self.axes[self.axis(x)])
        strategies = self.axes[self.axis(STRATEGY)].values
        found: dict[str, list[Row]] = {}
        for strategy in strategies:
            fixed = {**rest, STRATEGY: strategy.text}
            at = [fixed.get(axis.name, "") for axis in self.axes]
            rows = []
            for i in order:
                at[along] = self.axes[along].values[i].text
                rows.append(self.rows[tuple(at)])
            found[strategy.text] = rows
        return found

    def settings(self, x: str) -> list[dict[str, str]]:
        """Every combination of the values of all axes but `x` and the strategy."""
        others = [axis for axis in self.axes if axis.name not in (x, STRATEGY)]
        return [
            dict(zip([a.name for a in others], texts, strict=True))
            for texts in product(*([v.text for v in a.values] for a in others))
        ]

    def numeric_axes(self) -> list[Axis]:
        """The axes along which there is something between two values."""
        return [a for a in self.axes if a.is_numeric and len(a.values) > 1 and a.name != STRATEGY]


def ascending(axis: Axis) -> list[int]:
    """The places of an axis's values in order of their numbers; as given where they are none."""
    if not axis.is_numeric:
        return list(range(len(axis.values)))
    return sorted(range(len(axis.values)), key=lambda i: axis.values[i].number or 0.0)


def numbers(axis: Axis) -> list[float]:
    """The values of a numeric axis, ascending."""
    return sorted(value.number for value in axis.values if value.number is not None)


def gpu_seconds_per_token(row: Row) -> float | None:
    """What strategies are compared by (per step, where tokens are not known); None for a point without metrics. In one
    setting all use the same GPUs, so it orders them by time; along the number of GPUs it is what changes least."""
    metrics = row["metrics"]
    if metrics is None:
        return None
    rate = metrics["tokens_per_s_per_gpu"]
    return float(1 / rate if rate else metrics["step_time_s"] * row["gpus"])


def fitting(row: Row) -> float | None:
    """The same; None for a point that does not fit into memory either."""
    return gpu_seconds_per_token(row) if row["metrics"] is not None and row["metrics"]["fits"] else None


@dataclass(frozen=True, slots=True)
class Overtaking:
    """A crossing along axis `x` with the other axes at `setting`."""

    x: str
    setting: Mapping[str, str]
    crossing: Crossing


def overtakings(table: Table) -> list[Overtaking]:
    """All crossings along all numeric axes."""
    found = []
    for axis in table.numeric_axes():
        for setting in table.settings(axis.name):
            rows = table.lines(axis.name, setting)
            series = {name: [fitting(row) for row in along] for name, along in rows.items()}
            found += [Overtaking(axis.name, setting, c) for c in crossings(numbers(axis), series)]
    return found


def fastest(table: Table) -> dict[str, int]:
    """Per strategy, in how many settings it is the fastest of those that fit; ties go to the first."""
    place = table.axis(STRATEGY)
    best: dict[At, tuple[float, str]] = {}
    wins = {value.text: 0 for value in table.axes[place].values}
    for at, row in table.rows.items():
        cost, setting = fitting(row), (*at[:place], *at[place + 1 :])
        if cost is not None and (setting not in best or cost < best[setting][0]):
            best[setting] = cost, at[place]
    for _, strategy in best.values():
        wins[strategy] += 1
    return wins


def document(table: Table, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The whole sweep as plain JSON types."""
    names = [axis.name for axis in table.axes]
    return {
        "schema": SCHEMA,
        "inputs": dict(inputs),
        "axes": [{"name": a.name, "unit": a.unit, "values": [v.text for v in a.values]} for a in table.axes],
        "rows": [{"at": dict(zip(names, at, strict=True)), **row} for at, row in table.rows.items()],
        "crossings": [
            {"axis": o.x, "setting": dict(o.setting), **asdict(o.crossing)} for o in overtakings(table)
        ],
        "fastest": fastest(table),
    }  # fmt: skip


def as_csv(table: Table) -> str:
    """The rows as CSV in base units: a column per axis, then the metrics; dictionaries as columns named key.name."""
    names = [axis.name for axis in table.axes]
    flat = [_flattened(names, at, row) for at, row in table.rows.items()]
    header = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flattened(names: Sequence[str], at: At, row: Row) -> dict[str, Any]:
    flat = dict(zip(names, at, strict=True)) | {k: "" if v is None else v for k, v in row.items() if k != "metrics"}
    for key, value in (row["metrics"] or {}).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        elif key != STRATEGY:
            flat[key] = "" if value is None else value
    return flat
