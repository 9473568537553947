"""`Point`: one experiment of a sweep, and the key under which its result is kept.

The key is a hash of everything the result follows from: the request, the contents of the profile with its changes, the
model, the engine, and the source of the rooms that make a prediction. Two points with the same key are one computation,
in one sweep and from one sweep to the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import rtp_sim
from rtp_sim.errors import InputError
from rtp_sim.experiment import Request
from rtp_sim.hardware.profiles import profile_contents
from rtp_sim.model.presets import find_model

ROOMS = ("model", "hardware", "schedule", "cost", "engine", "compose")
MODULES = ("experiment.py", "metrics.py", "timeline.py", "units.py", "link.py", "stated.py", "sweep/evaluate.py")
"""What a prediction comes out of: a change of any of these makes other keys."""

Changes = tuple[tuple[str, str | float], ...]
"""(dotted key, value) of numbers of the profile, as hardware/changes.py takes them."""


@dataclass(frozen=True, slots=True)
class Point:
    """`at` are the values of the sweep's axes, as written. `engine` is simpy, longest-path or estimate."""

    at: tuple[str, ...]
    request: Request
    changes: Changes = ()
    engine: str = "estimate"


def key_of(point: Point) -> str:
    """The key, 32 hexadecimal digits. InputError if profile or model are not known, or lack a number to change."""
    request = asdict(point.request)
    given = {name: value for name, value in request.items() if name not in ("model", "cluster")}
    inputs = {
        "program": program_hash(), "engine": point.engine, "request": given,
        "profile": _profile(point.request.cluster, point.changes), "model": _model(point.request.model),
    }  # fmt: skip
    return _hash(inputs)


@lru_cache(maxsize=1)
def program_hash() -> str:
    """A hash of the sources that predictions come out of, whatever the version is called."""
    root = Path(rtp_sim.__file__).parent
    files = [root / name for name in MODULES] + [path for room in ROOMS for path in (root / room).rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(root).as_posix()).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1024)
def _profile(cluster: str, changes: Changes) -> str:
    return _hash(profile_contents(cluster, dict(changes)))


@lru_cache(maxsize=256)
def _model(model: str) -> str:
    """A file by its contents, a preset by its numbers."""
    if not model.endswith(".json"):
        return _hash(asdict(find_model(model)))
    try:
        return hashlib.sha256(Path(model).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{model}: cannot be read: {error.strerror}") from None


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
