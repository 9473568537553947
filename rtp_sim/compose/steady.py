"""The steady state of a long pipeline: sooner or later every round of as many micro-batches as it has stages takes the
same time.

Between the first micro-batches and the last ones the stages do the same again and again, and what a round takes follows
from where the stages stood before it. So of a long step three short ones are gone through, each a round longer than the
one before. Where all their numbers grow by the same from the first to the second and from the second to the third,
those of the whole step are on the same straight lines, unless (pipeline.py looks for both) forwards pile up with the
micro-batches, as in GPipe, or a host works off a lead. tests/test_compose_steady.py compares with whole steps.
"""

from __future__ import annotations

from collections.abc import Sequence

SETTLED = 3
"""Rounds of the shortest step."""

Numbers = Sequence[int]


def lengths(stages: int, micros: int) -> tuple[int, ...]:
    """The micro-batches of the short steps; all of them in one step, where three short ones are no less work."""
    first = SETTLED * stages + micros % stages
    short = first, first + stages, first + 2 * stages
    return short if sum(short) < micros else (micros,)


def continued(found: Sequence[Numbers], lengths: Sequence[int], micros: int) -> list[int] | None:
    """The numbers of a step of `micros` micro-batches from those of steps of these lengths; None where they are not on
    straight lines."""
    if len(found) == 1:
        return list(found[0])
    first, second, third = found
    growth = [c - b for b, c in zip(second, third, strict=True)]
    if growth != [b - a for a, b in zip(first, second, strict=True)]:
        return None
    rounds, rest = divmod(micros - lengths[2], lengths[2] - lengths[1])
    assert rest == 0
    return [c + rounds * more for c, more in zip(third, growth, strict=True)]
