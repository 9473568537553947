"""Reads a trace that PyTorch's profiler (Kineto) has written: Chrome trace JSON, plain or gzipped.

Kept are complete events ("ph": "X") that say when something ran: kernels and copies on the device, ranges, ops and
launches on the host. Times are whole ns on the profiler's clock. Nothing else of the format is needed here.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtp_sim.errors import InputError

KERNEL, COPY, RANGE, OP, LAUNCH = "kernel", "copy", "range", "op", "launch"
_WHAT = {
    "kernel": KERNEL, "gpu_memcpy": COPY, "gpu_memset": COPY, "memcpy": COPY, "memset": COPY,
    "user_annotation": RANGE, "cpu_op": OP, "operator": OP,
    "cuda_runtime": LAUNCH, "cuda_driver": LAUNCH, "runtime": LAUNCH, "hip_runtime": LAUNCH,
}  # fmt: skip
"""What the categories mean; older versions wrote them with capitals. gpu_user_annotation repeats ranges of the host."""

Json = Any  # what json.loads returns
Lane = tuple[str, str]
"""(pid, tid) as printed: a host thread, or a device and its stream."""


@dataclass(frozen=True, slots=True)
class Event:
    """One span. `correlation` ties a launch to what it started on the device (None: not given); `external` names the
    op of the host that was running; `collective` is what NCCL's kernel was for, where the profiler says."""

    what: str
    name: str
    lane: Lane
    start_ns: int
    end_ns: int
    correlation: int | None = None
    external: int | None = None
    collective: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """A file: its events in order of their start, and the rank it says it is of (None: it does not)."""

    path: str
    rank: int | None
    world_size: int | None
    device_names: Mapping[str, str]
    events: tuple[Event, ...]


def read_trace(path: Path) -> Trace:
    """The trace in a file. InputError naming the file and the place, what was found and what was expected."""
    data = _load(path)
    events = data.get("traceEvents") if isinstance(data, dict) else data
    if not isinstance(events, list):
        found = f"keys {', '.join(list(data)[:5])}" if isinstance(data, dict) else type(data).__name__
        raise InputError(f'{path}: found {found}; expected a trace of torch.profiler with a list "traceEvents"')
    spans = sorted(_events(events, path), key=lambda e: (e.start_ns, -e.end_ns))
    if not spans:
        raise InputError(
            f"{path}: none of the {len(events)} events of the trace is a kernel, an op or a range; expected what "
            "torch.profiler.profile(...).export_chrome_trace writes"
        )
    about = data.get("distributedInfo") if isinstance(data, dict) else None
    rank, world = (about.get(key) for key in ("rank", "world_size")) if isinstance(about, dict) else (None, None)
    return Trace(
        str(path),
        rank if type(rank) is int else None,
        world if type(world) is int else None,
        _devices(data),
        tuple(spans),
    )


def _load(path: Path) -> Json:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8", errors="replace")
    except OSError as error:
        reason = error.strerror or f"broken gzip: {error}"
        raise InputError(f"{path}: cannot be read: {reason}; expected a trace of torch.profiler") from None
    except (EOFError, zlib.error):
        raise InputError(f"{path}: the gzip file is cut off or broken; expected a trace of torch.profiler") from None
    try:
        # Kernel names may hold raw control characters.
        return json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; expected a trace of torch.profiler: the "
            "file may be cut off"
        ) from None


def _events(events: list[Json], path: Path) -> Iterator[Event]:
    for number, raw in enumerate(events):
        if not isinstance(raw, dict) or raw.get("ph") != "X":
            continue
        what = _WHAT.get(str(raw.get("cat", "")).lower())
        if what is None:
            continue
        args: Json = raw.get("args")
        args = args if isinstance(args, dict) else {}
        start_ns, length_ns = (_ns(raw, key, path, number) for key in ("ts", "dur"))
        yield Event(
            what, str(raw.get("name", "")), (str(raw.get("pid")), str(raw.get("tid"))), start_ns, start_ns + length_ns,
            _whole(args.get("correlation")), _whole(args.get("External id", args.get("external id"))),
            str(args.get("Collective name", "")),
        )  # fmt: skip


def _ns(raw: Json, key: str, path: Path, number: int) -> int:
    """Microseconds, as a number or a string, in whole ns."""
    value = raw.get(key)
    try:
        if isinstance(value, bool) or value is None:
            raise ValueError
        found = round(float(value) * 1000) if not isinstance(value, int) else value * 1000
    except (ValueError, TypeError, OverflowError):
        name = str(raw.get("name"))[:60]
        raise InputError(f"{path}: traceEvents[{number}] ({name}): {key} is {value!r}; expected microseconds") from None
    if key == "dur" and found < 0:
        raise InputError(f"{path}: traceEvents[{number}]: dur is {value!r}; expected at least 0")
    return found


def _whole(value: Json) -> int | None:
    return value if type(value) is int else None


def _devices(data: Json) -> dict[str, str]:
    """Names of the devices by number."""
    found = data.get("deviceProperties") if isinstance(data, dict) else None
    entries = found if isinstance(found, list) else []
    return {str(d.get("id")): re.sub(r"\s+", " ", str(d.get("name", ""))) for d in entries if isinstance(d, dict)}
