"""The steady state of a long pipeline: sooner or later every round of as many micro-batches as it has stages takes the
same time.

Between the first micro-batches and the last ones the stages do the same again and again, and what a round takes follows
from where the stages stood before it. So of a long step short ones are gone through, each a round longer than the one
before, until all their numbers grow by the same twice in a row: those of the whole step are then on the same straight
lines. tests/test_compose_steady.py compares with whole steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SETTLED = 3
"""Rounds of the shortest step."""


@dataclass(frozen=True)
class Gone:
    """What a step came to that was gone through, in ns: its end, all its clocks then, and what it spent on this and
    that."""

    end_ns: int
    clocks_ns: tuple[int, ...] = ()
    spent_ns: tuple[int, ...] = ()


def in_rounds(through: Callable[[int], Gone], stages: int, micros: int) -> tuple[Gone, tuple[int, ...]]:
    """A step of `micros` micro-batches, and the numbers of micro-batches of the steps that were gone through for it:
    itself alone, where it is short, or does not settle before that would be no less work."""
    first = SETTLED * stages + micros % stages
    steps: list[Gone] = []
    lengths: list[int] = []
    if 3 * (first + stages) < micros:
        for length in range(first, micros, stages):
            if sum(lengths) + length >= micros:
                break
            lengths.append(length)
            steps.append(through(length))
            found = continued(steps[-3:], (micros - length) // stages) if len(steps) > 2 else None
            if found is not None:
                return found, tuple(lengths)
    return through(micros), (micros,)


def continued(steps: Sequence[Gone], rounds: int) -> Gone | None:
    """What the third of three steps, each a round longer than the one before, comes to after more rounds; None where
    they are not on straight lines.

    Nor may a clock grow by more than the step: it works off a lead, and will hold the step up when that is gone.
    """
    first, second, third = (_flat(step) for step in steps)
    growth = [c - b for b, c in zip(second, third, strict=True)]
    clocks = len(steps[0].clocks_ns)
    if growth != [b - a for a, b in zip(first, second, strict=True)] or max(growth[: 1 + clocks]) > growth[0]:
        return None
    end_ns, *rest = (c + rounds * more for c, more in zip(third, growth, strict=True))
    return Gone(end_ns, tuple(rest[:clocks]), tuple(rest[clocks:]))


def _flat(step: Gone) -> tuple[int, ...]:
    return step.end_ns, *step.clocks_ns, *step.spent_ns
