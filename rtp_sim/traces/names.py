"""The names that the executor gives its ranges in a profiler's trace, and how they are read again.

rtp-sim %12 h0.attn.qkv     op 12 of the rank's program
rtp-sim clock 8123456789    begins when the rank's own clock shows so many ns
rtp-sim step 4              the whole step
"""

from __future__ import annotations

import re

_OP = re.compile(r"rtp-sim %(\d+) (.*)")
_CLOCK = re.compile(r"rtp-sim clock (\d+)")
_STEP = re.compile(r"rtp-sim step (\d+)")


def op_name(index: int, name: str) -> str:
    """The range of an op."""
    return f"rtp-sim %{index} {name}"


def clock_name(now_ns: int) -> str:
    """The range that begins at this time."""
    return f"rtp-sim clock {now_ns}"


def step_name(step: int) -> str:
    """The range of a step."""
    return f"rtp-sim step {step}"


def read_op(name: str) -> tuple[int, str] | None:
    """Index and name of the op; None for any other range."""
    found = _OP.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def read_clock(name: str) -> int | None:
    """The clock's time in ns; None for any other range."""
    found = _CLOCK.fullmatch(name)
    return int(found[1]) if found else None


def read_step(name: str) -> int | None:
    """The step's number; None for any other range."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None
