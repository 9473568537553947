"""`Question`, `Site`, `Found` and `Searched`: what is asked of a search and what it knows, then and afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rtp_sim.errors import InputError
from rtp_sim.hardware.spec import Cluster
from rtp_sim.metrics import StepMetrics
from rtp_sim.model.network import Network
from rtp_sim.planner.bounds import Floats, Model, time_bounds
from rtp_sim.planner.constraints import Limit
from rtp_sim.planner.memory_bounds import by_category
from rtp_sim.planner.money import kilowatts, usd_per_second
from rtp_sim.planner.plan import Bounds, Machine
from rtp_sim.planner.rules import Broken
from rtp_sim.planner.space import DEFAULT_STRATEGIES, Ints, Space
from rtp_sim.planner.workload import Workload

KIND = ("strategy", "inner", "dp", "pp", "micro_batch", "recompute")
"""Columns of the space that candidates of one kind share; its variants differ in the others."""


@dataclass(frozen=True)
class Question:
    """What to plan: a workload, the machines it may run on (cluster with its nodes and GPUs), the wish. `prices` are
    USD per GPU and hour by cluster ("" for all). With `variants` every candidate is a kind of its own; without
    `simulate` plans are shown by their estimates. `network` stands in the place of the workload's own.
    """

    workload: Workload
    clusters: tuple[Cluster, ...]
    objective: str = "time"
    top: int = 10
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES
    limits: tuple[Limit, ...] = ()
    headroom: float = 0.0
    min_tokens_per_s: float | None = None
    prices: tuple[tuple[str, float], ...] = ()
    front: bool = True
    processes: int = 2
    variants: bool = False
    simulate: bool = True
    network: Network | None = None


@dataclass(frozen=True)
class Site:
    """One machine of the search with its candidates: those that the user allows, the rules that some break, the places
    of the others (`sound`). Of these `space`, `memory` by category and whether it fits, and bounds of the step time,
    infinite where it does not fit."""

    machine: Machine
    cluster: Cluster
    model: Model
    space: Space
    allowed: npt.NDArray[np.bool_]
    broken: list[Broken]
    sound: Ints
    memory: Ints
    fits: npt.NDArray[np.bool_]
    lower_s: Floats
    upper_s: Floats

    def bounds(self, place: int) -> Bounds:
        """The bounds of the candidate at a place. The search prices only what fits; what does not is priced here."""
        column, lower_s, upper_s = self.memory[:, place], self.lower_s[place], self.upper_s[place]
        if not self.fits[place]:
            (lower_s,), (upper_s,) = time_bounds(self.space.take(np.array([place])), self.model)
        return Bounds(float(lower_s), float(upper_s), int(column.sum()), by_category(column))


@dataclass(frozen=True, slots=True)
class Found:
    """A candidate that was evaluated: where it is (site, place among the sound), its metrics and what they rest on,
    whether it may be shown. `estimated_s` is its step time before it was simulated, None where it was simulated at
    once; `final` says that nothing better will be known; `short` that simulating it is cheap (evaluate.short)."""

    site: int
    place: int
    metrics: StepMetrics
    how: str
    fits: bool
    fast_enough: bool
    estimated_s: float | None
    final: bool
    short: bool

    @property
    def good(self) -> bool:
        """Whether it may be shown."""
        return self.fits and self.fast_enough

    @property
    def above(self) -> float:
        """By what part of it the estimate was above the simulation; 0 where it was not, or is not known."""
        known = self.final and self.estimated_s is not None
        return max(0.0, self.estimated_s / self.metrics.step_time_s - 1) if known and self.estimated_s else 0.0


@dataclass
class Searched:
    """What a search leaves behind, before it is put into words: `waiting` are candidates by (site, place) that were
    never estimated, best bound first; `best` the good ones by objective, `lines` the best of each kind of them."""

    question: Question
    network: Network
    sites: list[Site]
    found: list[Found] = field(default_factory=list)
    best: list[Found] = field(default_factory=list)
    lines: list[Found] = field(default_factory=list)
    waiting: list[tuple[int, int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def simulated(self) -> int:
        """How many were simulated."""
        return sum(one.final for one in self.found)

    def kind(self, site: int, place: int) -> object:
        """What a candidate has in common with its variants."""
        if self.question.variants:
            return site, place
        space = self.sites[site].space
        return site, *(int(getattr(space, name)[place]) for name in KIND)


def slowest(searched: Searched) -> float:
    """The longest step that still makes the least tokens per second."""
    wanted = searched.question.min_tokens_per_s
    tokens = searched.question.workload.global_batch * searched.network.seq
    return np.inf if wanted is None else tokens / wanted


def score(objective: str, machine: Machine, step_s: Floats, memory: Floats) -> tuple[Floats, Floats]:
    """What is to be small, and what decides between equals."""
    if objective == "memory":
        return memory, step_s
    if objective == "gpus":
        return np.full_like(step_s, machine.gpus), step_s
    if objective == "cost":
        return step_s * (usd_per_second(machine) or 0.0), step_s
    if objective == "energy":
        power = kilowatts(machine)
        if power is None:
            raise InputError(f"{machine.cluster}: its device profile states no tdp_w; expected it for --objective "
                             f"energy")  # fmt: skip
        return step_s * power, step_s
    return step_s, memory


def score_of(searched: Searched, one: Found) -> tuple[float, float]:
    """The objective of an estimated candidate."""
    metrics = one.metrics
    first, second = score(
        searched.question.objective, searched.sites[one.site].machine, np.array([metrics.step_time_s]),
        np.array([float(metrics.peak_memory_bytes)]),
    )  # fmt: skip
    return float(first[0]), float(second[0])
