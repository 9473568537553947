"""Sets of times: the union of spans, its length, and what one union has beyond another."""

from __future__ import annotations

from collections.abc import Iterable

Spans = list[tuple[int, int]]
"""Disjoint (start, end), ascending."""


def union(spans: Iterable[tuple[int, int]]) -> Spans:
    """The spans melted together where they touch or overlap; empty ones are dropped."""
    merged: Spans = []
    for start, end in sorted(span for span in spans if span[1] > span[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(spans: Spans) -> int:
    """The time that they cover."""
    return sum(end - start for start, end in spans)


def minus(spans: Spans, others: Spans) -> Spans:
    """What `spans` cover and `others` do not; both disjoint and ascending."""
    left: Spans = []
    i = 0
    for start, end in spans:
        while i < len(others) and others[i][1] <= start:
            i += 1
        at, j = start, i
        while j < len(others) and others[j][0] < end:
            if others[j][0] > at:
                left.append((at, others[j][0]))
            at = max(at, others[j][1])
            j += 1
        if at < end:
            left.append((at, end))
    return left
