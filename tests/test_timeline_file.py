"""Timelines in files: what goes in comes out, the bytes are always the same, and a damaged file says where."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from schedule_helpers import rotation

from rtp_sim.errors import InputError
from rtp_sim.timeline import RankTimes, Timeline
from rtp_sim.timeline_file import load_timeline, save_timeline, timeline_from_json, timeline_to_json


def timeline() -> Timeline:
    """Four ranks of a rotation; ranks 1 and 3 are represented by 0, rank 2 has times of its own."""
    schedule = rotation(4)
    ops = len(schedule.program(0).ops)
    start_ns = np.arange(ops, dtype=np.int64) * 10
    ranks = {2: RankTimes(start_ns + 1, start_ns + 9), 0: RankTimes(start_ns, start_ns + 2**40)}
    return Timeline(
        schedule, "measured", ranks, (0, 0, 2, 0), {"engine": "executor", "step": 3, "cv": 0.125, "x": None}
    )


def document() -> dict[str, object]:
    return json.loads(timeline_to_json(timeline()))


def test_a_timeline_comes_back_as_it_was(tmp_path: Path):
    path = tmp_path / "measured.json"
    save_timeline(timeline(), path)
    back, given = load_timeline(path), timeline()
    assert (back.schedule, back.kind, back.representative_of) == (given.schedule, given.kind, given.representative_of)
    assert back.meta == given.meta
    assert sorted(back.ranks) == [0, 2]
    for rank, times in given.ranks.items():
        assert np.array_equal(back.ranks[rank].start_ns, times.start_ns)
        assert np.array_equal(back.ranks[rank].end_ns, times.end_ns)
        assert back.ranks[rank].end_ns.dtype == np.int64
    assert back.step_time_ns == given.step_time_ns


def test_the_form_is_the_documented_one():
    found = document()
    assert list(found) == ["schema", "kind", "meta", "schedule", "representative_of", "ranks"]
    assert found["schema"] == "rtp-sim/timeline/1"
    assert found["representative_of"] == [0, 0, 2, 0]
    assert found["schedule"]["schema"] == "rtp-sim/schedule/1"
    assert found["ranks"]["2"]["start_ns"][:3] == [1, 11, 21]


def test_the_same_timeline_gives_the_same_bytes():
    text = timeline_to_json(timeline())
    assert text == timeline_to_json(timeline()) == timeline_to_json(timeline_from_json(text))
    # Ranks in order, whatever the order they were measured in.
    assert list(json.loads(text)["ranks"]) == ["0", "2"]


def test_a_number_without_a_word_in_json_is_refused():
    given = timeline()
    bad = Timeline(given.schedule, "measured", given.ranks, given.representative_of, {"cv": float("nan")})
    with pytest.raises(InputError, match="meta holds a number"):
        timeline_to_json(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="rtp-sim/timeline/2"), 'schema is "rtp-sim/timeline/2"'),
        (lambda d: d.pop("ranks"), 'the key "ranks" is missing'),
        (lambda d: d.update(speed=1), 'unknown key "speed"'),
        (lambda d: d.update(kind="guessed"), 'kind is "guessed"; expected one of predicted, measured'),
        (lambda d: d["schedule"].pop("groups"), 'the key "groups" is missing'),
        (lambda d: d.update(ranks={}), "ranks is {}"),
        (lambda d: d["ranks"].update({"4": {}}), 'ranks has "4"; expected ranks from 0 to 3'),
        (lambda d: d["ranks"]["2"].pop("end_ns"), "expected an object with start_ns and end_ns"),
        (lambda d: d["ranks"]["2"]["end_ns"].pop(), "ranks.2.end_ns has"),
        (lambda d: d["ranks"]["2"]["end_ns"].__setitem__(1, 1.5), "expected a list of whole numbers of ns"),
        (lambda d: d["ranks"]["2"]["end_ns"].__setitem__(1, True), "expected a list of whole numbers of ns"),
        (lambda d: d["ranks"]["2"]["end_ns"].__setitem__(1, 2**63), "beyond 64 bits"),
        (lambda d: d["ranks"]["2"]["end_ns"].__setitem__(1, 10), "op %1 ends at 10 ns, before its start at 11 ns"),
        (lambda d: d["representative_of"].pop(), "expected one rank for each of 4 ranks"),
        (lambda d: d["representative_of"].__setitem__(1, 1), "representative_of[1] is 1; expected one of [0, 2]"),
        (lambda d: d["meta"].update(deep={}), "meta.deep is {}"),
    ],
)
def test_a_damaged_timeline_says_where(change, message: str):
    found = document()
    change(found)
    with pytest.raises(InputError) as raised:
        timeline_from_json(json.dumps(found))
    assert message in str(raised.value)


def test_a_file_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot read a timeline from .*nothing\.json"):
        load_timeline(tmp_path / "nothing.json")
    cut = tmp_path / "cut.json"
    cut.write_text(timeline_to_json(timeline())[:100], encoding="utf-8")
    with pytest.raises(InputError, match=r"cut\.json: timeline JSON: line 1, column"):
        load_timeline(cut)
    cut.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="it is not text"):
        load_timeline(cut)
    with pytest.raises(InputError, match="cannot write the timeline"):
        save_timeline(timeline(), tmp_path / "nowhere" / "x.json")
