"""The JSON form: lossless, same bytes, and errors that name the place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from schedule_helpers import rotation
from schedule_random import schedules

from rtp_sim.errors import ScheduleError
from rtp_sim.schedule.ir import Schedule
from rtp_sim.schedule.serialize import SCHEMA, from_dict, from_json, to_dict, to_json


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_round_trip(s: Schedule) -> None:
    text = to_json(s)
    assert from_json(text) == s
    assert to_json(from_json(text)) == text
    assert from_dict(to_dict(s)) == s


def test_what_is_in_the_file() -> None:
    data = json.loads(to_json(rotation(2)))
    assert data["schema"] == SCHEMA == "rtp-sim/schedule/1"
    assert data["groups"] == [{"name": "rtp", "dims": [2], "instances": [[0, 1]]}]
    assert data["programs"][0]["ops"][0] == {
        "index": 0,
        "name": "hop0",
        "stream": "ring",
        "kind": "shift",
        "group": "rtp",
        "hops": [{"offset": [1], "size_bytes": 512}],
        "reads": ["w.a"],
        "writes": ["w.b"],
    }


def test_cut_off_anywhere_is_an_error() -> None:
    text = to_json(rotation(2))
    for end in range(len(text) - 1):
        with pytest.raises(ScheduleError, match="schedule JSON: line 1, column"):
            from_json(text[:end])


def test_cut_off_says_so() -> None:
    text = to_json(rotation(2))
    with pytest.raises(ScheduleError, match="the text ends early"):
        from_json(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), "other/2", "schema is 'other/2'; expected 'rtp-sim/schedule/1'"),
        (("world_size",), "2", 'world_size: expected a whole number, got "2"'),
        (("world_size",), True, "world_size: expected a whole number, got true"),
        (("meta",), {"a": [1]}, "meta.a: expected a string, a number, true, false or null, got [1]"),
        (("groups", 0, "dims", 0), None, "groups[0].dims[0]: expected a whole number, got null"),
        (("programs", 0, "ops", 1, "reads", 1), 3, "programs[0].ops[1].reads[1]: expected a string, got 3"),
        (
            ("programs", 0, "ops", 1, "dims", 0),
            ["m"],
            "programs[0].ops[1].dims[0]: expected a name and a size",
        ),
        (
            ("programs", 0, "ops", 0, "kind"),
            "teleport",
            "programs[0].ops[0].kind: expected one of compute, shift",
        ),
        (
            ("programs", 0, "ops", 0, "colour"),
            1,
            'programs[0].ops[0]: unknown key "colour"; known here: after,',
        ),
        (("programs", 0, "ops", 0, "hops"), {}, "programs[0].ops[0].hops: expected a list, got {}"),
        (("programs", 0, "buffers", 0, "live_in"), 1, "buffers[0].live_in: expected true or false, got 1"),
        (("programs", 0, "buffers", 0, "numel"), "x", "buffers[0].numel: expected a whole number"),
        (("programs", 0, "buffers", 1, "name"), "w.a", "buffers[1].name: 'w.a' is there twice"),
        (("programs", 0), [], "programs[0]: expected an object, got []"),
    ],
)
def test_wrong_value_is_named(path: tuple[str | int, ...], value: object, message: str) -> None:
    data: Any = to_dict(rotation(2))
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ScheduleError) as error:
        from_json(json.dumps(data))
    assert message in str(error.value)


def test_missing_key_is_named() -> None:
    data = to_dict(rotation(2))
    del data["programs"][0]["ops"][0]["hops"][0]["offset"]
    with pytest.raises(ScheduleError, match=r'programs\[0\].ops\[0\].hops\[0\]: the key "offset" is missing'):
        from_dict(data)


@pytest.mark.parametrize("text", ["", "[]", "3", '"x"', "{}", "nonsense"])
def test_foreign_text_is_an_error(text: str) -> None:
    with pytest.raises(ScheduleError, match="schedule JSON"):
        from_json(text)
