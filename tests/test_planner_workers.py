"""Which process evaluates which candidate, by hand."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from planner_helpers import question, search, small_model

from rtp_sim.errors import InputError
from rtp_sim.planner import workers
from rtp_sim.planner.workers import Work, evaluating, share_out


def work(name: str, takes_s: float = 1.0, layout: str = "") -> Work:
    return Work((name, layout or f"layout of {name}"), takes_s, 0.5)


def test_a_layout_stays_where_it_is_known() -> None:
    homes: dict[object, int] = {}
    # a 0..1.5 on 0; b, of another layout, on 1; c, of a's layout, ends at 2.5 on 0 and at 3.0 on 1.
    assert share_out([work("a", layout="x"), work("b", layout="y"), work("c", layout="x")], homes, 2) == [0, 1, 0]
    assert homes == {"a": 0, "x": 0, "b": 1, "y": 1, "c": 0}
    # Alone, each goes home.
    assert share_out([work("b")], homes, 2) == [1]
    assert share_out([work("new", layout="x")], homes, 2) == [0]


def test_work_is_spread_where_waiting_takes_longer_than_learning() -> None:
    homes: dict[object, int] = {"x": 0}
    # Two of layout x: the second would end at 2.0 at home and ends at 1.5 elsewhere, which knows x from now on.
    assert share_out([work("a", layout="x"), work("b", layout="x")], homes, 2) == [0, 1]
    assert homes["x"] == 1


def test_the_longest_goes_first() -> None:
    """9 s on one process, 4 + 3 + 2 s on the other: in the order given one would end at 12 s."""
    homes: dict[object, int] = {}
    assert share_out([work("a", 4), work("b", 3), work("c", 2), work("d", 9)], homes, 2) == [1, 1, 1, 0]


# ---- real processes


def exits(number: int, place: int, whole: bool) -> None:
    os._exit(7)


def refuses(number: int, place: int, whole: bool) -> None:
    raise InputError(f"place {place} is not to be had")


def test_two_processes_find_what_one_finds(tmp_path) -> None:
    searched = search(question(small_model(tmp_path), 4, 8, ("fsdp", "1f1b"), top=1))
    places = [(0, place) for place in range(min(5, len(searched.sites[0].space)))]
    with evaluating(searched) as run:
        alone = run(places, False)
    searched.question = replace(searched.question, processes=2)
    with evaluating(searched) as run:
        assert run(places, False) == alone
        assert run([], True) == []


@pytest.mark.parametrize(
    ("instead", "message"), [(exits, r"ended by itself \(exit code 7\)"), (refuses, "place 0 is not to be had")]
)
def test_a_process_that_fails_ends_the_search(tmp_path, monkeypatch, instead, message) -> None:
    searched = search(question(small_model(tmp_path), 4, 8, ("fsdp",), top=1))
    searched.question = replace(searched.question, processes=2)
    monkeypatch.setattr(workers, "_evaluated", instead)
    with evaluating(searched) as run, pytest.raises(InputError, match=message):
        run([(0, 0)], False)
