"""How far a step time spreads: a simulated step played again with seeded noise, and its percentiles.

    spread = jittered(run(prepare(request)), Noise(compute=0.03, link=0.1), samples=200, seed=0)

What is noisy and how is in engine/jitter.py. Every rank is played, also of steps that were simulated folded, because
noise makes all of them different. Many samples are evaluated at once, as many as fit into a fixed amount of memory; the
work is bounded too: steps of very many ops get fewer samples than were asked for, and the result says how many.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from rtp_sim.engine.jitter import Noise, Replay
from rtp_sim.errors import InputError
from rtp_sim.experiment import Result
from rtp_sim.timeline import Timeline

DEFAULT = Noise(compute=0.03, link=0.1, rank=0.01)
"""What is taken where nothing is said. Assumed: no measurement of a particular cluster stands behind it."""
SAMPLES, LEAST = 200, 20
MOST_WORK = 5 * 10**9
"""Ops of all ranks times samples that are played at most: a few minutes of one core."""
EXAMPLE = "for example compute=0.03,link=0.1,rank=0.01,straggler=0.001x1.5"
_STRAGGLER = re.compile(r"([\d.eE+-]+)x([\d.eE+-]+)")


@dataclass(frozen=True, slots=True)
class Spread:
    """Step times in ns over `samples` (of `asked`): percentiles are samples themselves (nearest rank). `base_ns` is the
    step without noise."""

    base_ns: int
    p50_ns: int
    p95_ns: int
    mean_ns: int
    least_ns: int
    most_ns: int
    samples: int
    asked: int
    seed: int
    noise: Noise


def jittered(result: Result, noise: Noise = DEFAULT, samples: int = SAMPLES, seed: int = 0) -> Spread:
    """The spread of a simulated step's time. The same arguments give the same numbers. InputError if the step is too
    large for even a few samples."""
    replay = Replay(result.timeline, result.prepared.cost)
    possible = MOST_WORK // max(1, replay.size)
    if possible < min(LEAST, samples):
        raise InputError(
            f"--jitter: {replay.size:,} ops of all ranks are too many to be played {LEAST} times; expected "
            f"{MOST_WORK // LEAST:,} at most"
        )
    played = min(samples, possible)
    return spread(result.timeline, replay.step_times_ns(noise, played, seed).tolist(), samples, seed, noise)


def spread(timeline: Timeline, step_ns: list[int], asked: int, seed: int, noise: Noise) -> Spread:
    """The percentiles of sampled step times."""
    ordered = sorted(step_ns)
    return Spread(
        timeline.step_time_ns, nearest_rank(ordered, 0.5), nearest_rank(ordered, 0.95), round(float(np.mean(ordered))),
        ordered[0], ordered[-1], len(ordered), asked, seed, noise,
    )  # fmt: skip


def nearest_rank(ascending: list[int], share: float) -> int:
    """The smallest sample that at least this share of the samples does not exceed."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def read_noise(text: str) -> Noise:
    """The noise that NAME=SIGMA,... says over none at all; DEFAULT for "". InputError with an example."""
    if not text:
        return DEFAULT
    names = [f.name for f in fields(Noise) if f.name != "straggler_factor"]
    noise = Noise()
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in names:
            raise InputError(f"--jitter {part.strip()}: expected some of {', '.join(names)}, {EXAMPLE}")
        noise = replace(noise, **_value(name, value))
    return noise


def _value(name: str, text: str) -> dict[str, float]:
    if name == "straggler":
        match = _STRAGGLER.fullmatch(text)
        if match is None:
            raise InputError(f"--jitter straggler={text}: expected a probability and a factor, {EXAMPLE}")
        probability, factor = _number(name, match[1]), _number(name, match[2])
        if probability > 1:
            raise InputError(f"--jitter straggler={text}: {probability:g} is no probability, {EXAMPLE}")
        return {"straggler": probability, "straggler_factor": factor}
    sigma = _number(name, text)
    if sigma > 2:
        raise InputError(f"--jitter {name}={text}: expected a standard deviation of at most 2, {EXAMPLE}")
    return {name: sigma}


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"--jitter {name}: {text!r} is no number of at least 0, {EXAMPLE}")
    return value


def spread_json(found: Spread) -> Mapping[str, object]:
    """The spread as plain JSON types, in seconds."""
    seconds = {f"{name[:-3]}_s": value / 1e9 for name, value in asdict(found).items() if name.endswith("_ns")}
    return {**seconds, "samples": found.samples, "asked": found.asked, "seed": found.seed, "noise": asdict(found.noise)}
