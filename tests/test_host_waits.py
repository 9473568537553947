"""Hosts that wait for messages, or run ahead of them: exact times by hand."""

from __future__ import annotations

import pytest

from rtp_sim.compose.stretch import HOST, RECEIVED, stretch
from rtp_sim.schedule.ir import Compute, Op, Recv


def ops(*, blocks_host: bool) -> tuple[Op, ...]:
    """A receive and two kernels behind it, the first of which reads what arrives."""
    kernel = Compute("copy", "fp32", (("numel", 1),))
    return (
        Op(0, "recv", "recv", Recv("pp", (-1,), 8, "x"), (), ("x",), (), blocks_host),
        Op(1, "a", "compute", kernel, ("x",), ("y",), (0,)),
        Op(2, "b", "compute", kernel, ("y",), ("z",), ()),
    )


@pytest.mark.parametrize(
    ("blocks", "arrives", "end"),
    [
        # Issued at 10, 20, 30, ahead of a message at 100: the kernels follow it back to back.
        (False, 100, 100 + 3 + 3),
        # The host goes on at 100 and issues at 110 and 120.
        (True, 100, 120 + 3),
        (False, 12, 30 + 3),
        (True, 12, 32 + 3),
    ],
)
def test_a_host_that_waits_for_a_message_issues_behind_it(blocks: bool, arrives: int, end: int) -> None:
    found = stretch(ops(blocks_host=blocks), 0, 3, (0, 3, 3), (10, 10, 10))
    state = {HOST: 0, RECEIVED: arrives, "compute": 0}
    assert found.after(found.ends["compute"], state) == end
    assert found.after(found.issued, state) == (arrives + 20 if blocks else 30)
