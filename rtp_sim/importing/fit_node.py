"""Fits what transfers inside one node say: latencies, the share of the links' rate that is reached, the size curve.

The time of a transfer is taken apart as cost/communication.py puts it together:

    ring kinds          base + steps x step + bytes / rate
    reduced in switch   base + start + 2 step + bytes / rate of its own
    sendrecv            p2p base + bytes / rate of messages

where "bytes / rate" at the links' raw rate is what the cost model itself says for the wiring at hand (`raw_ns`), so
that a tree of PCIe switches and a mesh need no formula of their own; the fit finds by what it must be multiplied. Least
squares on the relative error, as in calibration (executor/calibrate/fit.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

from rtp_sim.executor.calibrate.fit import CURVE_GAIN, relative_least_squares

RING, SWITCH, MESSAGE = "ring", "switch", "message"
NCCL_BASE_NS = 6600.0
"""Base latency of ring LL in NCCL 2.28's tuning table (as quoted in public notes): what is taken for the base where all
collectives have as many steps, so that base and steps cannot be told apart."""
CURVE_FROM_SHARES = (0.25, 0.02)
"""A curve begins at the size at which bytes at the full rate take this share of the time; the better one is kept."""
CURVE_WORTH = 0.01
"""Nor is one worth having where the error without is no larger than this."""
ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Move:
    """One transfer: how it is done, its steps on a ring, its bytes at the raw rate of the links, and what it took.

    `switch_raw_ns` is set where the switch may have reduced: then `way` is decided by the fit.
    """

    way: str
    steps: int
    size_bytes: int
    raw_ns: float
    time_ns: float
    switch_raw_ns: float | None = None


@dataclass(frozen=True, slots=True)
class NodeFit:
    """The parameters in ns and, for rates, the factor on the bytes' raw time (None: no such transfers were measured).

    `told_apart`: base and step come from transfers with different numbers of steps.
    """

    base_ns: float
    step_ns: float
    start_ns: float
    message_base_ns: float | None
    ring_factor: float | None
    switch_factor: float | None
    message_factor: float | None
    curve: tuple[tuple[int, float], ...]
    told_apart: bool


def fit_node(moves: Sequence[Move], switch_only: bool) -> NodeFit:
    """The best fit. With `switch_only` nothing else shows the ring's rate, and every move that the switch may have
    reduced is taken for one that it did."""
    if switch_only:
        moves = [_in_switch(m) if m.switch_raw_ns is not None else m for m in moves]
    current = [_in_switch(m) if m.switch_raw_ns is not None and m.size_bytes >= 1 << 20 else m for m in moves]
    best, best_error = _fitted(current)
    for _ in range(ROUNDS):
        chosen = [_quicker(m, best) for m in moves]
        if chosen == current:
            break
        current = chosen
        found, error = _fitted(current)
        if error >= best_error:
            break
        best, best_error = found, error
    return best


def _in_switch(move: Move) -> Move:
    assert move.switch_raw_ns is not None
    return replace(move, way=SWITCH, raw_ns=move.switch_raw_ns)


def _quicker(move: Move, fit: NodeFit) -> Move:
    """As the library is modelled: it takes the way that is quicker."""
    if move.switch_raw_ns is None or move.way == SWITCH or fit.switch_factor is None:
        return move
    other = _in_switch(move)
    return min((move, other), key=lambda m: predicted_ns(m, fit))


def predicted_ns(move: Move, fit: NodeFit) -> float:
    """What the fit says about a move."""
    fraction = dict(fit.curve).get(move.size_bytes, fit.curve[0][1] if fit.curve else 1.0)
    return _latency_ns(move, fit) + _factor(move, fit) * move.raw_ns / fraction


def _latency_ns(move: Move, fit: NodeFit) -> float:
    if move.way == MESSAGE:
        return fit.message_base_ns or 0.0
    return fit.base_ns + (fit.start_ns + 2 * fit.step_ns if move.way == SWITCH else move.steps * fit.step_ns)


def _factor(move: Move, fit: NodeFit) -> float:
    factor = {RING: fit.ring_factor, SWITCH: fit.switch_factor, MESSAGE: fit.message_factor}[move.way]
    return 1.0 if factor is None else factor


def _fitted(moves: Sequence[Move]) -> tuple[NodeFit, float]:
    """The fit without a size curve, or with one where that takes away enough of the error of the sizes it is about.

    The curve is looked for from several first guesses: all sizes, and only the ends, which show latency and rate best.
    """
    flat = _solved(moves, {})
    best, best_error = flat, _error(moves, flat)
    sizes = sorted({m.size_bytes for m in moves})
    guesses = [flat]
    for count in (3, len(sizes) // 3):
        ends = [m for m in moves if m.size_bytes in {*sizes[:count], *sizes[-count:]}]
        if 0 < count <= len(sizes) // 2 and {(m.way, m.steps) for m in ends} == {(m.way, m.steps) for m in moves}:
            guesses.append(_solved(ends, {}))
    for guess, share in product(guesses, CURVE_FROM_SHARES):
        if curve := _curve(moves, guess, share):
            curved, governed = _solved(moves, curve), [m for m in moves if m.size_bytes >= min(curve)]
            error = _error(moves, curved)
            limit = max(CURVE_GAIN * _error(governed, flat), CURVE_WORTH)
            if error < best_error and limit < _error(governed, flat) and _error(governed, curved) < limit:
                best, best_error = curved, error
    return best, best_error


def _error(moves: Sequence[Move], fit: NodeFit) -> float:
    """Root mean square of the relative error."""
    squares = [(predicted_ns(m, fit) / m.time_ns - 1) ** 2 for m in moves]
    return float((sum(squares) / len(squares)) ** 0.5)


def _solved(moves: Sequence[Move], curve: Mapping[int, float]) -> NodeFit:
    """The parameters for a given curve. Messages share the collectives' rate if they seem to be the quicker: the cost
    model has no word for that."""
    found = _least_squares(moves, curve, shared=False)
    if found.message_factor and found.ring_factor and found.message_factor < found.ring_factor:
        return _least_squares(moves, curve, shared=True)
    return found


def _least_squares(moves: Sequence[Move], curve: Mapping[int, float], shared: bool) -> NodeFit:
    """Only columns that something was measured for take part. Where all collectives have as many steps, one latency
    stands for base and steps and is divided afterwards."""
    lowest = curve[min(curve)] if curve else 1.0
    steps = sorted({m.steps for m in moves if m.way == RING})
    told_apart = len(steps) > 1
    several = bool(steps) and any(m.way == SWITCH for m in moves)
    columns: dict[str, list[float]] = {}

    def put(i: int, name: str, value: float) -> None:
        columns.setdefault(name, [0.0] * len(moves))[i] = value

    for i, m in enumerate(moves):
        bytes_ns = m.raw_ns / curve.get(m.size_bytes, lowest)
        if m.way == MESSAGE:
            put(i, "message_base", 1.0)
        else:
            put(i, "base", 1.0)
        if m.way == RING and told_apart:
            put(i, "step", float(m.steps))
        if m.way == SWITCH and told_apart:
            put(i, "step", 2.0)
        if m.way == SWITCH and several:
            put(i, "start", 1.0)
        put(i, RING if shared and m.way == MESSAGE else m.way, bytes_ns)
    x = dict(zip(columns, relative_least_squares(list(columns.values()), [m.time_ns for m in moves]), strict=True))
    base, step, start = x.get("base", 0.0), x.get("step", 0.0), x.get("start", 0.0)
    if not told_apart and "base" in columns:
        count = steps[0] if steps else max(m.steps for m in moves if m.way == SWITCH)
        latency, base = base, min(base, NCCL_BASE_NS)
        step = (latency - base) / count
        start += (count - 2) * step if any(m.way == SWITCH for m in moves) else 0.0
    return NodeFit(
        base, step, start, x.get("message_base"), x.get(RING), x.get(SWITCH),
        x.get(RING) if shared else x.get(MESSAGE), tuple(sorted(curve.items())), told_apart,
    )  # fmt: skip


# ---- size curve


def _curve(moves: Sequence[Move], fit: NodeFit, from_share: float) -> dict[int, float]:
    """By size, the fraction of the rate that is reached, alternating with the other parameters. It begins where bytes
    take a good share of the time."""
    share: dict[int, float] = {}
    for m in moves:
        share[m.size_bytes] = max(share.get(m.size_bytes, 0.0), _factor(m, fit) * m.raw_ns / m.time_ns)
    first = min((size for size, part in share.items() if part > from_share), default=None)
    sizes = sorted(size for size in share if first is not None and size >= first)
    curve: dict[int, float] = {}
    for _ in range(40 if len(sizes) > 2 else 0):
        slowness = {size: _slowness([m for m in moves if m.size_bytes == size], fit) for size in sizes}
        fastest = min(slowness.values())
        curve = {size: fastest / slowness[size] for size in sizes}
        for smaller, size in pairwise(sizes):
            # No message takes less time than a smaller one: as cost/communication.py reads curves.
            curve[size] = min(curve[size], curve[smaller] * size / smaller)
        fit = _solved(moves, curve)
    return curve


def _slowness(moves: Sequence[Move], fit: NodeFit) -> float:
    """How many times longer than at the full rate the bytes of these moves take, by least squares."""
    above = below = 0.0
    for m in moves:
        share = _factor(m, fit) * m.raw_ns / m.time_ns
        above += share * (1 - _latency_ns(m, fit) / m.time_ns)
        below += share * share
    return min(50.0, max(above / below, 0.02)) if below else 1.0
