"""The orders in which the stages of a pipeline work: pure lists of actions, no buffers, no time.

An action is F (forward), B (whole backward), I (backward for the inputs) or W (backward for the weights) of one chunk
of a stage and one micro-batch. Sources: GPipe (arXiv 1811.06965), 1F1B and its interleaved form as in Megatron
(arXiv 2104.04473), zero-bubble pipelines H1, H2 and V (arXiv 2401.10241, 2405.15362). With p stages, m micro-batches,
v chunks per stage, equal stages, free links and f, b = i + w the time of a stage's share of a micro-batch:

    gpipe, 1f1b     (m + p - 1) (f + b)
    interleaved     m (f + b) + (p - 1) (f + b) / v
    zb-h1           m (f + b) + (p - 1) (f + i - w)     for w <= f
    zb-h2           m (f + b) + (p - 1) f, without idle time inside a stage, if m is large enough
    zb-v            m (f + b) + (p - 1) f / 2            for f = i = w

The zero-bubble authors also publish a search that adapts the order to measured times ("ZB-1p", "ZB-2p"); its results
have the memory limits of H1 (p micro-batches per stage) and H2 (2p - 1), and stand here for those orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from rtp_sim.errors import InputError


class Action(NamedTuple):
    """What a stage does with chunk number `chunk` of its own (0 is the earliest layers) and a micro-batch."""

    kind: str
    chunk: int
    micro: int


Order = Callable[[int, int, int, int], list[Action]]
"""(stages, this stage, micro-batches, chunks per stage) -> the stage's actions."""


def gpipe(stages: int, stage: int, micros: int, chunks: int = 1) -> list[Action]:
    """All forwards, then all backwards."""
    return _rounds(stages, micros, chunks, warmup=micros * chunks)


def one_f_one_b(stages: int, stage: int, micros: int, chunks: int = 1) -> list[Action]:
    """As many forwards as there are later stages, then a forward and a backward in turn."""
    return _rounds(stages, micros, chunks, warmup=stages - stage - 1)


def interleaved(stages: int, stage: int, micros: int, chunks: int) -> list[Action]:
    """1F1B with several chunks per stage, in rounds of `stages` micro-batches. InputError if these do not divide."""
    if chunks > 1 and micros % stages:
        raise InputError(f"interleaved: {micros} micro-batches are no multiple of {stages} stages")
    return _rounds(stages, micros, chunks, warmup=2 * (stages - stage - 1) + (chunks - 1) * stages)


def zb_h1(stages: int, stage: int, micros: int, chunks: int = 1) -> list[Action]:
    """1F1B with weight gradients put off by `stage` micro-batches: each stage holds as much as the first."""
    return _rounds(stages, micros, chunks, warmup=stages - stage - 1, lag=stage)


def zb_h2(stages: int, stage: int, micros: int, chunks: int = 1) -> list[Action]:
    """Twice the forwards ahead and weight gradients put off twice as far: no bubble, about twice the memory."""
    return _rounds(stages, micros, chunks, warmup=2 * (stages - stage - 1), lag=2 * stage)


def _rounds(stages: int, micros: int, chunks: int, warmup: int, lag: int | None = None) -> list[Action]:
    """`warmup` forwards, then a forward and a backward in turn as long as there are forwards, then backwards. With
    `lag` the backward is split: the weight gradient of backward k follows input gradient k + lag."""
    total = micros * chunks
    warmup = min(warmup, total)
    found = [_forward(k, stages, chunks) for k in range(warmup)]
    for k in range(total):
        if warmup + k < total:
            found.append(_forward(warmup + k, stages, chunks))
        found.append(_backward("B" if lag is None else "I", k, stages, chunks))
        if lag is not None and k >= lag:
            found.append(_backward("W", k - lag, stages, chunks))
    if lag is not None:
        found += [_backward("W", k, stages, chunks) for k in range(max(0, total - lag), total)]
    return found


def _forward(k: int, stages: int, chunks: int) -> Action:
    """The k-th forward of a stage: rounds of `stages` micro-batches, in each round chunk after chunk."""
    step, turn = divmod(k, stages)
    return Action("F", step % chunks, step // chunks * stages + turn)


def _backward(kind: str, k: int, stages: int, chunks: int) -> Action:
    """The k-th backward: as the forwards, the last chunk first."""
    _, chunk, micro = _forward(k, stages, chunks)
    return Action(kind, chunks - 1 - chunk, micro)


def zb_v(stages: int, stage: int, micros: int, chunks: int = 2) -> list[Action]:
    """Two chunks per stage laid out as a V, so that a stage's second chunk meets the loss early on the first stage."""
    wanted = max(2 * stages - 1, micros)
    return [a for a in _zb_v(stages, stage, wanted) if a.micro < micros]


def _zb_v(stages: int, stage: int, micros: int) -> Iterator[Action]:
    """The published order, for at least 2 stages - 1 micro-batches."""
    done = {(kind, chunk): 0 for kind in "FIW" for chunk in (0, 1)}

    def take(kind: str, chunk: int) -> Action:
        done[kind, chunk] += 1
        return Action(kind, chunk, done[kind, chunk] - 1)

    for _ in range(2 * (stages - stage) - 1):
        yield take("F", 0)
    for _ in range(stage):
        yield take("F", 1)
        yield take("F", 0)
    for _ in range(stages - stage):
        yield from (take("F", 1), take("I", 1), take("W", 1))
    while done["F", 1] < done["F", 0] or done["F", 0] < micros:
        if done["F", 0] < micros:
            yield take("F", 0)
        yield from (take("I", 0), take("W", 0), take("F", 1), take("I", 1), take("W", 1))
    for _ in range(stage):
        yield from (take("I", 0), take("I", 1))
    for _ in range(stages - stage):
        yield from (take("I", 0), take("W", 0))
    for chunk in (1, 0):
        while done["W", chunk] < micros:
            yield take("W", chunk)


class Pipeline(NamedTuple):
    """A pipeline schedule: its order, the chunks per stage (None: the user says), and how chunks lie on stages."""

    order: Order
    chunks: int | None
    v_shape: bool = False


PIPELINES: Mapping[str, Pipeline] = {
    "gpipe": Pipeline(gpipe, 1),
    "1f1b": Pipeline(one_f_one_b, 1),
    "interleaved": Pipeline(interleaved, None),
    "zb-h1": Pipeline(zb_h1, 1),
    "zb-h2": Pipeline(zb_h2, 1),
    "zb-1p": Pipeline(zb_h1, 1),
    "zb-2p": Pipeline(zb_h2, 1),
    "zb-v": Pipeline(zb_v, 2, v_shape=True),
}


def held(actions: list[Action]) -> list[int]:
    """After each action, how many chunk activations the stage holds: from F to B, or to W where these are split."""
    count, found = 0, []
    for action in actions:
        count += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
        found.append(count)
    return found
