"""`Limit`: what a user wants of an axis of the search, or of a product of axes; which limits contradict each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from rtp_sim.errors import InputError
from rtp_sim.model.training import RECOMPUTE
from rtp_sim.planner.space import EVERY_STRATEGY, SYNCS, Space
from rtp_sim.schedule.layout import ORDERS
from rtp_sim.text import nearest

Mask = npt.NDArray[np.bool_]

DEGREES = ("tp", "rtp", "fsdp", "dp", "pp", "vpp", "micro-batch", "micro-batches", "gpus")
WORDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "strategy": ("strategy", EVERY_STRATEGY),
    "recompute": ("recompute", RECOMPUTE),
    "order": ("order", ORDERS),
    "dp-sync": ("sync", SYNCS),
    "sequence-parallel": ("sequence", ("no", "yes")),
}
"""Axes whose values are words: the column of the space, and the words by number."""

_COMPARE: Mapping[str, Callable[[npt.NDArray[np.int64], int], Mask]] = {
    "=": np.equal, "!=": np.not_equal, "<=": np.less_equal, ">=": np.greater_equal, "<": np.less, ">": np.greater,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limit:
    """One wish, as `text` says it. A number compares the product of `axes`; words must be (or not be) among
    `values`."""

    text: str
    axes: tuple[str, ...]
    compare: str
    values: tuple[int, ...] | tuple[str, ...]

    def holds(self, space: Space) -> Mask:
        """Which candidates it holds for."""
        if self.axes[0] in WORDS:
            column, words = WORDS[self.axes[0]]
            among: Mask = np.isin(getattr(space, column), [words.index(str(v)) for v in self.values])
            return among if self.compare == "=" else ~among
        product = np.ones(len(space), dtype=np.int64)
        for axis in self.axes:
            product = product * space.axis(axis)
        if len(self.values) > 1:
            found: Mask = np.isin(product, self.values)
            return found
        return _COMPARE[self.compare](product, int(self.values[0]))


def parse_limit(text: str) -> Limit:
    """A limit such as "tp=8", "pp=1,2,4", "tp*pp<=16", "micro-batch<=4", "recompute!=full". InputError otherwise."""
    found = re.fullmatch(r"\s*([\w*\- ]+?)\s*(<=|>=|!=|=|<|>)\s*([\w\-.]+(?:\s*,\s*[\w\-.]+)*)\s*", text)
    if not found:
        raise InputError(f"limit {text!r}: expected axes, a comparison and a value, for example tp*pp<=16")
    axes = tuple(a.strip().replace("_", "-") for a in found[1].split("*"))
    compare, values = found[2], tuple(v.strip() for v in found[3].split(","))
    shown = f"{'*'.join(axes)}{compare}{','.join(values)}"
    known = (*DEGREES, *WORDS)
    for axis in axes:
        if axis not in known:
            raise InputError(f"limit {text!r}: unknown axis {axis!r}: {nearest(axis, known)}")
    if len(axes) == 1 and axes[0] in WORDS:
        return _of_words(shown, axes[0], compare, values)
    if any(axis in WORDS for axis in axes):
        raise InputError(f"limit {text!r}: {', '.join(a for a in axes if a in WORDS)} is no number to multiply with")
    if not all(v.isdigit() and int(v) > 0 for v in values):
        raise InputError(f"limit {text!r}: given {found[3]!r}, expected whole numbers of at least 1")
    if len(values) > 1 and compare != "=":
        raise InputError(f"limit {text!r}: several values go with = alone, for example pp=1,2,4")
    return Limit(shown, axes, compare, tuple(int(v) for v in values))


def _of_words(text: str, axis: str, compare: str, values: tuple[str, ...]) -> Limit:
    words = WORDS[axis][1]
    for value in values:
        if value not in words:
            raise InputError(f"limit {text!r}: unknown {axis} {value!r}: {nearest(value, words)}")
    if compare not in ("=", "!="):
        raise InputError(f"limit {text!r}: words are compared with = or !=")
    return Limit(text, (axis,), compare, values)


def hold_all(limits: Sequence[Limit], space: Space) -> Mask:
    """Which candidates all limits hold for."""
    found = np.ones(len(space), dtype=bool)
    for limit in limits:
        found &= limit.holds(space)
    return found


def check_limits(limits: Sequence[Limit], spaces: Sequence[Space]) -> None:
    """InputError if no candidate of any space satisfies all limits, with the fewest that cannot hold together."""
    masks = [np.concatenate([limit.holds(space) for space in spaces]) for limit in limits]
    if not masks or np.logical_and.reduce(masks).any():
        return
    gpus = sorted({space.gpus for space in spaces})
    where = f"on {' or '.join(map(str, gpus))} GPUs"
    for number, limit in enumerate(limits):
        if not masks[number].any():
            raise InputError(f"{limit.text} cannot hold {where}{_possible(limit, spaces)}")
    for count in range(2, len(limits) + 1):
        for chosen in combinations(range(len(limits)), count):
            if not np.logical_and.reduce([masks[i] for i in chosen]).any():
                texts = [limits[i].text for i in chosen]
                both = "both" if count == 2 else "all"
                raise InputError(f"{', '.join(texts[:-1])} and {texts[-1]} cannot {both} hold {where}")


def _possible(limit: Limit, spaces: Sequence[Space]) -> str:
    """What the axis can be, where that says more than the limit."""
    if len(limit.axes) > 1 or limit.axes[0] in WORDS:
        return ""
    values = sorted({int(v) for space in spaces for v in np.unique(space.axis(limit.axes[0]))})
    few = ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
    return f": {limit.axes[0]} can be {few}"
