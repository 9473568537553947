"""Where the time of any PyTorch program went, rank by rank: busy time by kernel class, exposed communication, idle.

On a device, spans are those of its kernels and copies (several devices in one file count as one). Without a device they
are the host's ops, each counted for the time that none of the ops it calls was running. The window is from the start of
the first to the end of the last of them.

    busy        something runs
    computing   something runs that is not communication
    exposed     communication runs, and nothing that computes
    idle        nothing runs:   window == computing + exposed + idle
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rtp_sim.errors import InputError
from rtp_sim.traces.classes import CLASSES, COMMUNICATION, class_of, collective_of
from rtp_sim.traces.intervals import length, minus, union
from rtp_sim.traces.kineto import COPY, KERNEL, OP, RANGE, Event, Lane, Trace
from rtp_sim.traces.names import read_op, read_step


@dataclass(frozen=True, slots=True)
class Busy:
    """Spans of one sort: how many, and the time that they cover together."""

    count: int
    busy_ns: int


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """One stream of a device, or one thread of the host. `classes` are self times on a thread."""

    device: str
    stream: str
    busy_ns: int
    classes: Mapping[str, Busy]


@dataclass(frozen=True, slots=True)
class RankSummary:
    """One trace. `kind` is "device" or "host"; times in ns. `kernels` are the names that took most, longest first."""

    path: str
    rank: int
    kind: str
    window_ns: int
    computing_ns: int
    communication_ns: int
    exposed_ns: int
    idle_ns: int
    classes: Mapping[str, Busy]
    collectives: Mapping[str, Busy]
    streams: tuple[StreamSummary, ...]
    kernels: tuple[tuple[str, str, int, int], ...]

    @property
    def hidden(self) -> float | None:
        """The part of communication that runs while something computes; None without communication."""
        return 1 - self.exposed_ns / self.communication_ns if self.communication_ns else None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A span that counts for itself, and what it belongs to."""

    event: Event
    name: str
    start_ns: int
    end_ns: int


def summarise(traces: Sequence[Trace], most: int = 10) -> list[RankSummary]:
    """One summary per trace, by rank; a trace that does not say its rank has that of its place among the files.
    InputError if two say the same."""
    found: dict[int, RankSummary] = {}
    for place, trace in enumerate(traces):
        summary = _summary(trace, place if trace.rank is None else trace.rank, most)
        if summary.rank in found:
            raise InputError(
                f"{trace.path} and {found[summary.rank].path} are both of rank {summary.rank}; expected one trace for "
                "each rank"
            )
        found[summary.rank] = summary
    return [found[rank] for rank in sorted(found)]


def _summary(trace: Trace, rank: int, most: int) -> RankSummary:
    events = _within_step(trace)
    device = [e for e in events if e.what in (KERNEL, COPY)]
    if device:
        pieces = [_Piece(e, class_of(e), e.start_ns, e.end_ns) for e in device]
    else:
        movers = _communicating(events)
        host = [e for e in events if e.what == OP or (e.what == RANGE and (_is_gloo(e) or e.lane in movers))]
        if not host:
            raise InputError(f"{trace.path}: no kernels and no ops; expected a trace of a program that computes")
        pieces = _own_times(host, movers)
    communicating = union((p.start_ns, p.end_ns) for p in pieces if p.name == COMMUNICATION)
    computing = union((p.start_ns, p.end_ns) for p in pieces if p.name != COMMUNICATION)
    window_ns = max(p.end_ns for p in pieces) - min(p.start_ns for p in pieces)
    exposed_ns = length(minus(communicating, computing))
    lanes: dict[Lane, list[_Piece]] = {}
    for p in pieces:
        lanes.setdefault(p.event.lane, []).append(p)
    return RankSummary(
        trace.path, rank, "device" if device else "host", window_ns, length(computing), length(communicating),
        exposed_ns,
        window_ns - length(computing) - exposed_ns, _by(pieces, {c: c for c in CLASSES}),
        _collectives(pieces), tuple(_stream(trace, lane, lanes[lane]) for lane in sorted(lanes, key=_lane_order)),
        _longest(pieces, most),
    )  # fmt: skip


