"""The steady state of a long pipeline: sooner or later every round of as many micro-batches as it has stages takes the
same time.

Between the first micro-batches and the last ones the stages do the same again and again, and what a round takes follows
from where the stages stood before it. So of a long step a short one is gone through, and where its last two rounds
are alike on every stage, clock by clock, the whole step has more of them. tests/test_compose_steady.py compares with
whole steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROUNDS = (5, 7, 10)
"""Lengths of the short steps that are tried one after another."""

WORTH = 0.75
"""A short step is worth trying up to this part of the whole one, those before it included."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stand:
    """Where a stage stood, in ns: its clocks after its first forward pass of each micro-batch (a row each; the first
    column is when its kernels are done), what it had spent on this and that by then and, in one more row, in all; when
    it was through with the step."""

    clocks_ns: Numbers
    spent_ns: Numbers
    end_ns: int


@dataclass(frozen=True)
class Gone:
    """A step that was gone through, by stage."""

    stages: tuple[Stand, ...]

    @property
    def end_ns(self) -> int:
        """When the last stage was through."""
        return max(stage.end_ns for stage in self.stages)


def in_rounds(through: Callable[[int], Gone], stages: int, micros: int) -> tuple[Gone, tuple[int, ...]]:
    """A step of `micros` micro-batches, and the numbers of micro-batches of the steps that were gone through for it. Of
    rows it may have fewer."""
    tried: tuple[int, ...] = ()
    for rounds in ROUNDS:
        length = rounds * stages + micros % stages
        if sum(tried) + length > WORTH * micros:
            break
        tried = (*tried, length)
        short = through(length)
        if alike(short, stages):
            return _longer(short, stages, (micros - length) // stages), tried
    return through(micros), (*tried, micros)


def alike(step: Gone, stages: int) -> bool:
    """Whether in the last two rounds of a step all is later by the same.

    All kernels must keep the same pace, and no clock may be slower: it works off a lead, and will hold the step up when
    that is gone. What was spent must have grown by as much in the round before, too: what kernels lose beside messages
    may still change when all clocks keep the pace.
    """
    paces = set()
    for stage in step.stages:
        clocks, spent = _growth(stage.clocks_ns, stages), _growth(stage.spent_ns[:-1], stages)
        before = _growth(stage.spent_ns[: -1 - stages], stages)
        if (clocks != clocks[0]).any() or clocks[0].max() > clocks[0, 0]:
            return False
        if (spent != spent[0]).any() or (before != spent[0]).any():
            return False
        paces.add(int(clocks[0, 0]))
    return len(paces) == 1


def _growth(rows: Numbers, stages: int) -> Numbers:
    """By how much the numbers of the last round are above those of the round before."""
    last = rows[-2 * stages :]
    return last[stages:] - last[:-stages]


def _longer(step: Gone, stages: int, rounds: int) -> Gone:
    """The step with more rounds like its last."""
    longer_ns = rounds * int(_growth(step.stages[0].clocks_ns, stages)[0, 0])
    return Gone(tuple(
        Stand(s.clocks_ns, s.spent_ns + rounds * _growth(s.spent_ns[:-1], stages)[0], s.end_ns + longer_ns)
        for s in step.stages
    ))  # fmt: skip