def _within_step(trace: Trace) -> Sequence[Event]:
    """What ran in the step, where the trace is one of ours: the ranks meet before it."""
    step = next((e for e in trace.events if e.what == RANGE and read_step(e.name) is not None), None)
    if step is None:
        return trace.events
    return [e for e in trace.events if step.start_ns <= e.start_ns and e.end_ns <= step.end_ns]


def _is_gloo(event: Event) -> bool:
    return event.name.startswith("gloo:")


def _communicating(events: Iterable[Event]) -> set[Lane]:
    """The threads on which our executor communicates: those with ops of ours beside the one that goes through the step,
    whatever moves the data there."""
    ranges = [e for e in events if e.what == RANGE]
    steps = {e.lane for e in ranges if read_step(e.name) is not None}
    return {e.lane for e in ranges if steps and read_op(e.name) is not None} - steps


def _own_times(events: Iterable[Event], communicating: Collection[Lane]) -> list[_Piece]:
    """Every op's time without that of the ops it calls, thread by thread. `events` are in order of their start; what
    runs on a thread in `communicating` is communication."""
    pieces: list[_Piece] = []
    open_spans: dict[Lane, list[tuple[Event, int]]] = {}

    def name_of(event: Event) -> str:
        return COMMUNICATION if event.lane in communicating else class_of(event)

    def close(lane: Lane, until_ns: int | None) -> None:
        """Ends what has ended before `until_ns` (None: everything)."""
        stack = open_spans[lane]
        while stack and (until_ns is None or stack[-1][0].end_ns <= until_ns):
            event, since_ns = stack.pop()
            # Ranges that gloo opens and closes on its own may overlap without one lying in the other.
            end_ns = max(since_ns, event.end_ns)
            pieces.append(_Piece(event, name_of(event), since_ns, end_ns))
            if stack:
                stack[-1] = stack[-1][0], end_ns

    for event in events:
        stack = open_spans.setdefault(event.lane, [])
        close(event.lane, event.start_ns)
        if stack:
            caller, since_ns = stack[-1]
            pieces.append(_Piece(caller, name_of(caller), since_ns, event.start_ns))
        stack.append((event, event.start_ns))
    for lane in open_spans:
        close(lane, None)
    return pieces


def _by(pieces: Sequence[_Piece], names: Mapping[str, str]) -> dict[str, Busy]:
    """By class, those that occur."""
    found = {}
    for name in names:
        mine = [p for p in pieces if p.name == name]
        if mine:
            found[name] = Busy(len({id(p.event) for p in mine}), length(union((p.start_ns, p.end_ns) for p in mine)))
    return found


def _collectives(pieces: Sequence[_Piece]) -> dict[str, Busy]:
    mine: dict[str, list[_Piece]] = {}
    for p in pieces:
        if p.name == COMMUNICATION:
            mine.setdefault(collective_of(p.event), []).append(p)
    return {
        name: Busy(len({id(p.event) for p in found}), length(union((p.start_ns, p.end_ns) for p in found)))
        for name, found in sorted(mine.items())
    }


def _stream(trace: Trace, lane: Lane, pieces: Sequence[_Piece]) -> StreamSummary:
    device, stream = lane
    label = trace.device_names.get(device, "")
    return StreamSummary(
        f"{device} ({label})" if label else device, stream, length(union((p.start_ns, p.end_ns) for p in pieces)),
        _by(pieces, {c: c for c in CLASSES}),
    )  # fmt: skip


def _lane_order(lane: Lane) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), part) if part.isdigit() else (1 << 62, part) for part in lane)


def _longest(pieces: Sequence[_Piece], most: int) -> tuple[tuple[str, str, int, int], ...]:
    """(name, class, count, summed ns) of what took most."""
    sums: dict[tuple[str, str], tuple[set[int], int]] = {}
    for p in pieces:
        events, ns = sums.get((p.event.name, p.name), (set(), 0))
        events.add(id(p.event))
        sums[p.event.name, p.name] = events, ns + p.end_ns - p.start_ns
    rows = [(name, of_class, len(events), ns) for (name, of_class), (events, ns) in sums.items()]
    return tuple(sorted(rows, key=lambda row: (-row[3], row[0]))[:most])
